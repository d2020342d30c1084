"""Reductions built from byte-moving operations, so that they are exact in the same way on every backend.

[Note: Sums in rank order]
Each element is summed by one owner, in rank order, in at least single precision, and rounded once:
``round(((g0 + g1) + g2 + ...) / divisor)``. Ranks exchange slices (all-to-all), each sums its own slice, and the
results are gathered; that moves the same 2 (P - 1) / P bytes per byte as a ring. The result depends neither on the
length of the buffer nor on the position of an element in it, and all ranks receive the same bits.

With two ranks ``g0 + g1`` is the same in either order, so the backend's own sum may be used where it has the dtype.
Half types, which backends do not sum as they should, are gathered then: the same bytes, in one exchange.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heatopt.comm._transport import Transport
from heatopt.comm._work import Stage, Steps

__all__ = [
    "REDUCE_OPS",
    "REDUCIBLE",
    "broadcast_flat",
    "gather_flat",
    "gather_messages",
    "reduce_flat",
    "reduce_scatter_parts",
    "reduce_scatter_rows",
]

REDUCE_OPS = ("sum", "mean", "max", "min")

REDUCIBLE = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)

_HALF = (torch.float16, torch.bfloat16)

# Below this many bytes in total everything is gathered and summed by every rank: one latency instead of two.
_GATHER_BYTES = 16 * 1024
# Blocking reductions go in pieces whose buffers stay in cache: 2-3 times faster per byte than one piece of 50 MB.
_PIECE_BYTES = 2 * 1024 * 1024


def reduce_flat(
    comm: Transport,
    flat: torch.Tensor,
    op: str,
    divisor: float,
    blocking: bool,
    wire_dtype: torch.dtype | None = None,
) -> Steps[None]:
    """Reduce the contiguous one-dimensional tensor ``flat`` over all ranks, in place.

    ``divisor`` is what a mean divides by; it is applied before the only rounding. With ``wire_dtype`` each rank's
    values are rounded to it, summed in single precision, and the result is rounded to it: the relative error of a sum
    of P values of one sign is at most 2 u, u = 2^-8 for bfloat16 and 2^-11 for float16 (which overflows above 65504).
    """
    if flat.numel() == 0:
        return
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    if flat.dtype == torch.bool:
        # The sum of truth values is "or"; bytes 0 and 1 compare as the truth values do.
        flat, op = flat.view(torch.uint8), "min" if op == "min" else "max"
    wire = comm._to_wire(_narrowed(flat, wire_dtype))
    piece = max(_PIECE_BYTES // wire.element_size(), comm.size) if blocking else wire.numel()
    for start in range(0, wire.numel(), piece):
        part = wire[start : start + piece]
        if comm._has_native_sum(part.dtype) and op in ("sum", "mean"):
            yield comm._native_sum(part, blocking)
            _divide(part, divisor)
        elif _gathers(comm.size, part):
            yield from _reduce_by_gather(comm, part, op, divisor, blocking)
        else:
            yield from _reduce_by_owners(comm, part, op, divisor, blocking)
    if wire is not flat:
        flat.copy_(wire)


def _gathers(size: int, part: torch.Tensor) -> bool:
    """True where one exchange of everything is better than two of slices."""
    return (size == 2 and part.dtype in _HALF) or part.nbytes * size <= _GATHER_BYTES


def _narrowed(flat: torch.Tensor, wire_dtype: torch.dtype | None) -> torch.Tensor:
    if wire_dtype is None or not flat.is_floating_point() or flat.element_size() <= wire_dtype.itemsize:
        return flat
    return flat.to(wire_dtype)


def _divide(tensor: torch.Tensor, divisor: float) -> None:
    if divisor != 1:
        tensor.div_(divisor)


def _combine(parts: torch.Tensor, op: str, divisor: float) -> torch.Tensor:
    """Reduce ``parts`` (ranks x elements) over its first dimension, in rank order, rounding once."""
    dtype = parts.dtype
    total = parts[0].to(torch.float32) if dtype in _HALF else parts[0].clone()
    for part in parts[1:]:
        if op == "max":
            total = torch.maximum(total, part)
        elif op == "min":
            total = torch.minimum(total, part)
        else:
            total.add_(part)
    _divide(total, divisor)
    return total.to(dtype)


def _reduce_by_gather(comm: Transport, part: torch.Tensor, op: str, divisor: float, blocking: bool) -> Steps[None]:
    gathered = part.new_empty((comm.size, part.numel()))
    yield comm._all_gather(part, gathered, 0, blocking)
    part.copy_(_combine(gathered, op, divisor))


def _reduce_by_owners(comm: Transport, part: torch.Tensor, op: str, divisor: float, blocking: bool) -> Steps[None]:
    count = -(-part.numel() // comm.size)
    padded = part
    if count * comm.size != part.numel():
        padded = part.new_zeros(count * comm.size)
        padded[: part.numel()] = part
    received = part.new_empty((comm.size, count))
    yield comm._all_to_all(padded, received, 0, blocking)
    own = _combine(received, op, divisor)
    yield Stage.GATHER
    yield comm._all_gather(own, padded, 1, blocking)
    if padded is not part:
        part.copy_(padded[: part.numel()])


def reduce_scatter_rows(
    comm: Transport, rows: torch.Tensor, op: str, divisor: float, blocking: bool
) -> Steps[torch.Tensor]:
    """Reduce ``rows`` (size x elements, contiguous) and return this rank's row."""
    values = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
    if rows.dtype == torch.bool:
        values, op = rows.view(torch.uint8), "min" if op == "min" else "max"
    wire = comm._to_wire(values)
    received = torch.empty_like(wire)
    if wire.numel():
        yield comm._all_to_all(wire.view(-1), received, 0, blocking)
    own = _combine(received, op, divisor).to(rows.device)
    if rows.is_complex():
        return torch.view_as_complex(own.view(-1, 2))
    return own.view(torch.bool) if rows.dtype == torch.bool else own


