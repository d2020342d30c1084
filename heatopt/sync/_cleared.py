"""Notices gradients that users clear without the optimizer, between a reduction and the update.

[Note: Cleared gradients]
A residual belongs to the average in ``p.grad`` (see [Note: Residuals]). Who clears that by ``p.grad = None`` or by the
module's ``zero_grad()`` tells nobody, and after the next backward nothing is to be seen of it: there is a new gradient
in ``p.grad``, as if the average were still in it. So the parameters are looked at just before the first gradient of a
pass is accumulated, by a hook of the node that does it, and before each call that uses averages. What has been cleared
was not used: its residual is again what it was before the reduction.

Zeros in the place of an average that had others count as cleared, too, until something is added to it. The update
takes them as they are, like any change of the averages.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from heatopt.sync._graphs import never_compiled
from heatopt.sync._residuals import Residuals

__all__ = ["ClearedGradients"]


class ClearedGradients:
    """Takes back the residuals of averages that are cleared; see [Note: Cleared gradients].

    Args:
        residuals: of this rank.
    """

    def __init__(self, residuals: Residuals) -> None:
        self._residuals = residuals
        self._parameters: Sequence[torch.Tensor] = ()
        self._hooks: list[tuple[Any, torch.utils.hooks.RemovableHandle]] = []  # beside the nodes, which they need
        self._pass = -1

    def watch(self, parameters: Sequence[torch.Tensor]) -> None:
        """A reduction has left residuals of some of the ``parameters``, which are all of the optimizer's."""
        self.stop()
        self._parameters = parameters
        for index in self._residuals.open_indices():
            if parameters[index].requires_grad:
                node: Any = torch.autograd.graph.get_gradient_edge(parameters[index]).node
                self._hooks.append((node, node.register_prehook(_before_arrival(weakref.ref(self), index))))

    def stop(self) -> None:
        """The averages have been used, or given up."""
        for _, handle in self._hooks:
            handle.remove()
        self._hooks = []

    def before_arrival(self, index: int) -> None:
        """A gradient of parameter number ``index`` is about to be accumulated."""
        running: int = torch._C._current_graph_task_id()
        if running != self._pass:
            self._pass = running
            self._residuals.roll_back_cleared(self._parameters, zeros=True)
        self._residuals.note_arrival(index)


def _before_arrival(reference: weakref.ref[ClearedGradients], index: int) -> Callable[[Any], None]:
    @never_compiled
    def before_arrival(_: Any) -> None:
        cleared = reference()
        if cleared is not None:
            cleared.before_arrival(index)

    return before_arrival
