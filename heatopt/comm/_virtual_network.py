"""What a network that exists only in numbers does to messages: who sends how much to whom, and how links are shared.

[Note: Virtual network]
Every node has a link to a switch that is never the bottleneck, with a bandwidth for each direction, and a memory with a
bandwidth of its own. An operation of ranks is a pattern of messages (:func:`load_of`): so many rounds, each of which
costs a latency, and so many bytes over each link. It begins when the last of its ranks has come, waits for its rounds,
and then moves its bytes. Operations that move bytes over one link at the same time get equal parts of it, and an
operation is as fast as its slowest link lets it be; what it leaves of the other links stays unused.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Link", "Links", "Load", "Transfer", "VirtualNetwork", "load_of"]

# Up to so many bytes in total ranks gather by doubling what they have, above in a ring.
_DOUBLING_BYTES = 64 * 1024


class Link(NamedTuple):
    """Something that operations share."""

    node: int
    kind: str
    """"out" or "in", from or to the other nodes; or "memory"."""


@dataclass(frozen=True)
class VirtualNetwork:
    """The numbers of a network; the same for all nodes. The defaults are those of Ethernet with 1 Gbit/s.

    Args:
        latency: seconds of a message between nodes.
        bandwidth: bytes per second of a node's link, in each direction.
        node_latency: seconds of a message within a node.
        node_bandwidth: bytes per second that the memory of a node reads and writes.

    Raises:
        ValueError: a negative latency, or a bandwidth that is not positive.
    """

    latency: float = 50e-6
    bandwidth: float = 125e6
    node_latency: float = 2e-6
    node_bandwidth: float = 10e9

    def __post_init__(self) -> None:
        for name in ("latency", "node_latency"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be seconds >= 0, got {getattr(self, name)!r}")
        for name in ("bandwidth", "node_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be bytes per second > 0, got {getattr(self, name)!r}")

    def capacity(self, link: Link) -> float:
        """Bytes per second."""
        return self.node_bandwidth if link.kind == "memory" else self.bandwidth


@dataclass(frozen=True)
class Load:
    """What one operation asks of the network."""

    seconds: float
    """Before its bytes move: rounds times latency."""
    volumes: dict[Link, float]
    """Bytes over each link."""

    @property
    def sent(self) -> float:
        """Bytes that leave nodes."""
        return sum(volume for link, volume in self.volumes.items() if link.kind == "out")


def load_of(network: VirtualNetwork, kind: str, nodes: Sequence[int], nbytes: int, detail: Sequence[int] = ()) -> Load:
    """The messages of one operation of the transport.

    * ``all_to_all``, ``all_to_all_parts``: each rank sends each other one its part, in P - 1 rounds;
    * ``all_gather``: a ring, P - 1 rounds, in each of which a rank hands on to the next one; up to 64 KiB in total
      log2 P rounds, as ``words`` and ``objects``, with the same bytes;
    * ``broadcast``: a chain of nodes, in pieces so small that log2 P rounds are all that is waited for.

    Args:
        network: its numbers.
        kind: of operation.
        nodes: the node of each rank of the group.
        nbytes: what each rank passes in.
        detail: the lengths of parts, or the root of a broadcast.
    """
    size, on_node = len(nodes), Counter(nodes)
    doubling = math.ceil(math.log2(size)) if size > 1 else 0
    volumes: dict[Link, float] = defaultdict(float)

    def send(source: int, target: int, amount: float) -> None:
        if source == target:
            volumes[Link(source, "memory")] += amount
        else:
            volumes[Link(source, "out")] += amount
            volumes[Link(target, "in")] += amount

    if kind in ("all_to_all", "all_to_all_parts"):
        rounds = size - 1
        whole = sum(detail) or size
        for target, length in enumerate(detail or [1] * size):
            amount = nbytes * length / whole
            for source, count in on_node.items():
                send(source, nodes[target], amount * (count - (source == nodes[target])))
    elif kind == "broadcast":
        rounds = doubling
        root = nodes[detail[0]]
        for source, count in on_node.items():
            send(source, source, nbytes * (count - 1))
        for source, target in pairwise([root, *sorted(set(nodes) - {root})]):
            send(source, target, nbytes)
    else:
        rounds = size - 1 if kind == "all_gather" and nbytes * size > _DOUBLING_BYTES else doubling
        for rank, source in enumerate(nodes):
            send(source, nodes[(rank + 1) % size], nbytes * (size - 1))
    latency = network.latency if len(on_node) > 1 else network.node_latency
    return Load(rounds * latency, {link: volume for link, volume in volumes.items() if volume})


@dataclass(eq=False)
class Transfer:
    """One operation on its way."""

    key: tuple[str, int]
    """Its channel and its number there: unique, and the order of what happens at the same time."""
    members: tuple[int, ...]
    kind: str
    arrivals: dict[int, float] = field(default_factory=dict)
    """When each rank has come."""
    nbytes: int = 0
    """The most that a rank has passed in: objects differ in size."""
    load: Load = field(default_factory=lambda: Load(0.0, {}))
    start: float = math.nan
    end: float | None = None
    """When it was completed; None: not yet."""
    left: float = 1.0
    """Part of the bytes that has not moved."""
    rate: float = 0.0
    """Parts per second, now."""

    @property
    def missing(self) -> list[int]:
        """Ranks that have not come."""
        return [member for member in self.members if member not in self.arrivals]


class Links:
    """Who moves bytes now, and until when. Time only goes forward."""

    def __init__(self, network: VirtualNetwork) -> None:
        self._network = network
        self._moving: list[Transfer] = []
        self._time = 0.0  # at which `left` and `rate` hold

    def next_end(self) -> float:
        """When the next transfer is completed if none begins before; infinity without any."""
        return min(map(self._end_of, self._moving), default=math.inf)

    def begin(self, transfer: Transfer, time: float) -> None:
        """``transfer``, which has bytes to move, begins."""
        self._go_to(time)
        self._moving.append(transfer)
        self._share()

    def complete(self) -> list[Transfer]:
        """Go to :meth:`next_end` and return what is completed then, ordered by key."""
        time = self.next_end()
        ended = [transfer for transfer in self._moving if self._end_of(transfer) <= time]
        self._go_to(time)
        self._moving = [transfer for transfer in self._moving if transfer not in ended]
        self._share()
        return sorted(ended, key=lambda transfer: transfer.key)

    def _end_of(self, transfer: Transfer) -> float:
        return self._time + transfer.left / transfer.rate

    def _go_to(self, time: float) -> None:
        for transfer in self._moving:
            transfer.left = max(0.0, transfer.left - transfer.rate * (time - self._time))
        self._time = time

    def _share(self) -> None:
        users = Counter(link for transfer in self._moving for link in transfer.load.volumes)
        for transfer in self._moving:
            transfer.rate = min(
                self._network.capacity(link) / users[link] / volume for link, volume in transfer.load.volumes.items()
            )
