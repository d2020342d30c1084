"""The memory of a bucket, and the gradients that are views into it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

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
        self._shown: list[bool] = [False] * len(plan.slots)  # the last reduction left a gradient
        self._versions: list[int] | None = None  # of the views, when an update had consumed them
        self._references = [self._count_references(position) for position in range(len(plan.slots))]
        self._storage_users = self._count_storage_users()
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

    def _count_references(self, position: int) -> int:
        return sys.getrefcount(self._views[position])

    def _count_storage_users(self) -> int:
        return int(torch._C._storage_Use_Count(self.memory.untyped_storage()._cdata))

    def is_aliased(self) -> bool:
        """True if somebody keeps a gradient of an earlier step, which the next contents would overwrite."""
        if self._count_storage_users() != self._storage_users:
            return True
        for position, parameter in enumerate(self.parameters):
            shown = parameter.grad is self._views[position]
            # 1 for Python's references together, 1 for the parameter; more if a graph has saved the gradient.
            view: Any = self._views[position]
            used = view._use_count() > 1 + shown
            del view  # a reference as well
            if used:
                return True
            if not shown and self._count_references(position) > self._references[position]:
                return True
        return False

    def consume(self) -> None:
        """An update has used the gradients: what is written into them from now on is new."""
        self._versions = [view._version for view in self._views]

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
        self._versions = None
        for position, parameter in enumerate(self.parameters):
            present = self._present[position]
            if not present:
                if flags is None:
                    flags = (self._flags != 0).tolist()
                present = flags[position]
            fits = gradient_dtype(parameter) is self.plan.dtype  # else the model was converted: a new plan follows
            final = self._view(position) if present and fits else None
            self._shown[position] = final is not None
            late = parameter.grad
            if late is not None and final is not None:
                final.add_(late.detach())
            if late is None or final is not None:
                parameter.grad = final

    def has_foreign_gradients(self) -> bool:
        """True if a gradient is there that is not the result of the last reduction: set by hand, or accumulated."""
        if self.changed:
            return True
        for position, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient is not self._views[position] or not self._shown[position]:
                return True
            if self._versions is not None and gradient._version != self._versions[position]:
                return True
        return False


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
