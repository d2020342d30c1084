"""Who averages with whom.

[Note: Replicas]
A replica is one copy of the model that is trained as a whole: a rank alone, or the ranks of a group (a node, say) that
average their gradients at each update, so that they hold equal parameters. Replicas meet through delegates: one rank of
each. The role rotates from average to average, which spreads the load over the links of a node; group i consists of the
i-th rank of each replica, counted around where a replica has fewer. So every replica takes part in each average,
whatever its number of ranks; one with more ranks counts for more, as its ranks do in exact data-parallel training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from heatopt.comm import Communicator
from heatopt.local._packing import Packed

__all__ = ["Replicas"]


class Replicas:
    """The replicas among the ranks of ``comm``. Construction is collective.

    Args:
        comm: all ranks.
        within: the ranks of this rank's replica, or None: this rank alone.
    """

    def __init__(self, comm: Communicator, within: Communicator | None) -> None:
        self.within = within if within is not None and within.size > 1 else None
        own = [comm.rank] if self.within is None else self.within.exchange_objects(comm.rank)
        members = sorted({tuple(found) for found in comm.exchange_objects(own, "the ranks of each replica")}, key=min)
        self.count = len(members)
        """Number of replicas."""
        self._own, self._size = own, comm.size
        longest = max(map(len, members))
        self._equal = longest * self.count == comm.size
        # A replica that is alone averages with nobody.
        self._groups: list[Communicator | None] = [comm if self.count > 1 else None]
        self._backgrounds: dict[int, Communicator] = {}
        if longest > 1 and self.count > 1:
            self._groups = []
            for turn in range(longest):
                delegates = [found[turn % len(found)] for found in members]
                chosen = comm.rank in delegates
                group = comm.split(0 if chosen else None, delegates.index(comm.rank) if chosen else 0)
                self._groups.append(group if chosen else None)

    def group(self, turn: int) -> Communicator | None:
        """The delegates of average number ``turn``, if this rank is one of them."""
        return self._groups[turn % len(self._groups)]

    def background(self, turn: int) -> Communicator | None:
        """The same ranks, for an average that is to travel while training goes on. Collective among them."""
        group = self.group(turn)
        number = turn % len(self._groups)
        if group is not None and number not in self._backgrounds:
            self._backgrounds[number] = group.background("the first delayed average")
        return self._backgrounds.get(number)

    def spread(self, packed: Packed, turn: int) -> None:
        """Give what the delegate of ``turn`` has to its replica. Collective in the replica."""
        if self.within is None:
            return
        root = turn % len(self._groups) % self.within.size
        for chunk in packed.chunks:
            self.within.broadcast_bytes(chunk, root, f"average number {turn} within the node")

    def weight(self, shares: Sequence[float] | None) -> float | None:
        """How much this replica counts in a mean, on average 1; None: all count alike.

        Args:
            shares: of all ranks, on average 1; None: equal ones.
        """
        if shares is None:
            return None if self._equal else len(self._own) * self.count / self._size
        return math.fsum(shares[rank] for rank in self._own) * self.count / self._size
