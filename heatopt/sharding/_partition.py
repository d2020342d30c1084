"""Which rank owns which part of which parameter: a pure function, with the same result on all ranks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import accumulate

import torch

from heatopt.buckets import BucketPlan, Piece

__all__ = ["Block", "Piece", "ShardSpec", "divide_buckets", "plan_shards"]

_BLOCK_BYTES = 16 * 2**20
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


def plan_shards(
    specs: Sequence[ShardSpec],
    ranks: int,
    block_bytes: int = _BLOCK_BYTES,
    *,
    decided: Sequence[Sequence[Piece]] = (),
) -> list[Block]:
    """Divide parameters among ``ranks``.

    Parameters that may be cut are laid side by side, up to ``block_bytes``, and cut evenly. The others go to one rank
    each: in the order of their cost, always to the rank with the least to do. Pieces of some parameters may be
    ``decided`` already, those of the gradients in a bucket together: they keep their owners.
    """
    pieces_of: dict[int, list[Piece]] = {}
    for piece in (piece for pieces in decided for piece in pieces):
        pieces_of.setdefault(piece.index, []).append(piece)
    blocks = []
    for kind in dict.fromkeys((spec.dtype, spec.device, spec.cut) for spec in specs):
        members = [spec for spec in specs if (spec.dtype, spec.device, spec.cut) == kind]
        known = [spec for spec in members if spec.index in pieces_of]
        others = [spec for spec in members if spec.index not in pieces_of]
        for part in _portions(known, block_bytes if kind[2] else None):
            blocks.append(_block(part, [piece for spec in part for piece in pieces_of[spec.index]], ranks))
        if kind[2]:
            blocks += [_cut_evenly(part, ranks) for part in _portions(others, block_bytes)]
        elif others:
            blocks.append(_assign_whole(others, ranks))
    return blocks


def divide_buckets(
    plans: Sequence[BucketPlan], specs: Sequence[ShardSpec], ranks: int
) -> list[tuple[tuple[Piece, ...], bool]]:
    """The pieces of each bucket's parameters, by rank, and whether they may be cut, all of them or none.

    Each bucket by itself is cut evenly, so all ranks receive as much of it; whole parameters are balanced over all
    buckets, so that their updates are.
    """
    spec_of = {spec.index: spec for spec in specs}
    planned = [spec_of[slot.index] for plan in plans for slot in plan.slots]
    owner_of = _owners([spec for spec in planned if not spec.cut], ranks)
    divided = []
    for plan in plans:
        members = [spec_of[slot.index] for slot in plan.slots]
        cut = all(spec.cut for spec in members)
        if cut:
            divided.append((_cut_evenly(members, ranks).pieces, True))
        else:
            whole = [Piece(owner_of[spec.index], spec.index, 0, spec.numel) for spec in members]
            divided.append((_by_rank(whole), False))
    return divided


def _portions(specs: list[ShardSpec], block_bytes: int | None) -> list[list[ShardSpec]]:
    portions: list[list[ShardSpec]] = []
    size = 0
    for spec in specs:
        nbytes = spec.numel * spec.dtype.itemsize
        if not portions or (block_bytes is not None and size + nbytes > block_bytes):
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
    owners = _owners(specs, ranks)
    return _block(specs, [Piece(owners[spec.index], spec.index, 0, spec.numel) for spec in specs], ranks)


def _owners(specs: list[ShardSpec], ranks: int) -> dict[int, int]:
    """Which rank updates which whole parameter."""
    loads = [(0, rank) for rank in range(ranks)]  # a heap
    owners = {}
    for spec in sorted(specs, key=lambda spec: (-spec.cost, spec.index)):
        load, owner = loads[0]
        heapreplace(loads, (load + spec.cost, owner))
        owners[spec.index] = owner
    return owners


def _by_rank(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    return tuple(sorted(pieces, key=lambda piece: piece.rank))


def _block(specs: list[ShardSpec], pieces: list[Piece], ranks: int) -> Block:
    owned = [0] * ranks
    for piece in pieces:
        owned[piece.rank] += piece.stop - piece.start
    return Block(specs[0].dtype, specs[0].device, specs[0].cut, max(owned), _by_rank(pieces))
