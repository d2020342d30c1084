"""The plan of the buckets: pure, equal on all ranks, a function of the parameters' order, shapes and dtypes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["BucketPlan", "ParameterSpec", "Piece", "Slot", "aligned", "gradient_dtype", "plan_buckets"]

# Slots start at multiples of this many bytes, so that vector loads of a gradient are aligned.
_ALIGNMENT = 64


def gradient_dtype(parameter: torch.Tensor) -> torch.dtype:
    """Dtype of a parameter's gradient: its own, unless ``parameter.grad_dtype`` (torch >= 2.10) says otherwise."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


@dataclass(frozen=True)
class ParameterSpec:
    """What the plan needs to know of a parameter."""

    index: int
    """Position among all parameters of the optimizer."""
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the gradient."""
    device: torch.device

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Slot:
    """The place of one gradient in a bucket."""

    index: int
    """The parameter's :attr:`ParameterSpec.index`."""
    offset: int
    """First element."""
    numel: int


@dataclass(frozen=True)
class Piece:
    """Elements ``start:stop`` of the flattened parameter ``index``, which ``rank`` owns."""

    rank: int
    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class BucketPlan:
    """One flat buffer, reduced as a whole: the slots, then one presence flag per slot."""

    dtype: torch.dtype
    device: torch.device
    slots: tuple[Slot, ...]
    flags_offset: int
    """Element at which the flags start."""
    names: tuple[str, ...]
    """Name of each slot's parameter."""

    @property
    def numel(self) -> int:
        """Elements of the buffer, flags included."""
        return self.flags_offset + len(self.slots)

    def describe(self, limit: int = 3) -> str:
        """Names of the first parameters, for messages."""
        more = len(self.names) - limit
        return ", ".join(self.names[:limit]) + (f" and {more} more" if more > 0 else "")


def plan_buckets(specs: Sequence[ParameterSpec], max_bytes: int) -> tuple[BucketPlan, ...]:
    """Distribute parameters over buckets.

    Buckets are filled in reverse order of the parameters, which is about the order in which backward delivers their
    gradients, one sequence of buckets for each (device, dtype). A bucket closes before it would exceed ``max_bytes``;
    a larger parameter has a bucket of its own.
    """
    plans: list[BucketPlan] = []
    open_buckets: dict[tuple[torch.device, torch.dtype], list[ParameterSpec]] = {}
    filled: dict[tuple[torch.device, torch.dtype], int] = {}
    for spec in reversed(specs):
        key = (spec.device, spec.dtype)
        size = aligned(spec.numel, spec.dtype) * spec.dtype.itemsize
        if key in open_buckets and filled[key] + size > max_bytes:
            plans.append(_plan_one(open_buckets.pop(key)))
        if key not in open_buckets:
            open_buckets[key], filled[key] = [], 0
        open_buckets[key].append(spec)
        filled[key] += size
    plans.extend(_plan_one(members) for members in open_buckets.values())
    return tuple(plans)


def _plan_one(specs: Sequence[ParameterSpec]) -> BucketPlan:
    slots = []
    offset = 0
    for spec in specs:
        slots.append(Slot(spec.index, offset, spec.numel))
        offset += aligned(spec.numel, spec.dtype)
    names = tuple(spec.name for spec in specs)
    return BucketPlan(specs[0].dtype, specs[0].device, tuple(slots), offset, names)


def aligned(numel: int, dtype: torch.dtype) -> int:
    """The next element, from ``numel``, at which a slot may start."""
    step = max(_ALIGNMENT // dtype.itemsize, 1)
    return -(-numel // step) * step
