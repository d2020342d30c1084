"""Who owns what: every element once, evenly, and equal on all ranks."""

from __future__ import annotations

import itertools

import pytest
import torch

from heatopt.buckets import ParameterSpec, plan_buckets
from heatopt.sharding._partition import Block, Piece, ShardSpec, divide_buckets, plan_shards

CPU = torch.device("cpu")
SIZES = [[1], [0], [0, 0, 3], [5, 0, 7, 1, 1, 1], [100_003], [7, 90_000, 0, 3, 250_000, 1], [1] * 50]


def specs(sizes: list[int], cut: bool = True) -> list[ShardSpec]:
    return [ShardSpec(i, n, torch.float32, CPU, cut, n) for i, n in enumerate(sizes)]


def owned(block: Block, rank: int) -> int:
    return sum(p.stop - p.start for p in block.pieces if p.rank == rank)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)}of{sum(sizes)}")
def test_cuts(sizes: list[int], size: int) -> None:
    (block,) = plan_shards(specs(sizes), size)
    for index, numel in enumerate(sizes):
        pieces = sorted((p.start, p.stop, p.rank) for p in block.pieces if p.index == index)
        assert pieces[0][0] == 0
        assert pieces[-1][1] == numel
        assert all(before[1] == after[0] and before[2] < after[2] for before, after in itertools.pairwise(pieces))
        assert numel == 0 or all(start < stop for start, stop, _ in pieces)
    largest = max(owned(block, rank) for rank in range(size))
    assert block.row == largest <= sum(sizes) / size * 1.01 + 1
    assert [p.rank for p in block.pieces] == sorted(p.rank for p in block.pieces)


def test_blocks_by_size_kind_and_manner() -> None:
    mixed = [
        ShardSpec(0, 10, torch.float32, CPU, True, 1),
        ShardSpec(1, 10, torch.float64, CPU, True, 1),
        ShardSpec(2, 10, torch.float32, CPU, False, 1),
        ShardSpec(3, 10, torch.float32, CPU, True, 1),
        ShardSpec(4, 10, torch.float32, CPU, True, 1),
    ]
    blocks = plan_shards(mixed, 2, block_bytes=80)
    assert [sorted({p.index for p in block.pieces}) for block in blocks] == [[0, 3], [4], [1], [2]]


def test_whole_parameters_are_balanced_by_cost() -> None:
    costs = [8, 7, 6, 5, 4]
    (block,) = plan_shards([ShardSpec(i, 1, torch.float32, CPU, False, c) for i, c in enumerate(costs)], 2)
    assert {p.index: p.rank for p in block.pieces} == {0: 0, 1: 1, 2: 1, 3: 0, 4: 0}
    assert block.row == 3


def test_many_parameters_are_planned_in_a_moment() -> None:
    blocks = plan_shards(specs([1000] * 10_000), 64)
    assert len({p.index for block in blocks for p in block.pieces}) == 10_000


def bucket_plans(sizes: list[int], max_bytes: int):
    return plan_buckets([ParameterSpec(i, f"p{i}", (n,), torch.float32, CPU) for i, n in enumerate(sizes)], max_bytes)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)}of{sum(sizes)}")
def test_each_bucket_is_cut_evenly(sizes: list[int], size: int) -> None:
    plans = bucket_plans(sizes, 4 * 1000)
    divided = divide_buckets(plans, specs(sizes), size)
    assert all(flat for _, flat in divided)
    for plan, (pieces, _) in zip(plans, divided, strict=True):
        assert {p.index for p in pieces} == {slot.index for slot in plan.slots}
        numel = sum(slot.numel for slot in plan.slots)
        assert sum(p.stop - p.start for p in pieces) == numel
        assert max(sum(p.stop - p.start for p in pieces if p.rank == r) for r in range(size)) <= numel / size * 1.01 + 1
        assert [p.rank for p in pieces] == sorted(p.rank for p in pieces)


def test_whole_parameters_are_balanced_over_all_buckets() -> None:
    sizes = [8, 7, 6, 5, 4]
    divided = divide_buckets(bucket_plans(sizes, 1), specs(sizes, cut=False), 2)
    assert [pieces for pieces, _ in divided] == [
        (Piece(rank, index, 0, sizes[index]),) for index, rank in ((4, 0), (3, 0), (2, 1), (1, 1), (0, 0))
    ]
    assert not any(flat for _, flat in divided)


def test_decided_pieces_keep_their_owners() -> None:
    """Blocks take over the pieces of gradients; the others are divided as without them."""
    decided = [(Piece(0, 3, 0, 1), Piece(1, 3, 1, 10)), (Piece(1, 1, 0, 10),)]
    kinds = [ShardSpec(i, 10, torch.float32, CPU, i != 2, 1) for i in range(4)]
    blocks = plan_shards(kinds, 2, decided=decided)
    assert [block.pieces for block in blocks] == [
        (Piece(0, 3, 0, 1), Piece(1, 1, 0, 10), Piece(1, 3, 1, 10)),
        (Piece(0, 0, 0, 5), Piece(1, 0, 5, 10)),
        (Piece(0, 2, 0, 10),),
    ]
    assert [block.row for block in blocks] == [19, 5, 10]
    assert len(plan_shards(kinds, 2, 40, decided=decided)) == 4
