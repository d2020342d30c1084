"""What ranks contribute to a collective, and what has to come out, worked out in another way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from heatopt.comm import Communicator

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
DISCRETE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (*FLOATING, *COMPLEX, *DISCRETE)
OPS_AND_DTYPES = [
    *(("sum", dtype) for dtype in DTYPES),
    *(("mean", dtype) for dtype in (*FLOATING, *COMPLEX)),
    *((op, dtype) for op in ("max", "min") for dtype in (*FLOATING, *DISCRETE)),
]

# No elements, no dimension, odd lengths, and on both sides of 16 KiB, where reductions take another way.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (2, 0, 3), (1,), (7,), (5, 3), (1031,), (3, 5001))
# In elements, by dtype: more than 2 MiB, so that blocking reductions travel in several pieces, the last one odd.
LARGE = {
    torch.bool: 2**21 + 77,
    torch.bfloat16: 2**20 + 77,
    torch.float32: 2**19 + 77,
    torch.float64: 2**19 + 77,
    torch.complex64: 2**18 + 77,
    torch.int16: 2**20 + 77,
}


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """What ``rank`` contributes; every rank can make the values of all others."""
    generator = torch.Generator().manual_seed(7919 * salt + rank)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    # Sums of these leave the range of 8 bits: they wrap around, as torch's own addition does.
    return torch.randint(0 if dtype in (torch.bool, torch.uint8) else -100, 100, shape, generator=generator).to(dtype)


def reduced(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """The sum in rank order, in at least single precision, divided and then rounded once."""
    dtype, shape = parts[0].dtype, parts[0].shape
    if dtype == torch.bool:
        stacked = torch.stack(parts)
        return stacked.all(0) if op == "min" else stacked.any(0)
    if dtype.is_complex:
        return torch.view_as_complex(reduced([torch.view_as_real(part) for part in parts], op))
    if op in ("max", "min"):
        return torch.stack(parts).amax(0) if op == "max" else torch.stack(parts).amin(0)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return (total / len(parts) if op == "mean" else total).to(dtype).view(shape)


def all_values(comm: Communicator, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> list[torch.Tensor]:
    return [values(rank, shape, dtype, salt) for rank in range(comm.size)]


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to the last bit, NaN and the sign of zero included."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    left, right = (t.detach().resolve_conj().resolve_neg().contiguous().view(-1) for t in (found, wanted))
    assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def assert_usable(comm: Communicator) -> None:
    """Traffic of this communicator is in step on all ranks."""
    assert comm.all_gather_object(("in step", comm.rank)) == [("in step", rank) for rank in range(comm.size)]
    total = comm.allreduce(torch.tensor([comm.rank + 1.0]))
    assert total.item() == comm.size * (comm.size + 1) / 2
