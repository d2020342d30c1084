"""When does a backward pass end? A callback of the autograd engine, right also for nested passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from heatopt.sync._graphs import never_compiled

__all__ = ["when_backward_ends"]


class _Callback:
    """Owned by autograd's graph task alone, so it dies with the pass, also if an exception ends that."""

    def __init__(self, function: Callable[[Any], None], argument: Any, token: object) -> None:
        self._function = function
        self._argument = argument
        self._token = token

    @never_compiled
    def __call__(self) -> None:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            self._function(self._argument)
        else:
            self._follow(node)

    def _follow(self, node: Any) -> None:
        """This pass ran inside ``node`` of another one (reentrant checkpointing): wait for the end of that.

        The engine queues a callback on the innermost pass only, so wait until a node of the outer pass runs.
        """
        handles: list[Any] = []

        @never_compiled
        def requeue(_: Any) -> None:
            while handles:
                handles.pop().remove()
            _queue(self)

        handles.extend(
            next_node.register_prehook(requeue) for next_node, _ in node.next_functions if next_node is not None
        )


class _Token:
    """Lives as long as the callback is queued."""


def _queue(callback: _Callback) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def when_backward_ends(function: Callable[[Any], None], argument: Any) -> Callable[[], object | None]:
    """Call ``function(argument)`` at the end of the running (outermost) backward pass.

    Returns:
        A function that returns None once the pass is over or was interrupted by an exception.
    """
    token = _Token()
    _queue(_Callback(function, argument, token))
    return weakref.ref(token)
