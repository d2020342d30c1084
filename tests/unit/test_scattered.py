"""Scattered buckets: what is packed where, and what each rank keeps of a result."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from heatopt.buckets import ParameterSpec, Piece, RowPlan, ScatteredBucket, plan_buckets, plan_rows

CPU = torch.device("cpu")
SHAPES = ((2, 3), (), (4,))
PIECES = (Piece(0, 2, 0, 4), Piece(0, 1, 0, 1), Piece(0, 0, 0, 1), Piece(1, 0, 1, 6))


def make(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], RowPlan, list[ScatteredBucket]]:
    """The same bucket on two ranks."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    specs = [ParameterSpec(i, f"p{i}", tuple(p.shape), dtype, CPU) for i, p in enumerate(parameters)]
    (plan,) = plan_buckets(specs, 2**20)
    rows = plan_rows(plan, PIECES, True, 2)
    members = [parameters[slot.index] for slot in plan.slots]
    return parameters, rows, [ScatteredBucket(plan, rows, torch.zeros(rows.numel), members, rank) for rank in (0, 1)]


def give(parameters: list[nn.Parameter], *, without: int | None = None) -> None:
    for index, parameter in enumerate(parameters):
        gradient = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape) + 10 * index
        parameter.grad = None if index == without else gradient


def reduce(bucket: ScatteredBucket, parameters: list[nn.Parameter], without: int | None = None) -> None:
    """A reduction over one rank."""
    give(parameters, without=without)
    bucket.pack(detach=True)
    assert all(parameter.grad is None for parameter in parameters)
    bucket.reveal()


def test_rows() -> None:
    """The pieces of a rank side by side, then all flags; rows begin at multiples of 64 bytes."""
    _, rows, _ = make()
    assert rows.offsets == (0, 4, 5, 16)
    assert rows.flags == (6, 21)
    assert rows.bounds == (0, 16, 32)
    assert rows.numel == 32


def test_each_rank_keeps_its_pieces() -> None:
    parameters, _, buckets = make()
    for bucket in buckets:
        reduce(bucket, parameters)
    first, second = (bucket.kept() for bucket in buckets)
    assert {index: piece.tolist() for index, piece in first.items()} == {2: [20, 21, 22, 23], 1: [10], 0: [0]}
    assert {index: piece.tolist() for index, piece in second.items()} == {0: [1, 2, 3, 4, 5]}
    assert [bucket.kept_bytes for bucket in buckets] == [24, 20]


def test_results_add_up_until_they_are_cleared() -> None:
    parameters, _, (_, bucket) = make()
    reduce(bucket, parameters, without=0)
    assert bucket.kept() == {}
    assert bucket.present == [True, True, False]
    reduce(bucket, parameters)
    reduce(bucket, parameters, without=0)
    reduce(bucket, parameters)
    assert bucket.kept()[0].tolist() == [2, 4, 6, 8, 10]
    bucket.zero()
    assert bucket.kept()[0].tolist() == [0] * 5
    bucket.clear()
    assert bucket.kept() == {}
    assert bucket.nothing_kept() is None


def test_another_rank_has_the_gradient() -> None:
    """The flag in this rank's row tells."""
    parameters, rows, _ = make()
    memory = torch.zeros(rows.numel)
    specs = [ParameterSpec(i, f"p{i}", tuple(p.shape), torch.float32, CPU) for i, p in enumerate(parameters)]
    (plan,) = plan_buckets(specs, 2**20)
    bucket = ScatteredBucket(plan, rows, memory, [parameters[slot.index] for slot in plan.slots], 0)
    bucket.pack(detach=True)
    memory[rows.offsets[1]] = 7
    memory[rows.flags[0] + 1] = 0.5
    bucket.reveal()
    assert {index: piece.tolist() for index, piece in bucket.kept().items()} == {1: [7]}


def test_the_memory_may_hold_anything_before() -> None:
    parameters, rows, _ = make()
    give(parameters, without=1)
    specs = [ParameterSpec(i, f"p{i}", tuple(p.shape), torch.float32, CPU) for i, p in enumerate(parameters)]
    (plan,) = plan_buckets(specs, 2**20)
    memory = torch.full((rows.numel,), torch.nan)
    bucket = ScatteredBucket(plan, rows, memory, [parameters[slot.index] for slot in plan.slots], 0)
    bucket.pack(detach=False)
    assert memory[: rows.flags[0]].tolist() == [20, 21, 22, 23, 0, 0]
    assert memory[rows.flags[0] : rows.flags[0] + 3].tolist() == [1, 0, 1]
    memory.fill_(torch.nan)
    bucket.pack_nothing()
    assert torch.nan_to_num(memory).count_nonzero() == 0
    assert memory[rows.flags[1] : rows.flags[1] + 3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("flat", [True, False])
def test_gradients_of_any_strides(flat: bool) -> None:
    """Flat pieces are in the order of the elements; whole ones are laid out as their parameter is."""
    parameter = nn.Parameter(torch.zeros(3, 4).t())
    (plan,) = plan_buckets([ParameterSpec(0, "p", (4, 3), torch.float32, CPU)], 2**20)
    rows = plan_rows(plan, [Piece(0, 0, 0, 12)], flat, 1)
    bucket = ScatteredBucket(plan, rows, torch.zeros(rows.numel), [parameter], 0)
    gradient = torch.arange(12.0).view(4, 3)
    parameter.grad = gradient.clone()
    bucket.pack(detach=True)
    bucket.reveal()
    kept = bucket.kept()[0]
    assert torch.equal(kept.view(4, 3) if flat else kept, gradient)
    assert flat or kept.stride() == parameter.stride()


def test_a_gradient_that_does_not_fit_is_left_alone() -> None:
    parameters, _, (bucket, _) = make()
    give(parameters)
    parameters[0].grad = torch.zeros(2, 3).to_sparse()
    bucket.pack(detach=True)
    assert bucket.misfits() == [0]
    assert parameters[0].grad is not None
    assert bucket.has_foreign_gradients()
