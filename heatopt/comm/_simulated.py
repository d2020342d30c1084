"""Ranks as threads with a network that exists only in numbers: what a schedule costs on hundreds of ranks.

The collectives are the package's own, and so are the bits of their results; only what they cost is made up. See
[Note: Virtual network] and [Note: Virtual time].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from heatopt.comm._communicator import Communicator, Words
from heatopt.comm._shared_memory import Lane, NodeMemory
from heatopt.comm._threads import Passed, ThreadCommunicator, ThreadWorld
from heatopt.comm._topology import Topology
from heatopt.comm._virtual_network import Link, Load, Transfer, VirtualNetwork, load_of
from heatopt.comm._virtual_time import VirtualTime
from heatopt.comm._work import Request
from heatopt.errors import CollectiveTimeoutError, RankFailedError

__all__ = ["Passage", "SimulatedCommunicator", "SimulatedWorld"]


class Passage(NamedTuple):
    """One operation of a simulation; ``SimulatedWorld.trace`` lists them in the order of their ends."""

    kind: str
    """As in :class:`Event`; or "meeting", of ranks that share memory."""
    channel: str
    members: tuple[int, ...]
    start: float
    """When the last of its ranks had come, in seconds."""
    end: float
    sent: float
    """Bytes that left nodes for others."""


class SimulatedWorld(ThreadWorld):
    """Runs a function on ``size`` ranks, each with a clock of its own, over a virtual network.

    Computation takes the time that the function declares with :meth:`SimulatedCommunicator.compute`, communication what
    the network needs for the messages of the package's collectives; how long anything really takes has no influence.
    Ranks run one at a time, so that each run gives the same times, and the same numbers as :class:`ThreadWorld`.

    Args:
        size: number of ranks.
        network: latency and bandwidth.
        ranks_per_node: grouping into nodes, at least 1; default: ``HEATOPT_RANKS_PER_NODE``, or all on one.
        slow: how many times as long as others a rank computes, by rank.
        shared_memory: reduce buckets in the memory of a node, and across nodes slice by slice, as processes do.
        timeout: virtual seconds after which a waiting rank raises :class:`~heatopt.errors.CollectiveTimeoutError`.

    Raises:
        ValueError: a rank that does not exist, or a factor that is not positive.

    Example:
        >>> def train(comm):
        ...     comm.compute(0.5)
        ...     comm.allreduce(torch.ones(1_000_000))
        ...     return round(comm.now, 3)
        >>> SimulatedWorld(2, VirtualNetwork(latency=0, bandwidth=1e6), ranks_per_node=1).run(train)
        [4.5, 4.5]
    """

    def __init__(
        self,
        size: int,
        network: VirtualNetwork | None = None,
        *,
        ranks_per_node: int | None = None,
        slow: Mapping[int, float] | None = None,
        shared_memory: bool = True,
        timeout: float = 600.0,
    ) -> None:
        super().__init__(size, timeout, ranks_per_node=ranks_per_node, shared_memory=shared_memory)
        self.network = VirtualNetwork() if network is None else network
        self._slow = dict(slow or {})
        for rank, factor in self._slow.items():
            if not 0 <= rank < size or not 0 < factor < math.inf:
                raise ValueError(f"slow must map ranks (0 to {size - 1}) to factors > 0, got {rank!r}: {factor!r}")
        self._time = VirtualTime(self.network, size)

    @property
    def trace(self) -> list[Passage]:
        """The operations of the last run."""
        passages = []
        for transfer in self._time.finished:
            assert transfer.end is not None
            passages.append(
                Passage(
                    transfer.kind,
                    transfer.key[0],
                    transfer.members,
                    transfer.start,
                    transfer.end,
                    transfer.load.sent,
                )
            )
        return passages

    @property
    def seconds(self) -> float:
        """The clock of the rank that came last, after a run."""
        return max(map(self._time.clock, range(self.size)))

    def node_of(self, rank: int) -> int:
        """The node of a rank."""
        return self._topology.node_index(rank)

    # What the ring of threads asks

    def _open(self) -> None:
        super()._open()
        self._time = VirtualTime(self.network, self.size)
        self._time.open()

    def _enter(self, rank: int) -> ThreadCommunicator:
        self._time.enter(rank)
        place = _Place(rank, self._slow.get(rank, 1.0), self._time, self._gone, self.network)
        return SimulatedCommunicator(self, "world", tuple(range(self.size)), rank, self._topology, place)

    def _leave(self, rank: int, reason: str) -> None:
        super()._leave(rank, reason)
        self._time.leave(rank)


class _Place:
    """What all communicators of one rank share: its clock, and the operations that it has begun."""

    def __init__(
        self, rank: int, factor: float, time: VirtualTime, gone: Mapping[int, str], network: VirtualNetwork
    ) -> None:
        self.rank = rank
        self.time = time
        self.network = network
        self.under_way: list[_SimulatedRequest] = []
        self._factor = factor
        self._gone = gone

    @property
    def now(self) -> float:
        return self.time.clock(self.rank)

    def compute(self, seconds: float) -> None:
        """Let time pass. Where an operation is completed meanwhile the works that wait for it go on, as a pump does."""
        until = self.now + seconds * self._factor
        while self.under_way:
            self.time.pause(self.rank, [request.transfer for request in self.under_way], until)
            completed = [request for request in self.under_way if request.transfer.end is not None]
            self._go_on(completed)
            if not completed and self.now >= until:
                break
        self.time.advance(self.rank, max(0.0, until - self.now))

    def _go_on(self, completed: list[_SimulatedRequest]) -> None:
        for request in completed:
            self.forget(request)
        for request in completed:
            request.comm.progress()

    def look(self, transfer: Transfer) -> None:
        """Let all others come to this rank's time."""
        self.time.pause(self.rank, [transfer], self.now)

    def sit_out(self, request: _SimulatedRequest, timeout: float) -> None:
        """Wait for the end. Works in the background go on meanwhile."""
        begin, transfer = self.now, request.transfer
        while transfer.end is None:
            gone = [member for member in transfer.missing if member in self._gone]
            if gone:
                raise RankFailedError(f"rank {self.rank} waits for rank {gone[0]}, which {self._gone[gone[0]]}")
            if self.now >= begin + timeout or self.time.stalled:
                ranks = [m for m in transfer.members if transfer.arrivals.get(m, math.inf) > self.now]
                late = f"late: ranks {ranks}" if ranks else "the network takes longer"
                raise CollectiveTimeoutError(
                    f"rank {self.rank} waited {self.now - begin:g} s in {transfer.kind}; {late}"
                )
            others = [other for other in self.under_way if not other.comm.shares_queue(request.comm)]
            self.time.pause(self.rank, [transfer, *(other.transfer for other in others)], begin + timeout)
            self._go_on([other for other in others if other.transfer.end is not None])

    def forget(self, request: _SimulatedRequest) -> None:
        if request in self.under_way:
            self.under_way.remove(request)


