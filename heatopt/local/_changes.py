"""What travels: parameters, or differences from the anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heatopt.local._average import Kind
from heatopt.local._outer import Outer
from heatopt.local._schedule import Send
from heatopt.local._settings import LocalSettings

__all__ = ["changes", "kind_of"]


def kind_of(action: Send, settings: LocalSettings, outer: Outer | None) -> Kind:
    """What is to be sent."""
    if settings.merge == "daso" and action.delay:
        return Kind.TOTAL
    if action.full or outer is None or (outer.is_average and settings.wire_dtype is None):
        return Kind.MEAN
    return Kind.DELTA


def changes(
    outer: Outer, indices: Sequence[int], values: Sequence[torch.Tensor], settings: LocalSettings
) -> list[torch.Tensor]:
    """Differences of ``values`` from their anchors, rounded to the wire dtype; takes and leaves residuals."""
    wire = settings.wire_dtype
    deltas = []
    for index, value in zip(indices, values, strict=True):
        anchor = outer.anchors[index]
        # A replica began from the anchor as its parameters' dtype can hold it.
        delta = value.to(anchor.dtype) - anchor.to(value.dtype).to(anchor.dtype)
        if wire is None or delta.is_complex() or delta.element_size() <= wire.itemsize:
            deltas.append(delta)
            continue
        if index in outer.residuals:
            delta = delta + outer.residuals[index]
        rounded = delta.to(wire)
        if settings.error_feedback:
            outer.residuals[index] = delta - rounded
        deltas.append(rounded)
    return deltas
