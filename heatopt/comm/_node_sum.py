"""Sums over the ranks of a node, straight from each other's memory.

[Note: Sums in shared memory]
The bucket is cut into one slice per rank of the node. Between two barriers each rank sums its own slice over all
segments, in rank order, and writes the result into all of them; nobody else touches that slice. The first barrier
says that all gradients are there, the second that all results are. Blocks of a slice stay in cache between the
operations, so this costs about what copying the memory costs.

Where each result has one owner, the ranks' parts take the place of the slices: each rank sums its own part and writes
it into its own segment; nobody writes the rest.
"""

from __future__ import annotations

import torch

__all__ = ["slice_bounds", "spread", "sum_in_first", "sum_slice", "sum_small", "sum_to"]

# Elements of a block: what is summed, divided and copied while it is in cache.
_BLOCK_BYTES = 256 * 1024
# Slices start at multiples of so many elements, so that two ranks never write to one cache line.
_SLICE_ALIGNMENT = 1024
_HALF = (torch.float16, torch.bfloat16)


def slice_bounds(numel: int, owner: int, owners: int) -> tuple[int, int]:
    """First and past-the-last element of the slice that ``owner`` sums."""
    per_owner = -(-numel // (owners * _SLICE_ALIGNMENT)) * _SLICE_ALIGNMENT
    return min(owner * per_owner, numel), min((owner + 1) * per_owner, numel)


def sum_slice(segments: list[torch.Tensor], start: int, stop: int, divisor: float) -> None:
    """Replace elements ``start:stop`` of all segments by their sum, in order, over ``divisor``, rounded once."""
    step = _BLOCK_BYTES // segments[0].element_size()
    for first in range(start, stop, step):
        parts = [segment[first : min(first + step, stop)] for segment in segments]
        total = sum_in_first(parts)
        if divisor != 1:
            total.div_(divisor)
        spread(total, parts)


def sum_to(target: torch.Tensor, parts: list[torch.Tensor], divisor: float) -> None:
    """Write the sum of ``parts``, in order, over ``divisor``, rounded once, to ``target``, which may be one of them.

    Nothing else is written, so the lines of the others' memory stay in their caches.
    """
    step = _BLOCK_BYTES // target.element_size()
    dtype = torch.float32 if target.dtype in _HALF else target.dtype
    scratch = target.new_empty(min(step, target.numel()), dtype=dtype)
    for first in range(0, target.numel(), step):
        place, *blocks = [part[first : first + step] for part in (target, *parts)]
        total = scratch[: place.numel()]
        if scratch.dtype == target.dtype and len(blocks) > 1:
            torch.add(blocks[0], blocks[1], out=total)
        else:
            total.copy_(blocks[0])
            total = total if len(blocks) == 1 else total.add_(blocks[1])
        for block in blocks[2:]:
            total.add_(block)
        place.copy_(total.div_(divisor) if divisor != 1 else total)


def sum_small(target: torch.Tensor, parts: list[torch.Tensor], divisor: float) -> None:
    """The same for what is in cache as a whole, and no part of ``target``: fewer operations."""
    if target.dtype in _HALF:
        target.copy_(sum_in_first(parts).div_(divisor))
        return
    total = torch.add(parts[0], parts[1], out=target)
    for part in parts[2:]:
        total.add_(part)
    if divisor != 1:
        total.div_(divisor)


def sum_in_first(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of ``parts``, in order: in the first one's memory, or for half types in single precision."""
    total = parts[0].float() if parts[0].dtype in _HALF else parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total


def spread(total: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """Overwrite all ``parts`` with ``total``."""
    for part in parts:
        if part is not total:
            part.copy_(total)
