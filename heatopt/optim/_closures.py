"""Closures that see averages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from heatopt.sync import Call, Gradients, LocalGradients, mean_of

__all__ = ["Closure", "averaged"]

Closure = Callable[[], Any]


def averaged(closure: Closure | None, gradients: Gradients) -> Closure | None:
    """``closure``, with the reduction of ``gradients`` inside it; it returns the mean of the loss, weighted alike."""
    if closure is None or isinstance(gradients, LocalGradients):
        return closure

    def evaluate() -> Any:
        loss = closure()
        number = loss.detach() if isinstance(loss, torch.Tensor) else loss
        rows = gradients.settle(Call.CLOSURE, math.nan if number is None else float(number))
        if loss is None:
            return None
        weights = mean_of([row.weight if row.call == Call.CLOSURE else None for row in rows])
        losses = [
            share * row.payload
            for row, share in zip(rows, weights.shares, strict=True)
            if row.call == Call.CLOSURE and share
        ]
        mean = (math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)) / weights.divisor
        return torch.full_like(number, mean) if isinstance(number, torch.Tensor) else mean

    return evaluate
