"""Closures that see averages, and steps with the hooks that were set on their optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from heatopt.sync import Call, Gradients, LocalGradients, mean_of

__all__ = ["Closure", "step_with_hooks"]

Closure = Callable[[], Any]


def step_with_hooks(
    optimizer: torch.optim.Optimizer, stepper: Any, gradients: Gradients, closure: Closure | None
) -> Any:
    """One step of ``stepper`` between the step hooks of ``optimizer``; they see the closure as the user gave it."""
    arguments: tuple[Any, ...] = (optimizer,) if closure is None else (optimizer, closure)
    keywords: dict[str, Any] = {}
    for pre_hook in optimizer._optimizer_step_pre_hooks.values():
        changed: Any = pre_hook(optimizer, arguments, keywords)
        if changed is not None:
            arguments, keywords = changed
    result = stepper.step(*(_averaged(c, gradients) for c in arguments[1:]), **keywords)
    gradients.consume()
    for post_hook in optimizer._optimizer_step_post_hooks.values():
        post_hook(optimizer, arguments, keywords)
    return result


def _averaged(closure: Closure | None, gradients: Gradients) -> Closure | None:
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
