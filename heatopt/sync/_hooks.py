"""Hooks that outlive neither their parameter nor their owner."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from heatopt.buckets import SMALL_BYTES
from heatopt.sync._graphs import never_compiled

__all__ = ["GradientHooks"]


class GradientListener(Protocol):
    """Who wants to know of gradients."""

    quiet: Callable[[], object | None]
    """Not None as long as small gradients need no further notice: one call less for each."""

    def on_gradient(self, index: int, parameter: torch.Tensor) -> None:
        """The gradient of parameter number ``index`` has been accumulated."""


Listener = TypeVar("Listener", bound=GradientListener)


class GradientHooks:
    """The hooks of one listener, one for each parameter, which are removed when the listener dies.

    Args:
        listener: hears of the gradients; held weakly.
    """

    def __init__(self, listener: GradientListener) -> None:
        self._listener = weakref.ref(listener)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._numbers: dict[int, int] = {}  # of the hooks, by parameter index
        self._count = 0  # parameters that have theirs, from the first
        weakref.finalize(listener, _remove_hooks, self._handles)

    def extend(self, parameters: Sequence[torch.Tensor]) -> None:
        """Hook those of all ``parameters`` that are new at the end of the list."""
        for index, parameter in enumerate(parameters[self._count :], self._count):
            if parameter.is_floating_point() or parameter.is_complex():  # others never have a gradient
                self._handles.append(_hook_gradient(parameter, index, self._listener))
                self._numbers[index] = self._handles[-1].id
        self._count = len(parameters)

    def is_last(self, index: int, parameter: torch.Tensor) -> bool:
        """True if no other hook of the parameter runs after the listener's when a gradient has been accumulated."""
        hooks: Any = getattr(parameter, "_post_accumulate_grad_hooks", None)  # torch's, in the order of their calls
        return bool(hooks) and next(reversed(hooks)) == self._numbers[index]


def _hook_gradient(
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


def _remove_hooks(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    """Remove all of them."""
    for handle in handles:
        handle.remove()
