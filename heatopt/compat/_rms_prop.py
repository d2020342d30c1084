"""RMSprop with epsilon inside the root, which torch's has outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["RootedRMSprop"]


class RootedRMSprop(torch.optim.Optimizer):
    r"""RMSprop as SINGA has it.

    .. math:: v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \qquad x_t = x_{t-1} - \gamma g_t / \sqrt{v_t + \epsilon}

    with g the gradient plus ``weight_decay`` times the parameter. :class:`torch.optim.RMSprop` divides by
    :math:`\sqrt{v_t} + \epsilon`, which no setting makes equal. The state is torch's, ``square_avg``.
    """

    def __init__(self, params: Any, lr: float, alpha: float, eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError("RMSProp does not support sparse gradients")
        if group["weight_decay"] != 0:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if not state:
            state["square_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        average = state["square_avg"]
        average.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
        parameter.addcdiv_(gradient, (average + group["eps"]).sqrt_(), value=-group["lr"])
