"""The plan of the buckets: every parameter has a place, no place is shared, and the plan depends on nothing else."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heatopt.buckets import BucketPlan, ParameterSpec, Slot, plan_buckets

CPU = torch.device("cpu")
ALIGNMENT = 64  # bytes

DTYPES = st.sampled_from(
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
)
DEVICES = st.sampled_from([CPU, torch.device("meta"), torch.device("cuda", 0), torch.device("cuda", 1)])
SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
LIMITS = st.one_of(st.integers(1, 400), st.integers(1, 2**24))


def make_spec(index: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> ParameterSpec:
    return ParameterSpec(index, f"layer{index}.weight", shape, dtype, CPU)


@st.composite
def parameters(draw: st.DrawFn) -> list[ParameterSpec]:
    """Parameters in their order; some indices are missing, as those of frozen parameters are."""
    indices = sorted(draw(st.sets(st.integers(0, 60), max_size=25)))
    return [ParameterSpec(i, f"p{i}", draw(SHAPES), draw(DTYPES), draw(DEVICES)) for i in indices]


def bytes_of(plan: BucketPlan) -> int:
    """Size of the gradients, each with what is left free after it."""
    return plan.flags_offset * plan.dtype.itemsize


@given(parameters(), LIMITS)
def test_every_parameter_has_one_slot_of_its_size(specs: list[ParameterSpec], limit: int) -> None:
    slots = [slot for plan in plan_buckets(specs, limit) for slot in plan.slots]
    assert sorted((slot.index, slot.numel) for slot in slots) == [(spec.index, math.prod(spec.shape)) for spec in specs]


@given(parameters(), LIMITS)
def test_slots_are_apart_aligned_and_before_the_flags(specs: list[ParameterSpec], limit: int) -> None:
    for plan in plan_buckets(specs, limit):
        assert plan.slots, "no bucket is empty"
        assert plan.slots[0].offset == 0
        for slot, after in pairwise(plan.slots):
            assert slot.offset + slot.numel <= after.offset
        assert plan.slots[-1].offset + plan.slots[-1].numel <= plan.flags_offset
        assert plan.numel == plan.flags_offset + len(plan.slots), "one flag for each slot"
        for slot in plan.slots:
            assert slot.offset * plan.dtype.itemsize % ALIGNMENT == 0


@given(parameters(), LIMITS)
def test_little_is_left_free(specs: list[ParameterSpec], limit: int) -> None:
    for plan in plan_buckets(specs, limit):
        used = sum(slot.numel for slot in plan.slots) * plan.dtype.itemsize
        assert bytes_of(plan) - used < ALIGNMENT * len(plan.slots)


@given(parameters(), LIMITS)
def test_bucket_is_of_one_device_and_dtype(specs: list[ParameterSpec], limit: int) -> None:
    by_index = {spec.index: spec for spec in specs}
    for plan in plan_buckets(specs, limit):
        members = [by_index[slot.index] for slot in plan.slots]
        assert {(spec.device, spec.dtype) for spec in members} == {(plan.device, plan.dtype)}
        assert plan.names == tuple(spec.name for spec in members)


@given(parameters(), LIMITS)
def test_buckets_are_filled_up_to_the_limit_and_not_beyond(specs: list[ParameterSpec], limit: int) -> None:
    last: dict[object, BucketPlan] = {}
    for plan in plan_buckets(specs, limit):
        assert bytes_of(plan) <= limit or len(plan.slots) == 1
        before = last.get((plan.device, plan.dtype))
        if before is not None:
            first_size = (plan.slots[1].offset if len(plan.slots) > 1 else plan.flags_offset) * plan.dtype.itemsize
            assert bytes_of(before) + first_size > limit, "the next parameter would have fitted"
        last[plan.device, plan.dtype] = plan


@given(parameters(), LIMITS)
def test_parameters_come_in_the_order_of_backward(specs: list[ParameterSpec], limit: int) -> None:
    """... which is the reverse of theirs, within each device and dtype."""
    for key in {(spec.device, spec.dtype) for spec in specs}:
        plans = [plan for plan in plan_buckets(specs, limit) if (plan.device, plan.dtype) == key]
        indices = [slot.index for plan in plans for slot in plan.slots]
        assert indices == sorted(indices, reverse=True)


@given(parameters(), LIMITS)
def test_plan_is_a_function_of_its_arguments(specs: list[ParameterSpec], limit: int) -> None:
    before = list(specs)
    plans = plan_buckets(specs, limit)
    assert plans == plan_buckets([dataclasses.replace(spec) for spec in specs], limit)
    assert specs == before


@given(parameters(), LIMITS)
def test_names_do_not_decide(specs: list[ParameterSpec], limit: int) -> None:
    renamed = [dataclasses.replace(spec, name=f"other{spec.index % 3}") for spec in specs]
    assert [plan.slots for plan in plan_buckets(specs, limit)] == [plan.slots for plan in plan_buckets(renamed, limit)]


def test_no_parameters_no_buckets() -> None:
    assert plan_buckets([], 100) == ()


def test_layout_of_one_bucket() -> None:
    specs = [make_spec(0, (3, 5)), make_spec(1, ()), make_spec(2, (0, 4)), make_spec(5, (17,))]
    (plan,) = plan_buckets(specs, 2**20)
    # 16 numbers of 4 bytes fill 64 bytes.
    assert plan.slots == (Slot(5, 0, 17), Slot(2, 32, 0), Slot(1, 32, 1), Slot(0, 48, 15))
    assert (plan.flags_offset, plan.numel) == (64, 68)


@pytest.mark.parametrize(("limit", "expected"), [(1, [[2], [1], [0]]), (128, [[2, 1], [0]]), (192, [[2, 1, 0]])])
def test_limit(limit: int, expected: list[list[int]]) -> None:
    plans = plan_buckets([make_spec(index, (16,)) for index in range(3)], limit)
    assert [[slot.index for slot in plan.slots] for plan in plans] == expected


def test_parameter_beyond_the_limit_has_a_bucket_of_its_own() -> None:
    plans = plan_buckets([make_spec(0, (4,)), make_spec(1, (1000,)), make_spec(2, (4,))], 256)
    assert [[slot.index for slot in plan.slots] for plan in plans] == [[2], [1], [0]]


def test_other_dtype_between_does_not_close_a_bucket() -> None:
    specs = [make_spec(0, (4,)), make_spec(1, (4,), torch.float64), make_spec(2, (4,))]
    plans = plan_buckets(specs, 2**20)
    assert {plan.dtype: [slot.index for slot in plan.slots] for plan in plans} == {
        torch.float32: [2, 0],
        torch.float64: [1],
    }


def test_numel() -> None:
    assert [make_spec(0, shape).numel for shape in ((), (3, 4), (0, 3))] == [1, 12, 0]


def test_description_names_the_first_parameters() -> None:
    (plan,) = plan_buckets([make_spec(index, (1,)) for index in range(5)], 2**20)
    assert plan.describe() == "layer4.weight, layer3.weight, layer2.weight and 2 more"
    assert plan.describe(limit=5).endswith("layer1.weight, layer0.weight")
    assert "more" not in plan.describe(limit=5)