class _SimulatedRequest(Request):
    def __init__(self, comm: SimulatedCommunicator, transfer: Transfer, receive: Callable[[], None]) -> None:
        self.comm = comm
        self.transfer = transfer
        self._receive: Callable[[], None] | None = receive
        comm.place.under_way.append(self)

    def done(self) -> bool:
        if self._receive is not None:
            if self.transfer.end is None:
                self.comm.place.look(self.transfer)
            if self.transfer.end is not None:
                self.wait()
        return self._receive is None

    def wait(self) -> None:
        if self._receive is not None:
            place = self.comm.place
            try:
                place.sit_out(self, self.comm.timeout)
            finally:
                place.forget(self)
            # An error leaves it as it is: whoever asks again meets the same error.
            receive, self._receive = self._receive, None
            receive()


class SimulatedCommunicator(ThreadCommunicator):
    """One rank's communicator; made by :class:`SimulatedWorld`."""

    def __init__(
        self,
        world: SimulatedWorld,
        name: str,
        members: tuple[int, ...],
        rank: int,
        topology: Topology,
        place: _Place,
    ) -> None:
        super().__init__(world, name, members, rank, topology)
        self.place = place
        self._nodes = [world.node_of(member) for member in members]
        self._meetings: dict[str, int] = {}

    @property
    def now(self) -> float:
        """This rank's clock: virtual seconds since the start."""
        return self.place.now

    def seconds(self) -> float:
        return self.place.now

    def compute(self, seconds: float) -> None:
        """Compute for ``seconds``, times the rank's factor; what is on its way goes on meanwhile.

        Raises:
            ValueError: a negative number.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds must be a number >= 0, got {seconds!r}")
        self.place.compute(seconds)

    def _request(self, key: tuple[str, int], passed: Passed, receive: Callable[[list[Any]], None]) -> Request:
        place = self.place
        transfer = place.time.arrive(
            place.rank,
            Transfer(key, self._members, passed.kind),
            passed.nbytes,
            lambda nbytes: load_of(place.network, passed.kind, self._nodes, nbytes, passed.detail),
        )
        return _SimulatedRequest(self, transfer, lambda: receive(self._collect(key)))

    def background(self, purpose: str = "background()") -> Communicator:
        twin = super().background(purpose)
        twin._queue.needs_calls = False  # a rank is one thread: virtual time drives its works, see _Place
        return twin

    def shares_queue(self, other: SimulatedCommunicator) -> bool:
        """True if each of the two first completes the other's works."""
        return self._queue is other._queue

    def node_memory(self, ranks: tuple[int, ...]) -> NodeMemory:
        return _SimulatedNodeMemory(self, ranks)

    def meet(self, ranks: tuple[int, ...], lane: Lane, reduced: int) -> Request:
        """Tell the ranks of this node, which share memory, that this one has come.

        Args:
            ranks: they, by their numbers in this group.
            lane: sequence of meetings.
            reduced: bytes of each rank's bucket that they have summed and written back.
        """
        members = tuple(self._members[rank] for rank in ranks)
        number = self._meetings[lane.name] = self._meetings.get(lane.name, 0) + 1
        memory = Link(self._nodes[self.rank], "memory")
        seconds = math.ceil(math.log2(len(members))) * self.place.network.node_latency

        def load(nbytes: int) -> Load:
            # Every byte of every bucket is read once and written once.
            return Load(seconds, {memory: 2.0 * len(members) * nbytes} if nbytes else {})

        key = (f"{self._name}/node{memory.node}/{lane.name}", number)
        transfer = self.place.time.arrive(self.place.rank, Transfer(key, members, "meeting"), reduced, load)
        return _SimulatedRequest(self, transfer, lambda: None)

    def words_of_all(self, words: Words) -> Words:
        """An exchange of integers as any other, for ranks that share memory."""
        return self._exchange_words(words)

    def _open_group(
        self, color: int, rank: int, *, name: str, topology: Topology, members: tuple[int, ...]
    ) -> Communicator:
        assert isinstance(self._world, SimulatedWorld)
        return SimulatedCommunicator(self._world, name, members, rank, topology, self.place)


class _SimulatedNodeMemory(NodeMemory):
    """Memory that is shared in truth, with meetings that take virtual time."""

    def __init__(self, comm: SimulatedCommunicator, ranks: tuple[int, ...]) -> None:
        super().__init__(comm.exchange_objects, ranks, comm.rank, comm.lose)
        self._comm = comm

    def open_flags(self, words: int) -> bool:
        return True

    def arrive(self, lane: Lane, reduced: int = 0) -> Request:
        return self._comm.meet(self._ranks, lane, reduced)

    def exchange_words(self, words: Words) -> Words:
        return self._comm.words_of_all(words)
