"""Another update in the place of a torch optimizer's own, which its hooks and schedulers do not notice."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from heatopt.errors import HeatoptError

__all__ = ["HookedStep"]


class HookedStep:
    """Stands for ``optimizer.step``: fires its hooks, tells its schedulers, and calls ``step`` instead.

    Args:
        optimizer: whose step it stands for.
        step: is called with the optimizer and the arguments: a method of the object that keeps this one.
        setting: why a step that the user has put on ``optimizer`` itself cannot be called instead; "" if it can.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[..., Any], setting: str = "") -> None:
        self._optimizer = optimizer
        self._setting = setting
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
                return self._call(replacement, *arguments, **keywords)
            optimizer._opt_called = True  # all that a scheduler's replacement does
        return self._hooked_step(optimizer, *arguments, **keywords)

    def _call(self, replacement: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Call the user's own step, which updates the parameters themselves."""
        if self._setting:
            raise HeatoptError(
                f"the step of this {type(self._optimizer).__name__} was replaced on the object, by torch.compile, say; "
                f"what stands there would update whole parameters, and {self._setting} would have no part in it; "
                f"replace the step of the DataParallelOptimizer instead, or leave out {self._setting}"
            )
        return replacement(*arguments, **keywords)
