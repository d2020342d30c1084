"""The memory of a bucket, and the gradients that are views into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heatopt.buckets._layout import BucketPlan, gradient_dtype

__all__ = ["Bucket"]


class Bucket:
    """Flat memory that holds the gradients of some parameters.

    Args:
        plan: where each gradient lives.
        memory: one-dimensional, contiguous, ``plan.numel`` elements of ``plan.dtype``; owned by the bucket.
        parameters: the parameter of each slot.
    """

    def __init__(self, plan: BucketPlan, memory: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
        self.plan = plan
        self.memory = memory
        self.parameters = tuple(parameters)
        self._views = [self._new_view(position) for position in range(len(plan.slots))]
        self._addresses = [view.data_ptr() for view in self._views]
        self._flags = memory[plan.flags_offset : plan.flags_offset + len(plan.slots)]
        self._present: list[bool] = [False] * len(plan.slots)
        self._final: list[torch.Tensor | None] = [None] * len(plan.slots)
        self.changed = False
        """True if a gradient here has got a contribution that no reduction has seen."""

    def _new_view(self, position: int) -> torch.Tensor:
        slot = self.plan.slots[position]
        parameter = self.parameters[position]
        # The strides of the parameter, where they cover the memory exactly, keep optimizers on their fast path.
        strides = (
            parameter.stride()
            if _covers_its_memory(parameter)
            else torch.empty(parameter.shape, device="meta").stride()
        )
        # A tensor on the same storage, and not a view to autograd, which would forbid detach_() of a gradient.
        offset = self.memory.storage_offset() + slot.offset
        return self.memory.new_empty(0).set_(self.memory.untyped_storage(), offset, parameter.shape, strides)

    def pack(self) -> None:
        """Move all gradients into the memory, zeros where there is none, and set the flags.

        A gradient that cannot live here (sparse, or of another dtype) is left alone and counts as absent.
        """
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for position, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if (
                gradient is None
                or gradient.layout is not torch.strided
                or gradient_dtype(parameter) is not self.plan.dtype
            ):
                self._present[position] = False
                self._view(position).zero_()
                continue
            self._present[position] = True
            if gradient.data_ptr() != self._addresses[position] or gradient is not self._views[position]:
                targets.append(self._view(position))
                sources.append(gradient.detach())
            # Nothing may accumulate into memory that is on the wire; reveal() gives the gradient back.
            parameter.grad = None
        if targets:
            torch._foreach_copy_(targets, sources)
        if all(self._present):
            self._flags.fill_(1)
        else:
            self._flags.copy_(torch.tensor(self._present))

    def _view(self, position: int) -> torch.Tensor:
        view = self._views[position]
        if view.data_ptr() != self._addresses[position]:
            # Someone exchanged the view's storage (`grad.data = ...`, module conversion): make it anew.
            view = self._views[position] = self._new_view(position)
        return view

    def pack_nothing(self) -> None:
        """Contribute neither gradients nor flags: this rank has no more data."""
        self.memory.zero_()
        self._present = [False] * len(self._present)

    def reveal(self) -> None:
        """Make the memory's content the gradients: a view where any rank had a gradient, else ``None``.

        What backward delivered since :meth:`pack` is added, as a further local contribution.
        """
        flags: list[bool] | None = None
        for position, parameter in enumerate(self.parameters):
            present = self._present[position]
            if not present:
                if flags is None:
                    flags = (self._flags != 0).tolist()
                present = flags[position]
            fits = gradient_dtype(parameter) is self.plan.dtype  # else the model was converted: a new plan follows
            final = self._view(position) if present and fits else None
            self._final[position] = final
            late = parameter.grad
            if late is not None and final is not None:
                final.add_(late.detach())
            if late is None or final is not None:
                parameter.grad = final

    def has_foreign_gradients(self) -> bool:
        """True if a gradient is there that is not the result of the last reduction: set by hand, or accumulated."""
        if self.changed:
            return True
        return any(
            parameter.grad is not None and parameter.grad is not final
            for parameter, final in zip(self.parameters, self._final, strict=True)
        )


def _covers_its_memory(tensor: torch.Tensor) -> bool:
    """True if the strides are a permutation of contiguous ones."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
