"""Which rank owns which part of which parameter: a pure function, with the same result on all ranks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

__all__ = ["Block", "Piece", "ShardSpec", "plan_shards"]

_BLOCK_BYTES = 64 * 2**20
# Vectorised loops round the last elements of a tensor differently: where it costs no balance, pieces of a tensor begin
# at multiples of so many elements, so that a piece is rounded as the whole tensor is.
_GRAIN = 64
_MUCH_MORE = 200


@dataclass(frozen=True)
class ShardSpec:
    """One parameter, as the partition sees it."""

    index: int
    numel: int
    dtype: torch.dtype
    device: torch.device
    cut: bool
    """False if it must have one owner."""
    cost: int
    """Of an update, relative to that of others with one owner."""


@dataclass(frozen=True)
class Piece:
    """Elements ``start:stop`` of the flattened parameter ``index``, which ``rank`` owns."""

    rank: int
    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """Parameters whose new values travel together: one row of memory for each rank, with its pieces side by side."""

    dtype: torch.dtype
    device: torch.device
    cut: bool
    """False if each piece is a whole parameter."""
    row: int
    """Elements of a row: the most that a rank owns."""
    pieces: tuple[Piece, ...]
    """By rank; those of one rank in the order of their parameters. There is one per rank and parameter at most."""


def plan_shards(specs: Sequence[ShardSpec], ranks: int, block_bytes: int = _BLOCK_BYTES) -> list[Block]:
    """Divide parameters among ``ranks``.

    Parameters that may be cut are laid side by side, up to ``block_bytes``, and cut evenly. The others go to one rank
    each: in the order of their cost, always to the rank with the least to do.
    """
    blocks = []
    for kind in dict.fromkeys((spec.dtype, spec.device, spec.cut) for spec in specs):
        members = [spec for spec in specs if (spec.dtype, spec.device, spec.cut) == kind]
        if kind[2]:
            blocks += [_cut_evenly(part, ranks) for part in _portions(members, block_bytes)]
        else:
            blocks.append(_assign_whole(members, ranks))
    return blocks


def _portions(specs: list[ShardSpec], block_bytes: int) -> list[list[ShardSpec]]:
    portions: list[list[ShardSpec]] = []
    size = 0
    for spec in specs:
        nbytes = spec.numel * spec.dtype.itemsize
        if not portions or size + nbytes > block_bytes:
            portions.append([])
            size = 0
        portions[-1].append(spec)
        size += nbytes
    return portions


def _cut_evenly(specs: list[ShardSpec], ranks: int) -> Block:
    ends = list(accumulate(spec.numel for spec in specs))
    bounds = [_rounded(rank * ends[-1] // ranks, specs, ends, ranks) for rank in range(ranks + 1)]
    pieces = []
    for spec, end in zip(specs, ends, strict=True):
        begin = end - spec.numel
        if begin == end:  # without elements it has an owner all the same, which counts its steps
            pieces.append(Piece(min(bisect_right(bounds, begin), ranks) - 1, spec.index, 0, 0))
            continue
        for rank in range(bisect_right(bounds, begin) - 1, ranks):
            start, stop = max(bounds[rank], begin), min(bounds[rank + 1], end)
            if start < stop:
                pieces.append(Piece(rank, spec.index, start - begin, stop - begin))
            if bounds[rank + 1] >= end:
                break
    return _block(specs, pieces, ranks)


def _rounded(bound: int, specs: list[ShardSpec], ends: list[int], ranks: int) -> int:
    """``bound``, or a place near to it where a piece of its parameter should rather begin."""
    number = bisect_right(ends, bound)
    if number == len(specs) or specs[number].numel < _MUCH_MORE * _GRAIN * ranks:
        return bound
    begin = ends[number] - specs[number].numel
    return min(begin + (bound - begin + _GRAIN // 2) // _GRAIN * _GRAIN, ends[number])


def _assign_whole(specs: list[ShardSpec], ranks: int) -> Block:
    loads = [0] * ranks
    owners = {}
    for spec in sorted(specs, key=lambda spec: (-spec.cost, spec.index)):
        owner = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owner] += spec.cost
        owners[spec.index] = owner
    return _block(specs, [Piece(owners[spec.index], spec.index, 0, spec.numel) for spec in specs], ranks)


def _block(specs: list[ShardSpec], pieces: list[Piece], ranks: int) -> Block:
    owned = [0] * ranks
    for piece in pieces:
        owned[piece.rank] += piece.stop - piece.start
    ordered = tuple(sorted(pieces, key=lambda piece: piece.rank))
    return Block(specs[0].dtype, specs[0].device, specs[0].cut, max(owned), ordered)
