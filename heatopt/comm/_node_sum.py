"""Sums over the ranks of a node, straight from each other's memory.

[Note: Sums in shared memory]
The bucket is cut into one slice per rank of the node. Between two barriers each rank sums its own slice over all
segments, in rank order, and writes the result into all of them; nobody else touches that slice. The first barrier
says that all gradients are there, the second that all results are. Blocks of a slice stay in cache between the
operations, so this costs about what copying the memory costs.
"""

from __future__ import annotations

import torch

__all__ = ["slice_bounds", "spread", "sum_in_first", "sum_slice"]

# Elements of a block: what is summed, divided and copied while it is in cache.
_BLOCK_BYTES = 256 * 1024
# Slices start at multiples of so many elements, so that two ranks never write to one cache line.
_SLICE_ALIGNMENT = 1024
_HALF = (torch.float16, torch.bfloat16)


def slice_bounds(numel: int, owner: int, owners: int) -> tuple[int, int]:
    """First and past-the-last element of the slice that ``owner`` sums."""
    per_owner = -(-numel // (owners * _SLICE_ALIGNMENT)) * _SLICE_ALIGNMENT
    return min(owner * per_owner, numel), min((owner + 1) * per_owner, numel)


def sum_slice(segments: list[torch.Tensor], start: int, stop: int, divisor: int) -> None:
    """Replace elements ``start:stop`` of all segments by their sum, in order, over ``divisor``, rounded once."""
    step = _BLOCK_BYTES // segments[0].element_size()
    for first in range(start, stop, step):
        parts = [segment[first : min(first + step, stop)] for segment in segments]
        total = sum_in_first(parts)
        if divisor != 1:
            total.div_(divisor)
        spread(total, parts)


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
