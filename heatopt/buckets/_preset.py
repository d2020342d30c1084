"""Gradients that are there before backward makes them.

[Note: Preset gradients]
Hundreds of small gradients cost more to move at the end of backward than their bytes: each tensor has left the caches.
So where all are small and in one bucket, backward adds them to zeros that lie in the bucket already: after the first
gradient of a pass all other parameters get theirs, and at the end those to which nothing was added have none again. To
add to zeros changes no bit but the sign of a zero: -0.0 becomes 0.0. It is only done for parameters of which the last
reduction had gradients that were dense, while nobody else refers to the memory.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from operator import attrgetter, eq

import torch

from heatopt.buckets._layout import BucketPlan

__all__ = ["Preset", "worth_presetting"]

# On average; above it the bytes cost more than the tensors.
_MEAN_BYTES = 32 * 1024

_VERSION = attrgetter("_version")


def worth_presetting(plan: BucketPlan) -> bool:
    """True for a bucket of small gradients on the CPU."""
    return plan.device.type == "cpu" and plan.numel * plan.dtype.itemsize <= len(plan.slots) * _MEAN_BYTES


class Preset:
    """Zeros in ``p.grad`` of some parameters, for the time of one backward pass; made by :meth:`make`."""

    def __init__(self, parameters: Sequence[torch.Tensor], views: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._views = views
        self._versions = list(map(_VERSION, views))
        self._references: list[int] = []
        self._end: weakref.ref[object] | None = None

    @classmethod
    def make(
        cls, parameters: Sequence[torch.Tensor], views: Sequence[torch.Tensor], first: int, running: object
    ) -> Preset | None:
        """Give each parameter its view, which is zero; None if some may not have it.

        Args:
            parameters: have no gradients, but for one.
            views: where the gradients are to be.
            first: position of the parameter that has its gradient, which is moved.
            running: with it the preset ends, whatever ended the pass.
        """
        preset = cls(parameters, views)
        own = parameters[first].grad
        assert own is not None
        views[first].copy_(own)
        try:
            preset._attach()
        except RuntimeError:  # torch's, of a parameter whose type or shape was changed since
            preset.release()
            parameters[first].grad = own
            return None
        preset._references = preset._count_references()
        reference = weakref.ref(preset)
        preset._end = weakref.ref(running, lambda _: _release(reference))
        return preset

    def _attach(self) -> None:
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def _count_references(self) -> list[int]:
        return list(map(sys.getrefcount, self._views))

    def move_out_kept(self) -> bool:
        """Give gradients that hooks keep, as they came, memory of their own; True if there are any."""
        found = self._count_references()
        if found == self._references:
            return False
        for view, now, before in zip(self._views, found, self._references, strict=True):
            if now > before:
                view.data = view.clone()
        return True

    def release(self) -> None:
        """Let the parameters to whose gradients nothing was added have none; once, then it does nothing."""
        self._end = None
        versions = list(map(_VERSION, self._views))
        if True in map(eq, versions, self._versions):
            for parameter, view, before, now in zip(
                self._parameters, self._views, self._versions, versions, strict=True
            ):
                if before == now and parameter.grad is view:
                    parameter.grad = None
        self._versions = [-1] * len(versions)


def _release(reference: weakref.ref[Preset]) -> None:
    preset = reference()
    if preset is not None:
        preset.release()
