"""A partition in use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from heatopt.buckets import Piece
from heatopt.comm import Communicator
from heatopt.errors import HeatoptError
from heatopt.sharding._gather import Ownership
from heatopt.sharding._partition import Block

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """A partition in use: what a copy of the optimizer must know of the states that it holds."""

    blocks: tuple[Block, ...]
    rank: int
    size: int
    dtypes: tuple[torch.dtype, ...]
    whole: frozenset[int]
    """Indices of the parameters that could be cut but for their sparse gradients."""
    decided: tuple[tuple[Piece, ...], ...] = ()
    """Pieces of the gradients, by bucket, where those are sharded too."""
    order: tuple[int, ...] = ()
    """Indices of the parameters in the order of their states; for a copy."""

    def ownership(self) -> Ownership:
        """What this rank owns."""
        pieces = {p.index: p for block in self.blocks for p in block.pieces if p.rank == self.rank}
        return Ownership(pieces, frozenset(p.index for block in self.blocks if block.cut for p in block.pieces))

    def check(self, comm: Communicator) -> None:
        """Raise HeatoptError unless the pieces belong to this rank of as many ranks."""
        if (self.rank, self.size) != (comm.rank, comm.size):
            raise HeatoptError(
                f"the copy of the optimizer holds the states of rank {self.rank} of {self.size}, but this is rank "
                f"{comm.rank} of {comm.size}; use state_dict() to move states between numbers of ranks"
            )
