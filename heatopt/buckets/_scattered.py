"""Buckets of which each rank keeps its part of the result.

[Note: Scattered buckets]
A bucket has one row per rank: the pieces of the gradients that the rank owns, side by side, then one presence flag for
each parameter of the bucket. So one reduction of which every rank receives its row gives it all that it keeps, and what
it must know of the others.

The memory is lent: the next bucket uses it once the row has been copied to where this rank keeps its part. Until a
contribution is packed it is the user's ``p.grad``; from then on ``p.grad`` is None. So a gradient that a parameter has
is always one that no reduction has seen, and results of several reductions add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, repeat
from operator import attrgetter, is_not

import torch

from heatopt.buckets._bucket import GradientBucket, scale_in_place, strides_of_gradient
from heatopt.buckets._layout import BucketPlan, Piece, aligned
from heatopt.errors import HeatoptError

__all__ = ["RowPlan", "ScatteredBucket", "plan_rows"]

_GRADIENT = attrgetter("grad")


@dataclass(frozen=True)
class RowPlan:
    """Where the pieces of one bucket's gradients lie in its memory."""

    pieces: tuple[Piece, ...]
    """By rank."""
    flat: bool
    """True if they are elements of flattened parameters; False if each is a whole parameter."""
    offsets: tuple[int, ...]
    """First element of each piece."""
    flags: tuple[int, ...]
    """First presence flag of each rank's row."""
    bounds: tuple[int, ...]
    """Row r is the elements ``bounds[r]:bounds[r + 1]``."""

    @property
    def numel(self) -> int:
        """Elements of the memory."""
        return self.bounds[-1]


def plan_rows(plan: BucketPlan, pieces: Sequence[Piece], flat: bool, ranks: int) -> RowPlan:
    """Lay out the rows of ``ranks``. ``pieces`` are those of the bucket's parameters, by rank."""
    offsets: list[int] = []
    flags: list[int] = []
    bounds = [0]
    for rank in range(ranks):
        sizes = [piece.stop - piece.start for piece in pieces if piece.rank == rank]
        *starts, end = accumulate(sizes, initial=bounds[-1])
        offsets += starts
        flags.append(end)
        bounds.append(aligned(end + len(plan.slots), plan.dtype))
    return RowPlan(tuple(pieces), flat, tuple(offsets), tuple(flags), tuple(bounds))


