"""Hooks that outlive neither their parameter nor their owner."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from heatopt.buckets import SMALL_BYTES
from heatopt.sync._graphs import never_compiled

__all__ = ["hook_gradient", "is_last_hook", "remove_hooks"]


class GradientListener(Protocol):
    """Who wants to know of gradients."""

    quiet: Callable[[], object | None]
    """Not None as long as small gradients need no further notice: one call less for each."""

    def on_gradient(self, index: int, parameter: torch.Tensor) -> None:
        """The gradient of parameter number ``index`` has been accumulated."""


Listener = TypeVar("Listener", bound=GradientListener)


def hook_gradient(
    parameter: torch.Tensor, index: int, reference: weakref.ref[Listener]
) -> torch.utils.hooks.RemovableHandle:
    """Tell the listener, as long as it lives, of each gradient of ``parameter``."""
    small = parameter.nbytes < SMALL_BYTES

    @never_compiled
    def on_gradient(tensor: torch.Tensor) -> None:
        listener = reference()
        if listener is not None and not (small and listener.quiet() is not None):
            listener.on_gradient(index, tensor)

    # torch hooks only what requires a gradient, but the hook outlives freezing: so a parameter that is unfrozen
    # later is synchronised as any other.
    frozen = not parameter.requires_grad
    if frozen:
        parameter.requires_grad_(True)
    register: Any = parameter.register_post_accumulate_grad_hook
    try:
        handle: torch.utils.hooks.RemovableHandle = register(on_gradient)
        return handle
    finally:
        if frozen:
            parameter.requires_grad_(False)


def is_last_hook(parameter: torch.Tensor, number: int) -> bool:
    """True if no other hook runs after the one with this handle's number when a gradient has been accumulated."""
    hooks: Any = getattr(parameter, "_post_accumulate_grad_hooks", None)  # torch's, in the order of their calls
    return bool(hooks) and next(reversed(hooks)) == number


def remove_hooks(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    """Remove all of them."""
    for handle in handles:
        handle.remove()
