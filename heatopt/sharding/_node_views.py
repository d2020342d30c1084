"""Pieces of parameters that the ranks of a node have in common: each is written where all read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from heatopt.comm import Communicator
from heatopt.sharding._members import Member
from heatopt.sharding._partition import Block, Piece
from heatopt.sharding._views import Views

__all__ = ["NodeViews", "slabs"]


class Home(Protocol):
    """The memory that the parameters are in, as views of it need it."""

    def begin(self, parameters: Sequence[torch.Tensor], may_move: bool) -> None: ...

    def finish(
        self, parameters: Sequence[torch.Tensor], parts: Sequence[Sequence[Sequence[torch.Tensor]]], failed: bool
    ) -> bool: ...


class NodeViews(Views):
    """All pieces of ``parameters`` in the memory of the node.

    Args:
        home: that memory.
        blocks: the partition.
        rank: this one.
        parameters: by index.
        travel_to: how many ranks there are, if some are on other nodes, to which pieces travel; 0 otherwise.
    """

    def __init__(
        self, home: Home, blocks: Sequence[Block], rank: int, parameters: Sequence[torch.Tensor], travel_to: int
    ) -> None:
        super().__init__(parameters)
        self._home = home
        self._parameters = parameters
        self._scattered: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._parts: list[list[list[torch.Tensor]]] = []
        for block in blocks:
            for piece in block.pieces:
                if piece.rank == rank:
                    self.members[piece.index] = self._member(parameters[piece.index], piece, block.cut)
            if travel_to and block.row:
                by_rank: list[list[torch.Tensor]] = [[] for _ in range(travel_to)]
                for piece in block.pieces:
                    by_rank[piece.rank] += slabs(parameters[piece.index].detach(), piece.start, piece.stop)
                self._parts.append(by_rank)

    def _member(self, parameter: torch.Tensor, piece: Piece, cut: bool) -> Member:
        if not cut:
            return Member(parameter, piece, parameter)
        if parameter.is_contiguous():
            return Member(parameter, piece, parameter.detach().view(-1)[piece.start : piece.stop])
        # Neighbouring elements are not neighbours in memory: the update changes a copy of the piece.
        flat = parameter.detach().new_empty(piece.stop - piece.start)
        self._scattered.append((flat, list(slabs(parameter.detach(), piece.start, piece.stop))))
        return Member(parameter, piece, flat)

    def refresh(self) -> None:
        for flat, places in self._scattered:
            for place, values in _side_by_side(places, flat):
                values.copy_(place)

    def begin(self) -> None:
        self._home.begin(self._parameters, False)

    def share(self, comm: Communicator) -> None:
        self.conclude(comm, False)

    def conclude(self, comm: Communicator, failed: bool) -> bool:
        for flat, places in self._scattered:
            for place, values in _side_by_side(places, flat):
                place.copy_(values)
        return self._home.finish(self._parameters, self._parts, failed)


def _side_by_side(places: Sequence[torch.Tensor], flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each of ``places`` with its part of ``flat``, which has all of them in turn."""
    for place, values in zip(places, torch.split(flat, [place.numel() for place in places]), strict=True):
        yield place, values.view(place.shape)


def slabs(tensor: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Views of ``tensor``, of whatever strides, that together are its elements ``start:stop`` in their order."""
    if start == stop:
        return
    if stop - start == tensor.numel():
        yield tensor
        return
    row = tensor.numel() // tensor.shape[0]
    first, last = -(-start // row), stop // row  # whole rows first:last
    if first > last:  # all of it lies within one row
        yield from slabs(tensor[last], start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from slabs(tensor[first - 1], start - (first - 1) * row, row)
    if first < last:
        yield tensor[first:last]
    yield from slabs(tensor[last], 0, stop - last * row) if last * row < stop else ()
