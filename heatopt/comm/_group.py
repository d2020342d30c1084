"""A group of ranks: who they are, how they wait, and what they agree on before they exchange data."""

from __future__ import annotations

import hashlib
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from heatopt.comm._shared_memory import NodeMemory
from heatopt.comm._tensors import check_tensor
from heatopt.comm._topology import Topology
from heatopt.comm._transport import Transport
from heatopt.comm._watchdog import Watchdog
from heatopt.comm._work import Steps, Work, WorkQueue
from heatopt.errors import HeatoptError, RankFailedError, RankMismatchError

__all__ = ["MAX_NODE_WORDS", "RankGroup", "Words"]

T = TypeVar("T")
Words = npt.NDArray[np.int64]

# That a rank has gone is noticed at once, why arrives on the bulletin a moment later.
_NEWS_SECONDS = 2.0

MAX_NODE_WORDS = 64
"""The longest exchange of integers that goes through shared memory."""


class RankGroup(Transport):
    """What every group of ranks has, below the collectives that :class:`Communicator` offers to users."""

    can_share_memory = False
    """True if ranks of a node may reduce in each other's memory."""
    can_use_threads = False
    """True if threads may use different communicators at a time; see [Note: Works in the background]."""
    is_gone: Callable[[int], bool] | None = None
    """Asked now and then, by a rank that waits in shared memory, about the rank that it waits for."""

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
        self._closed = False
        self._interrupted = ""  # in which operation, if this rank has left one that the others go on with
        self._operations = 0  # started on this communicator, the same number on all its ranks
        self._watchdog = watchdog
        if watchdog is not None:
            watchdog.watch(self)
        self._node: NodeMemory | None = None  # where headers go if all ranks share one memory
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

    def nodes(self) -> list[tuple[int, ...]]:
        """The ranks of each node, ascending."""
        index = self._topology.node_index
        return [tuple(r for r in range(self.size) if index(r) == node) for node in range(self.num_nodes)]

    def __deepcopy__(self, memo: dict[int, Any]) -> RankGroup:
        return self  # A copy of whatever holds a communicator talks to the same ranks.

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a communicator belongs to its process and cannot be pickled; call heatopt.world() in the other one"
        )

    # Exchanges without an agreement check, for the layers above, whose plans are fingerprinted

    def exchange_words(self, words: Words, what: str) -> Words:
        """Return the 64-bit integers of every rank, as an array of ranks x words. The fastest agreement there is."""
        self._queue.drain()
        with self._waiting(what, self._enter()):
            if self._node is not None and words.size <= MAX_NODE_WORDS:
                return self._node.exchange_words(words)
            return self._exchange_words(words)

    def exchange_objects(self, obj: T, what: str = "exchange of objects") -> list[T]:
        """Return the objects of every rank."""
        self._queue.drain()
        with self._waiting(what, self._enter()):
            return self._exchange_objects(obj)

    def exchange_through(self, node: NodeMemory) -> None:
        """All ranks share one memory: short exchanges of integers go through it from now on."""
        self._node = node

    def agree_on(self, described: object, call: str) -> None:
        """Raise RankMismatchError on all ranks unless all pass the same, comparable and printable, object."""
        self._agree(f"{call} {described!r}", f"{call} with {described!r}")

    def check_root(self, root: int) -> None:
        """Raise ValueError unless ``root`` is a rank."""
        if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < self.size:
            raise ValueError(f"root must be a rank, 0 <= root < {self.size}, got {root!r}")

    # Agreement

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

    def node_memory(self, ranks: tuple[int, ...]) -> NodeMemory:
        """Memory for the ranks of this node, ascending, to share. Nothing is allocated yet."""
        return NodeMemory(self.exchange_objects, ranks, self.rank, self.lose, self.is_gone)

    def seconds(self) -> float:
        """A clock whose differences are durations."""
        return time.perf_counter()

    def lose(self, rank: int) -> NoReturn:
        """Raise RankFailedError: ``rank`` has ended, and this one waits for it."""
        raise self.failure(f"rank {self._members[rank]} has ended")

    def failure(self, reason: str) -> RankFailedError:
        """The error of a rank whose wait cannot end well, with what is known by now."""
        own = self._members[self.rank]
        if self._watchdog is None:
            return RankFailedError(f"rank {own} lost contact with the other ranks ({reason})")
        place, news = self._watchdog.place(), self._watchdog.wait_for_news(_NEWS_SECONDS)
        return RankFailedError(f"rank {own} lost contact in {place}; {news} ({reason})")

    # Waits

    def _run(self, steps: Steps[T], what: str) -> T:
        """Run a collective to its end, after the works before it."""
        self._queue.drain()
        return self._queue.run(steps, partial(self._waiting, what, self._enter()))

    def _launch(self, steps: Steps[T], what: str, pumped: bool = True) -> Work[T]:
        return self._queue.launch(steps, partial(self._waiting, what, self._enter()), pumped)

    def _enter(self) -> int:
        """An operation of this communicator starts; return its number, which is the same on all ranks.

        Raises:
            HeatoptError: the communicator has been closed, or this rank was interrupted in an operation before.
        """
        if self._interrupted:
            raise HeatoptError(
                f"rank {self.rank} was interrupted in {self._interrupted}, with which the other ranks have gone on, so "
                "it has lost step with them; let the exception end the program"
            )
        if self._closed:
            raise HeatoptError(
                f"communicator {self._name} has been closed, by close() of it or of the one that it came from; "
                "make a new one, and new optimizers on it"
            )
        self._operations += 1
        if self._watchdog is not None:
            self._watchdog.enter(self._name, self._operations)
        return self._operations

    @contextmanager
    def _waiting(self, what: str, number: int) -> Iterator[None]:
        """Surround each wait, so that a watchdog can look at it from another thread."""
        try:
            with self.in_step(what):
                self._begin_wait(what, number)
                yield
        finally:
            self._end_wait()

    @contextmanager
    def in_step(self, what: str) -> Iterator[None]:
        """Surround what all ranks do together and only all of them can leave out.

        Errors of this package meet all ranks. Any other exception, such as that of a signal's handler, is this rank's
        own: whoever catches it finds the communicator unusable, rather than the wrong partner in the next operation.
        """
        try:
            yield
        except HeatoptError:
            raise
        except BaseException:
            self._interrupted = what
            if self._watchdog is not None:
                self._watchdog.keep(self)
            raise

    def _begin_wait(self, what: str, number: int) -> None:
        if self._watchdog is not None:
            self._watchdog.begin(self._name, number, what, self._members, self.timeout)

    def _end_wait(self) -> None:
        if self._watchdog is not None:
            self._watchdog.end()

    # What a backend adds to the transport

    @abstractmethod
    def _exchange_words(self, words: Words) -> Words: ...

    @abstractmethod
    def _exchange_objects(self, obj: T) -> list[T]: ...