def reduce_scatter_parts(
    comm: Transport,
    flat: torch.Tensor,
    lengths: Sequence[int],
    divisor: float,
    blocking: bool,
    wire_dtype: torch.dtype | None = None,
) -> Steps[torch.Tensor]:
    """Sum the contiguous, one-dimensional ``flat``, not complex, over all ranks, and return this rank's part of it.

    Part r, of ``lengths[r]`` elements, is sent to rank r alone. The bits are those of :func:`reduce_flat`.
    """
    wire = comm._to_wire(_narrowed(flat, wire_dtype))
    received = wire.new_empty((comm.size, lengths[comm.rank]))
    if wire.numel():
        yield comm._all_to_all_parts(wire, received, lengths, blocking)
    return _combine(received, "sum", divisor).to(flat)


def gather_flat(comm: Transport, flat: torch.Tensor, blocking: bool) -> Steps[torch.Tensor]:
    """Return ``flat`` (contiguous, the same length everywhere) of every rank, as ranks x elements."""
    wire = comm._to_wire(flat)
    gathered = wire.new_empty((comm.size, wire.numel()))
    if wire.numel():
        yield comm._all_gather(wire, gathered, 0, blocking)
    return gathered.to(flat.device)


def gather_messages(comm: Transport, message: torch.Tensor, equal: bool, blocking: bool) -> Steps[list[torch.Tensor]]:
    """Return the bytes (contiguous uint8) of every rank, in rank order.

    If they are not ``equal`` in length, the lengths travel first, and the bytes padded to the longest.
    """
    lengths = [message.numel()] * comm.size
    if not equal:
        own = comm._to_wire(torch.tensor(lengths[:1], device=message.device))
        gathered = own.new_empty((comm.size, 1))
        yield comm._all_gather(own, gathered, 0, blocking)
        lengths = gathered.view(-1).tolist()
        yield Stage.GATHER
    padded = message
    if max(lengths) > message.numel():
        padded = message.new_zeros(max(lengths))
        padded[: message.numel()] = message
    wire = comm._to_wire(padded)
    rows = wire.new_empty((comm.size, wire.numel()))
    if wire.numel():
        yield comm._all_gather(wire, rows, 0 if equal else 1, blocking)
    return [row[:length] for row, length in zip(rows.to(message.device).unbind(0), lengths, strict=True)]


def broadcast_flat(comm: Transport, flat: torch.Tensor, root: int, blocking: bool) -> Steps[None]:
    """Copy the contiguous ``flat`` of rank ``root`` to every rank, in place."""
    if flat.numel() == 0:
        return
    wire = comm._to_wire(flat)
    yield comm._broadcast(wire, root, blocking)
    if wire is not flat:
        flat.copy_(wire)
