"""The memory of a bucket, and the gradients that are views into it."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from operator import attrgetter, is_

import torch

from heatopt.buckets._layout import BucketPlan, gradient_dtype

__all__ = [
    "SMALL_BYTES",
    "Bucket",
    "GradientBucket",
    "covers_its_memory",
    "find_overlaps",
    "scale_in_place",
    "strides_of_gradient",
]

SMALL_BYTES = 256 * 1024
"""Gradients below this are moved many at once, which is cheaper than a call for each."""

_address: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr
_use_count: Callable[[torch.Tensor], int] = torch.Tensor._use_count  # type: ignore[attr-defined]
# A bucket may hold hundreds of small gradients. What is asked of all of them in each step is asked by loops that are
# not Python's, and Python's loops are for the rare cases.
_GRADIENT, _KIND = attrgetter("grad"), attrgetter("dtype", "layout", "device")
_VERSION, _REQUIRES_GRAD = attrgetter("_version"), attrgetter("requires_grad")


class GradientBucket(ABC):
    """The gradients of some parameters, which are reduced together.

    Args:
        plan: which ones.
        parameters: the parameter of each slot.
    """

    def __init__(self, plan: BucketPlan, parameters: Sequence[torch.Tensor]) -> None:
        self.plan = plan
        self.parameters = tuple(parameters)
        self._present: list[bool] = [False] * len(plan.slots)
        self.changed = False
        """True if a gradient here has got a contribution that no reduction has seen."""

    def fits(self, gradient: torch.Tensor) -> bool:
        """True if ``gradient`` can live here: it is neither sparse nor of a model that has been converted since."""
        plan = self.plan
        return gradient.dtype is plan.dtype and gradient.layout is torch.strided and gradient.device == plan.device

    def misfits(self) -> list[int]:
        """Indices of the parameters whose gradients :meth:`pack` had to leave alone."""
        if all(self._present):
            return []
        rows = zip(self.plan.slots, self.parameters, self._present, strict=True)
        return [slot.index for slot, p, present in rows if not present and p.grad is not None]

    @abstractmethod
    def is_aliased(self) -> bool:
        """True if somebody keeps a gradient of an earlier step, which the next contents would overwrite."""

    @abstractmethod
    def adopt(self, position: int, gradient: torch.Tensor) -> None:
        """Move a large gradient into the memory while it is in cache, where that is possible."""

    @abstractmethod
    def consume(self) -> None:
        """An update has used the gradients: what is written into them from now on is new."""

    @abstractmethod
    def pack(self, detach: bool) -> None:
        """Move all gradients into the memory, zeros where there is none, and set the flags.

        Args:
            detach: the parameters have no gradients until :meth:`reveal`.
        """

    @abstractmethod
    def pack_nothing(self) -> None:
        """Contribute neither gradients nor flags: this rank has no more data."""

    @abstractmethod
    def scale(self, factor: float) -> None:
        """Multiply the gradients that have been packed; 0 makes zeros of all values."""

    @abstractmethod
    def reveal(self, weight: float = 0.0) -> None:
        """Take over what the reduction has left in the memory.

        Args:
            weight: that of the mean which the reduction has formed; 0 without weights.
        """

    @abstractmethod
    def has_foreign_gradients(self) -> bool:
        """True if a gradient is there that is not the result of the last reduction: set by hand, or accumulated."""


class Bucket(GradientBucket):
    """Flat memory that holds the gradients of some parameters.

    Args:
        plan: where each gradient lives.
        memory: one-dimensional, contiguous, ``plan.numel`` elements of ``plan.dtype``; owned by the bucket.
        parameters: the parameter of each slot.
    """

    def __init__(self, plan: BucketPlan, memory: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__(plan, parameters)
        self.memory = memory
        self._views = [self._new_view(position) for position in range(len(plan.slots))]
        self._addresses = [view.data_ptr() for view in self._views]
        self._flags = memory[plan.flags_offset : plan.flags_offset + len(plan.slots)]
        self._shown: list[bool] = [False] * len(plan.slots)  # the last reduction left a gradient
        self._versions: list[int] | None = None  # of the views, when an update had consumed them
        self._adoptable = [slot.numel * plan.dtype.itemsize >= SMALL_BYTES for slot in plan.slots]
        # How often each view is referred to while nobody but the bucket does, counted in either of two ways.
        self._references = list(map(sys.getrefcount, self._views))
        self._own_references = list(map(self._count_references, range(len(plan.slots))))
        self._uses = [1] * len(plan.slots)  # Python's references together count as one
        self._uses_shown = [2] * len(plan.slots)  # and the parameter's as another one
        self._storage_users = self._count_storage_users()

    def _new_view(self, position: int) -> torch.Tensor:
        slot = self.plan.slots[position]
        parameter = self.parameters[position]
        strides = strides_of_gradient(parameter)
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
        uses = list(map(_use_count, self._views))
        if uses == self._uses and list(map(sys.getrefcount, self._views)) == self._references:
            return False  # nobody at all
        if uses == self._uses_shown and all(map(is_, map(_GRADIENT, self.parameters), self._views)):
            return False  # the parameters alone
        return any(map(self._is_slot_aliased, range(len(uses)), uses))

    def _is_slot_aliased(self, position: int, uses: int) -> bool:
        shown = self.parameters[position].grad is self._views[position]
        # A parameter that has the view counts once; more if a graph has saved it.
        return uses > 1 + shown or (not shown and self._count_references(position) > self._own_references[position])

    def adopt(self, position: int, gradient: torch.Tensor) -> None:
        """Move a large gradient into the memory while it is in cache, and free what autograd made for it.

        The gradient stays what it was, for hooks that run later. Small ones wait for :meth:`pack`, which takes many at
        once.
        """
        if not self._adoptable[position] or gradient is self._views[position] or gradient.requires_grad:
            return
        self._view(position)
        if self._count_storage_users() != self._storage_users or self._is_slot_aliased(
            position, _use_count(self._views[position])
        ):
            return
        view = self._views[position]
        view.copy_(gradient)
        self.parameters[position].grad = view
        self.changed = True

    def consume(self) -> None:
        """An update has used the gradients: what is written into them from now on is new."""
        self._versions = list(map(_VERSION, self._views))

    def pack(self, detach: bool) -> None:
        """Move all gradients into the memory, zeros where there is none, and set the flags.

        A gradient that cannot live here (sparse, or of another dtype) is left alone and counts as absent.

        Args:
            detach: the parameters have no gradients until :meth:`reveal`: backward goes on, and nothing may accumulate
                into memory that is on the wire.
        """
        gradients = list(map(_GRADIENT, self.parameters))
        if list(map(_address, self._views)) != self._addresses:
            # Someone exchanged a view's storage (`grad.data = ...`, module conversion): make it anew.
            for position in range(len(self._views)):
                self._view(position)
        in_place = all(map(is_, gradients, self._views))  # backward has accumulated into the memory
        if in_place or self._are_new(gradients):
            self._present = [True] * len(gradients)
            self._flags.fill_(1)
            if not in_place:
                torch._foreach_copy_(self._views, gradients)
            if detach or not in_place:
                for parameter, view in zip(self.parameters, self._views, strict=True):
                    parameter.grad = None if detach else view
            return
        present = self._present = [g is not None and self.fits(g) for g in gradients]
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for parameter, view, gradient, fits in zip(self.parameters, self._views, gradients, present, strict=True):
            if gradient is None or not fits:
                view.zero_()
                continue
            if gradient is not view:
                targets.append(view)
                sources.append(gradient.detach() if gradient.requires_grad else gradient)
            if detach:
                parameter.grad = None
            elif gradient is not view:
                parameter.grad = view
        if targets:
            torch._foreach_copy_(targets, sources)
        if all(present):
            self._flags.fill_(1)
        else:
            self._flags.copy_(torch.tensor(present))

    def _are_new(self, gradients: Sequence[torch.Tensor | None]) -> bool:
        """True if all gradients are there, can live here, and do not yet: in most steps of most models."""
        plan = self.plan
        try:
            return (
                set(map(_KIND, gradients)) == {(plan.dtype, torch.strided, plan.device)}
                and True not in map(is_, gradients, self._views)
                and True not in map(_REQUIRES_GRAD, gradients)
            )
        except AttributeError:  # one is missing
            return False

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

    def scale(self, factor: float) -> None:
        """Multiply the gradients that have been packed; 0 makes zeros of all values."""
        scale_in_place(self.memory[: self.plan.flags_offset], factor)

    @property
    def present(self) -> list[bool]:
        """Which gradients :meth:`pack` has found."""
        return self._present

    def flat_values(self) -> list[torch.Tensor]:
        """What has been packed of each parameter, in the order of its indices; views where the memory has that."""
        return [view.reshape(-1) for view in self._views]

    def put(self, values: torch.Tensor, present: Sequence[bool]) -> None:
        """Fill the memory with the result of a reduction.

        Args:
            values: those of each parameter from its slot's offset on, in the order of its indices.
            present: whether any rank had a gradient.
        """
        self.memory[: self.plan.flags_offset] = values
        for slot, view in zip(self.plan.slots, self._views, strict=True):
            if not view.is_contiguous():
                view.copy_(values[slot.offset : slot.offset + slot.numel].view(view.shape))
        self._flags.copy_(torch.tensor(present))

    def reveal(self, weight: float = 0.0) -> None:
        """Make the memory's content the gradients: a view where any rank had a gradient, else ``None``.

        What backward delivered since :meth:`pack` is added, as a further local contribution.
        """
        flags = self._present if all(self._present) else (self._flags != 0).tolist()
        self._versions = None
        if all(flags) and self._are_views():
            self._shown = [True] * len(flags)  # nothing was detached
            return
        for position, parameter in enumerate(self.parameters):
            late = parameter.grad
            view = self._views[position]
            if late is view and flags[position]:  # it was not detached
                self._shown[position] = True
                continue
            # Of another dtype: the model was converted, and a new plan follows.
            final = self._view(position) if flags[position] and gradient_dtype(parameter) is self.plan.dtype else None
            self._shown[position] = final is not None
            if late is not None and final is not None:
                final.add_(late.detach())
            if late is None or final is not None:
                parameter.grad = final

    def _are_views(self) -> bool:
        """True if every parameter's gradient is what lives here."""
        return all(map(is_, map(_GRADIENT, self.parameters), self._views))

    def has_foreign_gradients(self) -> bool:
        """True if a gradient is there that is not the result of the last reduction: set by hand, or accumulated."""
        if self.changed:
            return True
        if all(self._shown) and self._are_views():
            return self._versions is not None and list(map(_VERSION, self._views)) != self._versions
        for position, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient is not self._views[position] or not self._shown[position]:
                return True
            if self._versions is not None and gradient._version != self._versions[position]:
                return True
        return False


