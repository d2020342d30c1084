"""The interface through which ranks meet. It knows tensors, not parameters."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from heatopt.comm._collectives import broadcast_flat, gather_flat, reduce_flat, reduce_scatter_rows
from heatopt.comm._tensors import check_reduction, check_tensor, describe_call, flatten
from heatopt.comm._topology import Topology
from heatopt.comm._transport import Transport
from heatopt.comm._watchdog import Watchdog
from heatopt.comm._work import Steps, Work, WorkQueue
from heatopt.errors import RankMismatchError

__all__ = ["Communicator", "NodeGroups"]

T = TypeVar("T")
Words = npt.NDArray[np.int64]


class NodeGroups(NamedTuple):
    """The two communicators of :meth:`Communicator.by_node`."""

    within: Communicator
    """The ranks of this node."""
    across: Communicator
    """The ranks that have this rank's ``node_rank`` on their node, one per node that has as many ranks."""


class Communicator(Transport):
    """A group of ranks that work together.

    Every method that exchanges data is collective: all ranks of the group call it, in the same order, with tensors
    of the same shape and dtype; a disagreement raises :class:`~heatopt.errors.RankMismatchError` on all ranks.
    Tensors may have any of the dtypes bool, uint8, int8, int16, int32, int64, float16, bfloat16, float32, float64,
    complex64 and complex128, any shape (0-dim and empty included) and any strides, on the CPU or a GPU.

    Sums are formed in rank order, at least in single precision, and rounded once; all ranks receive the same bits.
    """

    def __init__(
        self,
        rank: int,
        topology: Topology,
        timeout: float,
        *,
        name: str = "world",
        members: tuple[int, ...] | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.rank = rank
        """This process's number in the group, 0 <= rank < size."""
        self.size = len(topology.node_of)
        """Number of ranks in the group."""
        self.timeout = timeout
        """Seconds after which a waiting collective gives up, naming the late ranks; ``inf``: never."""
        self._topology = topology
        self._name = name
        self._members = tuple(range(self.size)) if members is None else members  # their ranks in the world
        self._children = 0
        self._operations = 0  # started on this communicator, the same number on all its ranks
        self._watchdog = watchdog
        self._queue = WorkQueue()

    # Topology

    @property
    def node_rank(self) -> int:
        """This rank's number among the ranks of its node."""
        return self._topology.node_rank(self.rank)

    @property
    def node_size(self) -> int:
        """Number of ranks on this node."""
        return self._topology.node_size(self.rank)

    @property
    def node_index(self) -> int:
        """Number of this rank's node, 0 <= node_index < num_nodes."""
        return self._topology.node_index(self.rank)

    @property
    def num_nodes(self) -> int:
        """Number of nodes; ranks share a node if they share its memory (``HEATOPT_RANKS_PER_NODE`` overrides)."""
        return self._topology.num_nodes

    # Collectives on tensors

    def allreduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce ``tensor`` over all ranks, in place, and return it.

        Args:
            tensor: any shape; the same shape and dtype on all ranks.
            op: "sum", "mean", "max" or "min". The sum of bools is "or".

        Raises:
            TypeError: the dtype cannot be reduced, or it is the mean of integers, or an order of complex numbers.
            ValueError: unknown ``op``.
            RankMismatchError: ranks differ in op, shape or dtype.
        """
        return self._run(self._allreduce(tensor, op, blocking=True), "allreduce")

    def allreduce_async(self, tensor: torch.Tensor, op: str = "sum") -> Work[torch.Tensor]:
        """Launch :meth:`allreduce`; ``tensor`` must not be touched before the handle's ``wait()`` returns it.

        It goes on beside computation. This process's next collective call, on any communicator of the world, completes
        it first, so that a rank may wait for it alone.
        """
        return self._launch(self._allreduce(tensor, op, blocking=False), "allreduce")

    def reduce_scatter(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce ``tensor`` over all ranks and return this rank's slice of the first dimension.

        Args:
            tensor: its first dimension is divisible by ``size``; not changed.
            op: as in :meth:`allreduce`.

        Returns:
            A new tensor of shape ``(tensor.shape[0] // size, *tensor.shape[1:])``.
        """
        return self._run(self._reduce_scatter(tensor, op, blocking=True), "reduce_scatter")

    def reduce_scatter_async(self, tensor: torch.Tensor, op: str = "sum") -> Work[torch.Tensor]:
        """Launch :meth:`reduce_scatter`."""
        return self._launch(self._reduce_scatter(tensor, op, blocking=False), "reduce_scatter")

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all ranks, in rank order, as new tensors."""
        return self._run(self._gather_all(tensor, blocking=True), "all_gather")

    def all_gather_async(self, tensor: torch.Tensor) -> Work[list[torch.Tensor]]:
        """Launch :meth:`all_gather`."""
        return self._launch(self._gather_all(tensor, blocking=False), "all_gather")

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Overwrite ``tensor`` with that of rank ``root``, in place, and return it."""
        return self._run(self._broadcast_any(tensor, root, blocking=True), "broadcast")

    def broadcast_async(self, tensor: torch.Tensor, root: int = 0) -> Work[torch.Tensor]:
        """Launch :meth:`broadcast`."""
        return self._launch(self._broadcast_any(tensor, root, blocking=False), "broadcast")

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._agree("barrier", "barrier()")

    # Collectives on Python objects

    def all_gather_object(self, obj: T) -> list[T]:
        """Return the objects of all ranks, in rank order. They travel by pickle."""
        self._agree("all_gather_object", "all_gather_object()")
        return self.exchange_objects(obj)

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """Return the object of rank ``root``. It travels by pickle."""
        self.check_root(root)
        self._agree(f"broadcast_object from {root}", f"broadcast_object(root={root})")
        # The others send nothing; one exchange keeps every backend to a single kind of object traffic.
        return self.exchange_objects(obj if self.rank == root else None)[root]  # type: ignore[return-value]

    # Groups

    def split(self, color: int | None, key: int = 0) -> Communicator:
        """Return the group of the ranks that passed the same ``color``, ordered by ``(key, rank)``.

        A rank that passes ``None`` gets a group of its own.
        """
        if color is not None and (isinstance(color, bool) or not isinstance(color, int)):
            raise TypeError(f"color must be an int or None, got {color!r}")
        if isinstance(key, bool) or not isinstance(key, int):
            raise TypeError(f"key must be an int, got {key!r}")
        self._agree("split", "split()")
        wishes = self.exchange_objects((color, key))
        groups: dict[object, list[int]] = {}
        for rank, (wish, _) in enumerate(wishes):
            groups.setdefault(("alone", rank) if wish is None else ("color", wish), []).append(rank)
        return self._make_group(
            [sorted(group, key=lambda r: (wishes[r][1], r)) for group in groups.values()], "split()"
        )

    def by_node(self) -> NodeGroups:
        """Return the group of this node's ranks and the group of the ranks with this ``node_rank`` on all nodes."""
        return NodeGroups(self.split(self.node_index, self.rank), self.split(self.node_rank, self.node_index))

    def duplicate(self, purpose: str = "duplicate()") -> Communicator:
        """Return a communicator of the same ranks whose traffic never meets this one's. Collective.

        Args:
            purpose: names the call in messages.
        """
        self._agree(f"duplicate for {purpose}", purpose)
        return self._make_group([list(range(self.size))], purpose)

    def _make_group(self, groups: list[list[int]], what: str) -> Communicator:
        self._queue.drain()
        self._children += 1
        color = next(index for index, group in enumerate(groups) if self.rank in group)
        group = groups[color]
        with self._waiting(what, self._enter()):
            child = self._open_group(
                color,
                group.index(self.rank),
                name=f"{self._name}.{self._children}.{color}",
                topology=self._topology.of_group(group),
                members=tuple(self._members[rank] for rank in group),
            )
        child._queue = self._queue  # see [Note: Order of stages]
        return child

    def close(self) -> None:
        """Complete what is in flight and free the group's resources. Collective; the default does the former."""
        self._queue.drain()

    @abstractmethod
    def abort(self, message: str, code: int = 1) -> NoReturn:
        """End the job on all ranks with ``message`` on stderr and a non-zero exit code."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self  # A copy of whatever holds a communicator talks to the same ranks.

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a communicator belongs to its process and cannot be pickled; call heatopt.world() in the other one"
        )

    # What the layers above use: no agreement check, since their plans are fingerprinted.

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Zeroed, contiguous memory for a bucket of ``numel`` elements, from where reductions are fastest."""
        return torch.zeros(numel, dtype=dtype, device=device)

    def reduce_bucket(self, flat: torch.Tensor, divisor: int, blocking: bool, what: str) -> Work[None] | None:
        """Sum the contiguous ``flat`` over ranks and divide by ``divisor``, in place; ``None`` once completed."""
        steps = reduce_flat(self, flat, "sum", divisor, blocking)
        if blocking:
            self._run(steps, what)
            return None
        return self._launch(steps, what)

    def gather_rows(self, flat: torch.Tensor, what: str) -> torch.Tensor:
        """Return the contiguous ``flat``, of equal length everywhere, of every rank as ranks x elements."""
        return self._run(gather_flat(self, flat, True), what)

    def broadcast_bytes(self, flat: torch.Tensor, root: int, what: str) -> None:
        """Overwrite the contiguous ``flat`` with that of ``root``."""
        self._run(broadcast_flat(self, flat, root, True), what)

    def exchange_words(self, words: Words, what: str) -> Words:
        """Return the 64-bit integers of every rank, as an array of ranks x words. The fastest agreement there is."""
        self._queue.drain()
        with self._waiting(what, self._enter()):
            return self._exchange_words(words)

    def agree_on(self, described: object, call: str) -> None:
        """Raise RankMismatchError on all ranks unless all pass the same, comparable and printable, object."""
        self._agree(f"{call} {described!r}", f"{call} with {described!r}")

    def exchange_objects(self, obj: T, what: str = "exchange of objects") -> list[T]:
        """Return the objects of every rank."""
        self._queue.drain()
        with self._waiting(what, self._enter()):
            return self._exchange_objects(obj)

    # Waits

    def _run(self, steps: Steps[T], what: str) -> T:
        """Run a collective to its end, after the works before it."""
        self._queue.drain()
        return self._queue.run(steps, partial(self._waiting, what, self._enter()))

    def _launch(self, steps: Steps[T], what: str) -> Work[T]:
        return self._queue.launch(steps, partial(self._waiting, what, self._enter()))

    def _enter(self) -> int:
        """An operation of this communicator starts; return its number, which is the same on all ranks."""
        self._operations += 1
        if self._watchdog is not None:
            self._watchdog.enter(self._name, self._operations)
        return self._operations

    @contextmanager
    def _waiting(self, what: str, number: int) -> Iterator[None]:
        """Surround each wait, so that a watchdog can look at it from another thread."""
        dog = self._watchdog
        if dog is None:
            yield
            return
        dog.begin(self._name, number, what, self._members, self.timeout)
        try:
            yield
        finally:
            dog.end()

    # What a backend adds to the transport

    @abstractmethod
    def _exchange_words(self, words: Words) -> Words: ...

    @abstractmethod
    def _exchange_objects(self, obj: T) -> list[T]: ...

    @abstractmethod
    def _open_group(
        self, color: int, rank: int, *, name: str, topology: Topology, members: tuple[int, ...]
    ) -> Communicator:
        """Make the communicator of this rank's group; every rank of this one calls it, each with its group."""

    # Shared parts of the public collectives

    def _allreduce(self, tensor: torch.Tensor, op: str, blocking: bool) -> Steps[torch.Tensor]:
        check_reduction(tensor, op)
        self._agree_on_tensor(describe_call(f"allreduce {op}", blocking), tensor)
        target = tensor.detach()
        flat = flatten(target)
        yield from reduce_flat(self, flat, op, self.size if op == "mean" else 1, blocking)
        if flat.data_ptr() != target.data_ptr() or not target.is_contiguous():
            target.copy_(flat.view(target.shape))
        return tensor

    def _reduce_scatter(self, tensor: torch.Tensor, op: str, blocking: bool) -> Steps[torch.Tensor]:
        check_reduction(tensor, op)
        if tensor.dim() == 0 or tensor.shape[0] % self.size:
            raise ValueError(
                f"reduce_scatter needs a first dimension divisible by the number of ranks ({self.size}), "
                f"got shape {tuple(tensor.shape)}; pad the tensor"
            )
        self._agree_on_tensor(describe_call(f"reduce_scatter {op}", blocking), tensor)
        shape = (tensor.shape[0] // self.size, *tensor.shape[1:])
        rows = flatten(tensor.detach()).view(self.size, tensor.numel() // self.size)
        divisor = self.size if op == "mean" else 1
        own = yield from reduce_scatter_rows(self, rows, op, divisor, blocking)
        return own.view(shape)

    def _gather_all(self, tensor: torch.Tensor, blocking: bool) -> Steps[list[torch.Tensor]]:
        self._agree_on_tensor(describe_call("all_gather", blocking), tensor)
        flat = flatten(tensor.detach())
        gathered = yield from gather_flat(self, flat, blocking)
        return [row.view(tensor.shape) for row in gathered.unbind(0)]

    def _broadcast_any(self, tensor: torch.Tensor, root: int, blocking: bool) -> Steps[torch.Tensor]:
        self.check_root(root)
        self._agree_on_tensor(describe_call(f"broadcast from {root}", blocking), tensor)
        target = tensor.detach()
        flat = flatten(target)
        yield from broadcast_flat(self, flat, root, blocking)
        if flat.data_ptr() != target.data_ptr() or not target.is_contiguous():
            target.copy_(flat.view(target.shape))
        return tensor

    def check_root(self, root: int) -> None:
        """Raise ValueError unless ``root`` is a rank."""
        if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < self.size:
            raise ValueError(f"root must be a rank, 0 <= root < {self.size}, got {root!r}")

    def _agree_on_tensor(self, call: str, tensor: torch.Tensor) -> None:
        check_tensor(tensor)
        if tensor.layout != torch.strided:
            raise TypeError(f"{call} needs a dense tensor, got layout {tensor.layout}")
        described = f"{call}, shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device.type}"
        self._agree(described, described)

    def _agree(self, signature: str, described: str) -> None:
        """Raise on all ranks unless all make the same call with the same kind of argument."""
        digest = hashlib.blake2b(signature.encode(), digest_size=8).digest()
        words = np.frombuffer(digest, dtype=np.int64).copy()
        rows = self.exchange_words(words, described)
        if (rows == words).all():
            return
        answers = self.exchange_objects((described, self._operations), "comparison of calls")
        # Whoever catches the error goes on with the same number of operations as the others.
        self._operations = max(operations for _, operations in answers)
        self._enter()
        calls = [call for call, _ in answers]
        other = next(rank for rank, call in enumerate(calls) if call != calls[0])
        raise RankMismatchError(
            f"ranks make different collective calls: rank 0 calls {calls[0]}, rank {other} calls {calls[other]}; "
            "every rank must make the same calls in the same order"
        )
