"""The part of the averaged gradients that this rank keeps, where they are sharded.

[Note: Sharded gradients]
With ``shard="gradients"`` a bucket is a message: packed from ``p.grad``, reduced so that each rank receives the pieces
that it owns, and emptied into what this rank keeps (see [Note: Scattered buckets]). Then another bucket uses its
memory: the next one, where nothing is gained by two, so that a rank holds its part of the gradients, one bucket, and
what backward has not handed over yet. Otherwise the next but one: one is packed while another is on its way.

``p.grad`` is a contribution that no reduction has seen, and None once one has: on every rank, for every parameter,
owned or not. Averages of several reductions add up until an update uses them; whatever comes after it starts a new sum,
cleared by ``zero_grad()`` or not, because ``module.zero_grad()`` cannot reach what is kept.

A partition belongs to a plan. Where that changes (added, unfrozen or converted parameters), and inside ``join()``,
gradients become whole on all ranks: contributions again, equal on all of them, whose mean is what they were. A copy of
the optimizer has no gradients, as the copy of a torch.nn.Parameter has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from heatopt.buckets import BucketPlan, GradientBucket, Piece, ScatteredBucket, gradient_dtype, plan_rows
from heatopt.comm import BucketMemory, Communicator

__all__ = ["Divide", "GradientShards"]

Divide = Callable[[Sequence[BucketPlan], int], Sequence[tuple[tuple[Piece, ...], bool]]]
"""Given the buckets and the number of ranks, returns the pieces of each bucket, by rank, and whether they are flat."""


class GradientShards:
    """What this rank keeps of the gradients; see [Note: Sharded gradients]. Keeps nothing where they are not sharded.

    Args:
        divide: who owns what; None if gradients are not sharded.
        in_flight: how many buckets of a kind have memory at the same time.
    """

    def __init__(self, divide: Divide | None = None, in_flight: int = 1) -> None:
        self._divide = divide
        self._in_flight = in_flight
        self._channel: Communicator | None = None
        self._buckets: list[ScatteredBucket] = []
        self._memory_bytes = 0
        self._used = False  # by an update
        self.whole = divide is None
        """True while gradients are whole on all ranks; to be changed before a new plan is made."""
        self.pieces: tuple[tuple[Piece, ...], ...] = ()
        """Those of all ranks, by bucket."""
        self.turns: list[int] = []
        """By bucket: buckets of equal number use the same memory."""

    # Plans

    def make_buckets(
        self, channel: Communicator, plans: Sequence[BucketPlan], parameters: Sequence[torch.Tensor]
    ) -> tuple[list[BucketMemory], list[GradientBucket]]:
        """The buckets of a plan, and the memory that they take turns in. Collective."""
        assert self._divide is not None
        self._channel = channel
        divided = self._divide(plans, channel.size)
        self.pieces = tuple(pieces for pieces, _ in divided)
        rows = [
            plan_rows(plan, pieces, flat, channel.size) for plan, (pieces, flat) in zip(plans, divided, strict=True)
        ]
        counts: dict[tuple[torch.dtype, torch.device], int] = {}
        users: dict[tuple[torch.dtype, torch.device, int], list[int]] = {}
        for number, plan in enumerate(plans):
            kind = (plan.dtype, plan.device)
            counts[kind] = counts.get(kind, 0) + 1
            users.setdefault((*kind, counts[kind] % self._in_flight), []).append(number)
        self.turns = [0] * len(plans)
        lent: list[BucketMemory | None] = [None] * len(plans)
        self._memory_bytes = 0
        for turn, ((dtype, device, _), numbers) in enumerate(users.items()):
            numel = max(rows[number].numel for number in numbers)
            memory = channel.allocate(numel, dtype, device)
            self._memory_bytes += memory.own.nbytes
            for number in numbers:
                self.turns[number] = turn
                lent[number] = memory.first(rows[number].numel)
        memories = [memory for memory in lent if memory is not None]
        self._buckets = [
            ScatteredBucket(plan, row, memory.own, [parameters[slot.index] for slot in plan.slots], channel.rank)
            for plan, row, memory in zip(plans, rows, memories, strict=True)
        ]
        return memories, list(self._buckets)

    @torch.no_grad()
    def make_whole(self, channel: Communicator, parameters: Sequence[torch.Tensor], share: float) -> None:
        """Before a new plan: let gradients be those of all parameters on all ranks, and keep nothing. Collective.

        What was kept is ``share`` of this rank's weight; see [Note: Weights].
        """
        if self._divide is None:
            return
        mine = self._by_start()
        what = "gathering of sharded gradients"
        for index in sorted(set().union(*channel.exchange_objects(list(mine), what))):
            parameter = parameters[index]
            parts = [part for part in channel.exchange_objects(mine.get(index), what) if part is not None]
            flat = parts[0][1].new_zeros(parameter.numel())
            for start, part in parts:
                flat[start : start + part.numel()] = part
            gradient = flat.view(parameter.shape).to(parameter.device, gradient_dtype(parameter))
            if share != 1.0:
                gradient.mul_(share)
            if parameter.grad is not None:
                gradient = gradient + parameter.grad
            parameter.grad = gradient
        self._buckets, self.pieces, self.turns = [], (), []
        self._memory_bytes = 0
        self._used = False

    def _by_start(self) -> dict[int, tuple[int, torch.Tensor]]:
        """What is kept and not used up, on the CPU, by parameter index."""
        if self._used or self._channel is None:
            return {}
        rank = self._channel.rank
        starts = {p.index: p.start for pieces in self.pieces for p in pieces if p.rank == rank}
        return {index: (starts[index], kept.detach().cpu().reshape(-1).clone()) for index, kept in self.kept().items()}

    def report(self) -> dict[str, Any]:
        """Bytes of the buckets, and of what is kept."""
        return {"bucket_bytes": self._memory_bytes + sum(bucket.kept_bytes for bucket in self._buckets)}

    # Between a reduction and an update

    def begin_round(self) -> None:
        """A reduction is about to begin: what an update has used makes room."""
        if self._used:
            self.clear(set_to_none=True)

    def consume(self) -> None:
        """An update has used what is kept, or has been given up."""
        self._used = True

    def clear(self, set_to_none: bool) -> None:
        """Do what ``zero_grad`` does to gradients. Local."""
        self._used = False
        for bucket in self._buckets:
            if set_to_none:
                bucket.clear()
            else:
                bucket.zero()

    def kept(self) -> dict[int, torch.Tensor]:
        """This rank's pieces of the averages by parameter index: flat, unless they are whole parameters'."""
        kept: dict[int, torch.Tensor] = {}
        for bucket in self._buckets:
            kept.update(bucket.kept())
        return kept

    def present(self) -> set[int]:
        """Indices of the parameters of which any rank had a gradient; equal on all ranks."""
        return set().union(*(bucket.present_indices() for bucket in self._buckets))

    def holders(self) -> list[torch.Tensor]:
        """A tensor for each piece, which has it as ``grad``; an empty one for each kind that others keep."""
        nothing = [bucket.nothing_kept() for bucket in self._buckets]
        return [_holder(piece) for piece in (*self.kept().values(), *nothing) if piece is not None]

    def gather_norms(self, norm: torch.Tensor | None) -> list[torch.Tensor]:
        """The numbers of all ranks that have one, in rank order, in their own precision. Collective."""
        if self._channel is None or self.whole:
            return [] if norm is None else [norm]
        known = [torch.float32, torch.float64]
        kind = -1 if norm is None else known.index(norm.dtype)
        bits = np.array([0.0 if norm is None else norm.item()], dtype=np.float64).view(np.int64)
        table = self._channel.exchange_words(np.array([kind, *bits], dtype=np.int64), "norm of the gradients")
        device = self._buckets[0].plan.device if self._buckets else None
        return [
            torch.tensor(row[1:].copy().view(np.float64)[0], dtype=known[row[0]], device=device)
            for row in table
            if row[0] >= 0
        ]


def _holder(gradient: torch.Tensor) -> torch.Tensor:
    holder = gradient.detach()
    holder.grad = gradient
    return holder
