"""Which ranks share a node."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from heatopt.comm._settings import ranks_per_node, ranks_per_node_text
from heatopt.errors import RankMismatchError

__all__ = ["Topology"]


@dataclass(frozen=True)
class Topology:
    """The node of each rank, nodes numbered in the order of their lowest rank."""

    node_of: tuple[int, ...]
    """Node index of each rank; length = number of ranks."""

    @classmethod
    def agree(cls, exchange: Callable[[Any], list[Any]], key: Hashable) -> Topology:
        """:meth:`detect` by all ranks together, each with its own key.

        Args:
            exchange: returns what each rank has passed.
            key: of this rank's node.

        Raises:
            RankMismatchError: ranks have different values of ``HEATOPT_RANKS_PER_NODE``, and so would see different
                nodes: launchers do not hand on every variable to other machines.
        """
        keys, texts = zip(*exchange((key, ranks_per_node_text())), strict=True)
        for rank, text in enumerate(texts):
            if text != texts[0]:
                raise RankMismatchError(
                    f"environment variable HEATOPT_RANKS_PER_NODE: rank 0 has {texts[0] or 'none'!r}, rank {rank} has "
                    f"{text or 'none'!r}; set it alike on all ranks (mpirun -x HEATOPT_RANKS_PER_NODE hands it on)"
                )
        return cls.detect(keys)

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
