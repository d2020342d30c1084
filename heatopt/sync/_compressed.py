"""A bucket whose gradients travel as indices and values.

[Note: Messages]
One message per bucket and rank: a presence flag (one byte) of each parameter, then the indices within their parameter
(int32 where that is enough) of all parameters one after the other, then the values. Where the policy tells beforehand
how many there are, that is all, and every rank's message is as long: one exchange. Otherwise the counts (int64) follow
the flags, the lengths of the messages travel first, and the messages are padded to the longest.

Every rank receives the messages of all ranks and adds them up in the order of an exact reduction: rank by rank, or with
shared memory on several nodes node by node, half types in single precision, divided and rounded once. So all ranks have
the same bits, and if everything is sent they are those of the exact reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch

from heatopt.buckets import Bucket
from heatopt.comm import Communicator, ReduceOptions, Work
from heatopt.sync._compression import Compression
from heatopt.sync._residuals import Residuals, residual_dtype

__all__ = ["CompressedReduction"]

_INT32_MAX = 2**31 - 1


class _Selection(NamedTuple):
    """What one rank sends of one bucket."""

    present: list[bool]
    counts: list[int]
    indices: torch.Tensor
    values: torch.Tensor


class CompressedReduction:
    """One reduction of one bucket, from its launch to :meth:`wait`. Owns the message and what it leaves unsent.

    Args:
        bucket: has been packed; its memory holds the mean after :meth:`wait`.
        policy: what is sent.
        residuals: of this rank; changed by :meth:`wait`.
        channel: the ranks.
        contributes: False if this rank takes part with nothing, and keeps its residuals.
    """

    def __init__(
        self, bucket: Bucket, policy: Compression, residuals: Residuals, channel: Communicator, contributes: bool
    ) -> None:
        self._bucket = bucket
        self._policy = policy
        self._residuals = residuals
        self._channel = channel
        self._contributes = contributes
        self._feeds_back = contributes and policy.error_feedback
        self._left: dict[int, torch.Tensor | None] = {}  # the next residuals, by position in the bucket
        self._work: Work[list[torch.Tensor]] | None = None
        slots = bucket.plan.slots
        largest = max((slot.numel for slot in slots), default=0)
        self._index_dtype = torch.int32 if largest <= _INT32_MAX else torch.int64
        counts = [policy.count(slot.numel) for slot in slots]
        self._counts: list[int] | None = None if None in counts else [count or 0 for count in counts]

    def launch(self, options: ReduceOptions, by_node: bool, what: str) -> bool:
        """Send this rank's part.

        Args:
            options: of the exact reduction.
            by_node: that reduction sums over each node first.
            what: names the reduction in messages.

        Returns:
            True if the bucket holds the mean already, False if it does after :meth:`wait`.
        """
        self._divisor = options.divisor
        nodes = self._channel.nodes() if by_node and not options.reproducible else []
        self._groups: Sequence[Sequence[int]] = nodes or [range(self._channel.size)]
        # The unit of a residual; see [Note: Compression].
        message = self._message(self._select(options.divisor / self._channel.size))
        self._residuals.sent_bytes += message.numel()
        equal = self._counts is not None
        if options.blocking:
            self._take(self._channel.gather_messages(message, equal, what))
        else:
            self._work = self._channel.gather_messages_async(message, equal, what)
        return options.blocking

    def wait(self) -> None:
        """Let the bucket hold the mean."""
        assert self._work is not None
        self._take(self._work.wait())

    # This rank's part

    def _select(self, unit: float) -> _Selection:
        chosen = [self._choose(position, flat, unit) for position, flat in enumerate(self._bucket.flat_values())]
        counts = [indices.numel() for indices, _ in chosen]
        nothing = self._bucket.memory[:0]
        indices = torch.cat([nothing.to(self._index_dtype), *(i.to(self._index_dtype) for i, _ in chosen)])
        return _Selection(
            self._bucket.present, counts, indices, torch.cat([nothing, *(values for _, values in chosen)])
        )

    def _choose(self, position: int, flat: torch.Tensor, unit: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What is sent of one parameter; notes what is left."""
        index = self._bucket.plan.slots[position].index
        wide = residual_dtype(flat.dtype)
        before = self._residuals.current(index) if self._feeds_back else None
        total = flat.to(wide)
        if before is not None:
            before = before.to(flat.device, wide)
            total = (before if unit == 1.0 else before * unit) + total
        indices, values = self._policy.compress(total)
        self._check(indices, values, total)
        sent = values.to(flat.dtype)
        if self._feeds_back and bool(total.isfinite().all()):
            rest = total.clone() if total.dtype is flat.dtype and before is None else total
            rest[indices] -= sent.to(wide)
            # None rather than zeros, to which a gradient of -0 would be added.
            self._left[position] = rest / unit if rest.count_nonzero() else None
        return indices, sent

    def _check(self, indices: torch.Tensor, values: torch.Tensor, total: torch.Tensor) -> None:
        """Refuse what would make messages that other ranks cannot read."""
        allowed = self._policy.count(total.numel())
        fits = indices.dtype is torch.int64 and values.dtype is total.dtype and indices.dim() == values.dim() == 1
        if not fits or indices.numel() != values.numel() or allowed not in (None, indices.numel()):
            raise ValueError(
                f"{self._policy!r}.compress() must return indices (int64) and as many values ({total.dtype}), both "
                f"one-dimensional, {'any number' if allowed is None else allowed} of {total.numel()}; it returned "
                f"{indices.dtype} of shape {tuple(indices.shape)} and {values.dtype} of shape {tuple(values.shape)}"
            )

    # Messages

    def _message(self, own: _Selection) -> torch.Tensor:
        device = own.values.device
        parts = [torch.tensor(own.present, dtype=torch.uint8, device=device)]
        if self._counts is None:
            parts.append(torch.tensor(own.counts, dtype=torch.int64, device=device))
        values = torch.view_as_real(own.values).view(-1) if own.values.is_complex() else own.values
        return torch.cat([part.view(torch.uint8) for part in (*parts, own.indices, values)])

    def _read(self, message: torch.Tensor) -> _Selection:
        slots = self._bucket.plan.slots
        present = message[: len(slots)].tolist()
        start, counts = len(slots), self._counts
        if counts is None:
            counts = _viewed(message, start, len(slots), torch.int64).tolist()
            start += 8 * len(slots)
        count, dtype = sum(counts), self._bucket.plan.dtype
        indices = _viewed(message, start, count, self._index_dtype)
        start += count * self._index_dtype.itemsize
        return _Selection(list(map(bool, present)), counts, indices, _viewed(message, start, count, dtype))

    # All ranks' parts

    def _take(self, messages: Sequence[torch.Tensor]) -> None:
        parts = [self._read(message) for message in messages]
        total = self._sum([(self._positions(part), part.values) for part in parts])
        (torch.view_as_real(total) if total.is_complex() else total).div_(self._divisor)
        present = list(map(any, zip(*(part.present for part in parts), strict=True)))
        self._bucket.put(total, present)
        for position, slot in enumerate(self._bucket.plan.slots):
            if present[position]:  # otherwise there is no average, so nothing has been used
                self._residuals.note_reduced(slot.index)
                if position in self._left:
                    averages = bool(total[slot.offset : slot.offset + slot.numel].count_nonzero())
                    self._residuals.leave(slot.index, self._left[position], averages)

    def _positions(self, part: _Selection) -> torch.Tensor:
        """Where the values belong, among those of the whole bucket."""
        offsets = torch.tensor([slot.offset for slot in self._bucket.plan.slots])
        repeats = torch.tensor(part.counts, dtype=torch.int64)
        return part.indices.long() + torch.repeat_interleave(offsets, repeats).to(part.indices.device)

    def _sum(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        return reduce(torch.Tensor.add_, (self._sum_group([parts[rank] for rank in group]) for group in self._groups))

    def _sum_group(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        plan = self._bucket.plan
        total = torch.zeros(plan.flags_offset, dtype=residual_dtype(plan.dtype), device=plan.device)
        for number, (positions, values) in enumerate(parts):
            if number:
                total.index_add_(0, positions, values.to(total.dtype))
            else:
                total[positions] = values.to(total.dtype)  # a sum with 0 would lose the sign of -0
        return total


def _viewed(message: torch.Tensor, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """``count`` elements of the bytes from ``start`` on, in memory of their own, which is aligned."""
    found = message[start : start + count * dtype.itemsize].clone()
    return torch.view_as_complex(found.view(dtype.to_real()).view(-1, 2)) if dtype.is_complex else found.view(dtype)
