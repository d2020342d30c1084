"""The interface through which ranks meet. It knows tensors, not parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, NoReturn, TypeVar

import torch

from heatopt.comm._background import HostWork, StreamWork
from heatopt.comm._collectives import broadcast_flat, gather_flat, gather_messages, reduce_flat, reduce_scatter_rows
from heatopt.comm._exit import tell_on_exit
from heatopt.comm._group import RankGroup, Words
from heatopt.comm._node_reduction import BucketMemory, Parts, ReduceOptions, Take
from heatopt.comm._reducer import BucketReducer
from heatopt.comm._shared_memory import SharedBlock
from heatopt.comm._tensors import check_reduction, describe_call, flatten
from heatopt.comm._topology import Topology
from heatopt.comm._watchdog import Bulletin, Watchdog
from heatopt.comm._work import Handle, Steps, Work, WorkQueue

__all__ = ["Communicator", "NodeGroups", "Words"]

T = TypeVar("T")


class NodeGroups(NamedTuple):
    """The two communicators of :meth:`Communicator.by_node`."""

    within: Communicator
    """The ranks of this node."""
    across: Communicator
    """The ranks that have this rank's ``node_rank`` on their node, one per node that has as many ranks."""


class Communicator(RankGroup):
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
        super().__init__(rank, topology, timeout, name=name, members=members, watchdog=watchdog)
        self._children = 0
        self._closers: list[Callable[[], None]] = []
        self._reducer = BucketReducer()

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

    def background(self, purpose: str = "background()") -> Communicator:
        """Return a communicator of the same ranks whose works other communicators' calls do not complete. Collective.

        What is launched on it goes on by itself, beside other collectives, until ``wait()``; a blocking call of its own
        completes the works before it.

        Args:
            purpose: names the call in messages.
        """
        twin = self.duplicate(purpose)
        if self.can_use_threads:
            twin._queue = self._queue.branch()
        return twin

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

    def _make_helper(self, groups: list[list[int]], what: str) -> Communicator:
        """A group for this one's own use, which is closed with it."""
        group = self._make_group(groups, what)
        self.when_closed(group.close)
        return group

    def when_closed(self, function: Callable[[], None]) -> None:
        """Let :meth:`close` begin with ``function``, on all ranks in the same order: the last one first."""
        self._closers.append(function)

    def close(self) -> None:
        """Complete what is in flight and free the group's resources. Collective. Again, it does nothing.

        Optimizers on it have ended then: what is collective raises HeatoptError.
        """
        while self._closers:
            self._closers.pop()()
        self._queue.drain()
        self._reducer.close()
        self._node = None
        self._closed = True
        if self._watchdog is not None:
            self._watchdog.release(self)

    @abstractmethod
    def abort(self, message: str, code: int = 1) -> NoReturn:
        """End the job on all ranks with ``message`` on stderr and a non-zero exit code."""

    def _watch(self, bulletin: Bulletin, end_job: Callable[[str], None]) -> None:
        """Watch over this group, a world, and over those that are made of it; tell the others when the program ends."""
        self._watchdog = Watchdog(self.rank, self.size, bulletin, end_job)
        self._watchdog.watch(self)
        # The queue keeps works that are in flight until then, and with them their communicators.
        tell_on_exit(partial(_leave, self.rank, self._queue, self._watchdog, end_job))

    # What the layers above use: no agreement check, since their plans are fingerprinted.

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> BucketMemory:
        """Zeroed memory for a bucket of ``numel`` elements, from where reductions are fastest. Collective."""
        return self._reducer.allocate(self, self._make_helper, numel, dtype, device)

    def reduce_bucket(self, memory: BucketMemory, options: ReduceOptions, what: str) -> Work[None] | None:
        """Sum a bucket over ranks and divide, in place; ``None`` once completed."""
        return self._start_reduction(self._reducer.steps(self, memory, options), options, what)

    def scatter_bucket(
        self, memory: BucketMemory, bounds: Sequence[int], options: ReduceOptions, what: str
    ) -> Work[None] | None:
        """The same, where each rank needs a part of the result: half of the traffic.

        Elements ``bounds[rank]:bounds[rank + 1]`` of this rank's memory become what :meth:`reduce_bucket` makes of
        them, to the last bit; afterwards the others are undefined. Parts may be empty.

        Args:
            memory: of ``bounds[-1]`` elements.
            bounds: ``size + 1`` ascending numbers, the first 0; equal on all ranks.
            options: as for :meth:`reduce_bucket`.
            what: names the call in messages.
        """
        return self._start_reduction(self._reducer.scatter_steps(self, memory, bounds, options), options, what)

    def _start_reduction(self, steps: Steps[None], options: ReduceOptions, what: str) -> Work[None] | None:
        if options.blocking:
            self._run(steps, what)
            return None
        # Within a node nothing travels: whoever reduces calls while backward goes on, and waits when it has ended. To
        # start a thread for that in each step would cost more than the reduction.
        return self._launch(steps, what, pumped=self.num_nodes > 1)

    def reduce_now(self, flat: torch.Tensor, op: str, what: str) -> None:
        """Replace the contiguous ``flat`` by its "sum" or "mean" over all ranks, with the bits of :meth:`allreduce`."""
        self._run(reduce_flat(self, flat, op, self.size if op == "mean" else 1, True), what)

    def reduce_async(self, flat: torch.Tensor, op: str, what: str) -> Handle[None]:
        """Launch :meth:`reduce_now`; waits for nobody."""
        divisor = self.size if op == "mean" else 1
        if flat.device.type != "cpu" and self._is_on_device(flat):
            return StreamWork(flat, lambda: self._run(reduce_flat(self, flat, op, divisor, False), what))
        host = flat.to("cpu")
        work = self._launch(reduce_flat(self, host, op, divisor, False), what)
        return work if host is flat else HostWork(work, host, flat)

    def share_memory(self, memory: BucketMemory, take: Take, what: str) -> None:
        """Show what the other ranks have in their ``memory.own`` to ``take(rank, theirs)``."""
        self._run(self._reducer.share_steps(self, memory, take), what)

    def allocate_once(self, nbytes: int) -> SharedBlock | None:
        """Zeroed memory that the ranks of each node have in common; None on all ranks if there is none. Collective.

        Nothing keeps readers and writers apart but the meetings that the caller arranges.
        """
        return self._reducer.allocate_once(self, self._make_helper, nbytes)

    def spread_to_nodes(self, parts: Parts, what: str) -> None:
        """Copy what each rank has written of its node's common memory to the other nodes, whose ranks then see it.

        Args:
            parts: by rank, views of memory by :meth:`allocate_once`: alike on all ranks, and disjoint.
            what: names the call in messages.
        """
        self._run(self._reducer.spread_steps(parts), what)

    def progress(self) -> None:
        """Advance what has been launched, without blocking."""
        self._queue.poll()

    def gather_rows(self, flat: torch.Tensor, what: str) -> torch.Tensor:
        """Return the contiguous ``flat``, of equal length everywhere, of every rank as ranks x elements."""
        return self._run(gather_flat(self, flat, True), what)

    def gather_messages(self, message: torch.Tensor, equal: bool, what: str) -> list[torch.Tensor]:
        """Return the bytes of every rank, in rank order.

        Args:
            message: one-dimensional, contiguous, of uint8.
            equal: all ranks' are of equal length, so that one exchange does.
            what: names the call in messages.
        """
        return self._run(gather_messages(self, message, equal, True), what)

    def gather_messages_async(self, message: torch.Tensor, equal: bool, what: str) -> Work[list[torch.Tensor]]:
        """Launch :meth:`gather_messages`."""
        return self._launch(gather_messages(self, message, equal, False), what)

    def broadcast_bytes(self, flat: torch.Tensor, root: int, what: str) -> None:
        """Overwrite the contiguous ``flat`` with that of ``root``."""
        self._run(broadcast_flat(self, flat, root, True), what)

    # What a backend adds to the transport

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


def _leave(rank: int, queue: WorkQueue, watchdog: Watchdog, end_job: Callable[[str], None]) -> None:
    """The program ends: what is on its way in the background must arrive, because other ranks may wait for it."""
    try:
        queue.finish_branches()
    except Exception as error:
        end_job(f"at the end of the program of rank {rank}: {type(error).__name__}: {error}")
    watchdog.leave()