class ScatteredBucket(GradientBucket):
    """Flat memory through which the gradients of some parameters travel to their owners.

    Args:
        plan: which gradients.
        rows: where their pieces lie.
        memory: one-dimensional, contiguous, ``rows.numel`` elements of ``plan.dtype``; lent from :meth:`pack` to
            :meth:`reveal`.
        parameters: the parameter of each slot.
        rank: this one.
    """

    def __init__(
        self, plan: BucketPlan, rows: RowPlan, memory: torch.Tensor, parameters: Sequence[torch.Tensor], rank: int
    ) -> None:
        super().__init__(plan, parameters)
        self.rows = rows
        self.present: list[bool] = [False] * len(plan.slots)
        """By slot: whether any rank has had a gradient since the last :meth:`clear`."""
        self._indices = [slot.index for slot in plan.slots]
        position_of = {index: position for position, index in enumerate(self._indices)}
        self._positions = [position_of[piece.index] for piece in rows.pieces]
        self._whole = [
            not rows.flat or p.stop - p.start == plan.slots[k].numel
            for p, k in zip(rows.pieces, self._positions, strict=True)
        ]
        self._places = [
            self._view(memory, offset, number, as_parameter=self._whole[number])
            for number, offset in enumerate(rows.offsets)
        ]
        self._all_flags = [memory[first : first + len(plan.slots)] for first in rows.flags]
        self._own_flags = self._all_flags[rank]
        self._own = [number for number, piece in enumerate(rows.pieces) if piece.rank == rank]
        self._own_indices = [rows.pieces[number].index for number in self._own]
        self._own_positions = [self._positions[number] for number in self._own]
        start = rows.bounds[rank]
        self._kept_weight = 0.0  # of the mean that is kept; 0 without weights
        self._kept_memory = memory.new_zeros(rows.flags[rank] - start)
        self._kept = [
            self._view(self._kept_memory, rows.offsets[number] - start, number, as_parameter=not rows.flat)
            for number in self._own
        ]
        row = memory[start : rows.flags[rank]]
        self._arrived = [
            self._view(row, rows.offsets[number] - start, number, as_parameter=not rows.flat) for number in self._own
        ]

    def _view(self, memory: torch.Tensor, offset: int, number: int, as_parameter: bool) -> torch.Tensor:
        """Elements of ``memory`` from ``offset``: one piece, in the shape of its parameter if that is asked for."""
        piece = self.rows.pieces[number]
        flat = memory[offset : offset + piece.stop - piece.start]
        if not as_parameter:
            return flat
        parameter = self.parameters[self._positions[number]]
        if self.rows.flat:
            return flat.view(parameter.shape)
        return flat.as_strided(parameter.shape, strides_of_gradient(parameter))

    @property
    def kept_bytes(self) -> int:
        """What this rank keeps."""
        return self._kept_memory.nbytes

    def kept(self) -> dict[int, torch.Tensor]:
        """This rank's pieces of the averages, by parameter index, where any rank had a gradient."""
        present = list(map(self.present.__getitem__, self._own_positions))
        return dict(zip(compress(self._own_indices, present), compress(self._kept, present), strict=True))

    def present_indices(self) -> Iterable[int]:
        """Indices of the parameters that are :attr:`present`."""
        return compress(self._indices, self.present)

    def nothing_kept(self) -> torch.Tensor | None:
        """An empty tensor of the gradients' kind, if there is any."""
        return self._kept_memory[:0] if any(self.present) else None

    def clear(self) -> None:
        """Forget what is kept."""
        self.present = [False] * len(self.present)
        self._kept_weight = 0.0

    def zero(self) -> None:
        """Let what is kept be zeros."""
        self._kept_weight = 0.0
        self._kept_memory.zero_()

    def adopt(self, position: int, gradient: torch.Tensor) -> None:
        """The memory may be another bucket's now: a gradient stays where it is until :meth:`pack`."""

    def consume(self) -> None:
        """Nothing can write into what is kept."""

    def is_aliased(self) -> bool:
        """Nobody else has seen what is kept."""
        return False

    def pack(self, detach: bool) -> None:
        """Move all gradients into the memory, zeros where there is none, and set the flags.

        A gradient that cannot travel here (sparse, or of another dtype) is left alone and counts as absent.

        Args:
            detach: without effect: the parameters have no gradients afterwards in any case.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        present = self._present = [g is not None and self.fits(g) for g in gradients]
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for piece, position, whole, place in zip(
            self.rows.pieces, self._positions, self._whole, self._places, strict=True
        ):
            gradient = gradients[position]
            if gradient is None or not present[position]:
                place.zero_()
                continue
            if gradient.numel() != self.plan.slots[position].numel:
                raise HeatoptError(
                    f"{self.plan.names[position]} has got data with another number of elements since it was divided "
                    "among the ranks; make a new DataParallelOptimizer for a parameter of another shape"
                )
            gradient = gradient.detach()
            targets.append(place)
            sources.append(gradient if whole else gradient.reshape(-1)[piece.start : piece.stop])
        if targets:
            torch._foreach_copy_(targets, sources)
        for parameter, had in zip(self.parameters, present, strict=True):
            if had:
                parameter.grad = None
        flags = torch.tensor(present).to(self._own_flags)
        for row in self._all_flags:
            row.copy_(flags)

    def pack_nothing(self) -> None:
        """Contribute neither gradients nor flags."""
        for place in (*self._places, *self._all_flags):
            place.zero_()
        self._present = [False] * len(self._present)

    def scale(self, factor: float) -> None:
        """Multiply the gradients that have been packed; 0 makes zeros of all values."""
        for place in self._places:
            scale_in_place(place, factor)

    def reveal(self, weight: float = 0.0) -> None:
        """Add this rank's row of the result to what it keeps.

        With weights the row is the new samples' part of the mean over all, and what is kept shrinks to the others'.
        """
        if weight and self._kept_weight not in (0.0, weight):
            scale_in_place(self._kept_memory, self._kept_weight / weight)
        self._kept_weight = weight
        flags = self._present if all(self._present) else (self._own_flags != 0).tolist()
        fresh: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        further: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for number, kept, arrived in zip(self._own, self._kept, self._arrived, strict=True):
            position = self._positions[number]
            if flags[position]:
                targets, sources = further if self.present[position] else fresh
                targets.append(kept)
                sources.append(arrived)
        if fresh[0]:
            torch._foreach_copy_(*fresh)
        if further[0]:
            torch._foreach_add_(*further)
        self.present = [had or has for had, has in zip(self.present, flags, strict=True)]

    def has_foreign_gradients(self) -> bool:
        """True if a gradient is there: no reduction has seen it."""
        return self.changed or any(map(is_not, map(_GRADIENT, self.parameters), repeat(None)))
