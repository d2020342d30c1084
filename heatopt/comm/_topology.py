"""Which ranks share a node: plain facts, no communication."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from heatopt.comm._settings import ranks_per_node

__all__ = ["Topology"]


@dataclass(frozen=True)
class Topology:
    """The node of each rank, nodes numbered in the order of their lowest rank."""

    node_of: tuple[int, ...]
    """Node index of each rank; length = number of ranks."""

    @classmethod
    def detect(cls, keys: Sequence[Hashable]) -> Topology:
        """The topology of a world: as :meth:`from_keys`, unless the user knows better.

        ``HEATOPT_RANKS_PER_NODE=k`` overrides the keys: ranks 0..k-1 are node 0, and so on.
        """
        override = ranks_per_node()
        return cls.from_keys(keys if override is None else [rank // override for rank in range(len(keys))])

    @classmethod
    def from_keys(cls, keys: Sequence[Hashable]) -> Topology:
        """Group ranks that have an equal key (a host name, say)."""
        index: dict[Hashable, int] = {}
        return cls(tuple(index.setdefault(key, len(index)) for key in keys))

    def of_group(self, ranks: Sequence[int]) -> Topology:
        """The topology of some of the ranks, in that order."""
        return self.from_keys([self.node_of[rank] for rank in ranks])

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return max(self.node_of) + 1

    def node_index(self, rank: int) -> int:
        """Node on which ``rank`` runs."""
        return self.node_of[rank]

    def node_size(self, rank: int) -> int:
        """Number of ranks on the node of ``rank``."""
        return self.node_of.count(self.node_of[rank])

    def node_rank(self, rank: int) -> int:
        """Position of ``rank`` among the ranks of its node."""
        return self.node_of[:rank].count(self.node_of[rank])