def scale_in_place(values: torch.Tensor, factor: float) -> None:
    """Multiply by a real number; 0 makes zeros of all values."""
    if factor:
        # Real and imaginary parts each: a complex product would make NaN of an infinite one.
        (torch.view_as_real(values) if values.is_complex() else values).mul_(factor)
    else:
        values.zero_()


def strides_of_gradient(parameter: torch.Tensor) -> tuple[int, ...]:
    """Those of the parameter, where they cover the memory exactly: they keep optimizers on their fast path."""
    return parameter.stride() if covers_its_memory(parameter) else torch.empty(parameter.shape, device="meta").stride()


def covers_its_memory(tensor: torch.Tensor) -> bool:
    """True if the strides are a permutation of contiguous ones."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def find_overlaps(parameters: Sequence[torch.Tensor]) -> set[int]:
    """Positions of the parameters that share memory with another one, or lie between its elements."""
    ranges = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), index)
        for index, p in enumerate(parameters)
        if p.layout is torch.strided and p.numel() > 0
    )
    found: set[int] = set()
    reach = ("", 0, -1)  # device, end and index of what reaches furthest
    for device, start, end, index in ranges:
        if device == reach[0] and start < reach[1]:
            found |= {index, reach[2]}
        if device != reach[0] or end > reach[1]:
            reach = (device, end, index)
    return found
