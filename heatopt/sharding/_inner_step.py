"""Another update in the place of a torch optimizer's own, which its hooks and schedulers do not notice."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["HookedStep"]


class HookedStep:
    """Stands for ``optimizer.step``: fires its hooks, tells its schedulers, and calls ``step`` instead.

    Args:
        optimizer: whose step it stands for.
        step: is called with the optimizer and the arguments: a method of the object that keeps this one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[..., Any]) -> None:
        self._optimizer = optimizer
        # Whoever keeps this object would otherwise be part of a cycle, and outlive its last user.
        method: Any = weakref.WeakMethod(step)

        def call(optimizer: torch.optim.Optimizer, *arguments: Any, **keywords: Any) -> Any:
            return method()(optimizer, *arguments, **keywords)

        self._hooked_step: Callable[..., Any] = torch.optim.Optimizer.profile_hook_step(call)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        optimizer: Any = self._optimizer
        replacement = optimizer.__dict__.get("step")
        if replacement is not None:
            if not getattr(replacement, "_wrapped_by_lr_sched", False):
                return replacement(*arguments, **keywords)
            optimizer._opt_called = True  # all that a scheduler's replacement does
        return self._hooked_step(optimizer, *arguments, **keywords)
