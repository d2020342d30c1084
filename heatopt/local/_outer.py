"""The anchor: parameters that are equal on all ranks, and the optimizer that moves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["CO2Momentum", "Outer", "OuterFactory", "SlowMomentum", "made_by"]

Groups = list[dict[str, Any]]
OuterFactory = Callable[[Groups], torch.optim.Optimizer]


class SlowMomentum(torch.optim.Optimizer):
    """SlowMo's outer update of x with gradient g (the difference that H local updates made, negated).

    ``u = beta u + g / gamma;  x = x - alpha gamma u``

    Group options: ``lr`` (alpha), ``momentum`` (beta) and ``inner_lr`` (gamma), the inner learning rate at the time.
    """

    def __init__(self, params: Any, lr: float = 1.0, momentum: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "inner_lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            gamma = float(group["inner_lr"])
            for parameter in group["params"]:
                # With gamma 0 nothing was learnt, and there is no scale for the momentum.
                if parameter.grad is None or gamma == 0:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad / gamma)
                parameter.sub_(velocity, alpha=float(group["lr"]) * gamma)


class CO2Momentum(torch.optim.Optimizer):
    """CO2's outer update of x with gradient g: ``u = clip(beta u + g / gap);  x = x - alpha u``.

    Group options: ``lr`` (alpha), ``momentum`` (beta), ``gap`` and ``clip`` (largest absolute value of u, or None).
    """

    def __init__(
        self, params: Any, lr: float = 1.0, momentum: float = 0.2, gap: float = 1.0, clip: float | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "gap": gap, "clip": clip})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad / group["gap"])
                if group["clip"] is not None:
                    limit = float(group["clip"])
                    real = torch.view_as_real(velocity) if velocity.is_complex() else velocity
                    real.clamp_(-limit, limit)
                parameter.sub_(velocity, alpha=float(group["lr"]))


def made_by(factory: OuterFactory | None, groups: Groups) -> torch.optim.Optimizer | None:
    """What ``factory`` makes of ``groups``; None without one.

    Raises:
        TypeError: it makes something else than an optimizer.
    """
    made = None if factory is None else factory(groups)
    if factory is not None and not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"outer must make an optimizer of the parameters that it is given, but it returned a {type(made).__name__}"
        )
    return made


class Outer:
    """The anchors of all parameters of an optimizer, at least in single precision, and what moves them.

    Args:
        groups: the optimizer's parameter groups; there is one group of anchors for each.
        factory: makes the outer optimizer for the groups of anchors; None: an anchor becomes the average.
    """

    def __init__(self, groups: Groups, factory: OuterFactory | None) -> None:
        self.anchors: list[torch.Tensor] = []
        """One for each parameter."""
        self.residuals: dict[int, torch.Tensor] = {}
        """What rounding has kept back so far, by index of the parameter."""
        self.anchored = False
        """The anchors have been taken."""
        mirrored = [{"params": self._anchors_of(group)} for group in groups]
        self.optimizer = made_by(factory, mirrored)
        """The outer optimizer; its parameters are the anchors."""

    def _anchors_of(self, group: dict[str, Any]) -> list[torch.Tensor]:
        made = [anchor_of(parameter) for parameter in group["params"]]
        self.anchors += made
        return made

    def add_group(self, group: dict[str, Any]) -> None:
        """Parameters were added to the optimizer."""
        anchors = self._anchors_of(group)
        if self.optimizer is not None:
            self.optimizer.add_param_group({"params": anchors})

    @property
    def is_average(self) -> bool:
        """True if an anchor becomes the average itself: SGD with learning rate 1 does nothing else."""
        return self.optimizer is None or (
            type(self.optimizer) is torch.optim.SGD and all(_is_plain(group) for group in self.optimizer.param_groups)
        )

    @torch.no_grad()
    def capture(self, parameters: Sequence[torch.Tensor]) -> None:
        """Take the parameters, which are equal on all ranks, as anchors: of their dtype, which may have changed."""
        for anchor, parameter in zip(self.anchors, parameters, strict=True):
            anchor.data = anchor_of(parameter)
        self.anchored = True

    def overwrite(self, indices: Sequence[int], parameters: Sequence[torch.Tensor]) -> None:
        """Set ``parameters`` (all of them) of ``indices`` to their anchors."""
        for index in indices:
            parameters[index].copy_(self.anchors[index])

    def redo(
        self, indices: Sequence[int], parameters: Sequence[torch.Tensor], progress: Sequence[torch.Tensor]
    ) -> None:
        """Set ``parameters`` (all of them) of ``indices`` to their anchors plus a former :meth:`progress`."""
        for index, done in zip(indices, progress, strict=True):
            parameters[index].copy_(self.anchors[index] + done)

    def progress(self, indices: Sequence[int], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """How far ``values``, of the parameters ``indices``, are from their anchors."""
        anchors = [self.anchors[index] for index in indices]
        # A replica began from the anchor as its parameters' dtype can hold it.
        return [v.to(a.dtype) - a.to(v.dtype).to(a.dtype) for v, a in zip(values, anchors, strict=True)]

    def differences(
        self, indices: Sequence[int], values: Sequence[torch.Tensor], wire: torch.dtype | None, feedback: bool
    ) -> list[torch.Tensor]:
        """:meth:`progress`, rounded to ``wire``; with ``feedback`` the next one has what rounding kept back."""
        rounded = []
        for index, delta in zip(indices, self.progress(indices, values), strict=True):
            if wire is None or delta.is_complex() or delta.element_size() <= wire.itemsize:
                rounded.append(delta)
                continue
            whole = delta + self.residuals[index] if index in self.residuals else delta
            rounded.append(whole.to(wire))
            if feedback:
                self.residuals[index] = whole - rounded[-1]
        return rounded

    def move(self, indices: Sequence[int], deltas: Sequence[torch.Tensor]) -> None:
        """Update the anchors with the mean differences of the replicas from them."""
        if self.is_average or self.optimizer is None:
            for index, delta in zip(indices, deltas, strict=True):
                self.anchors[index].add_(delta)
            return
        for index, delta in zip(indices, deltas, strict=True):
            self.anchors[index].grad = -delta.to(self.anchors[index].dtype)
        self.optimizer.step()
        for index in indices:
            self.anchors[index].grad = None  # an anchor without a gradient keeps its place at the next step

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that changes."""
        return {
            "anchors": [anchor.clone() for anchor in self.anchors] if self.anchored else None,
            "outer": None if self.optimizer is None else self.optimizer.state_dict(),
            "residuals": {index: residual.clone() for index, residual in self.residuals.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], parameters: Sequence[torch.Tensor], same_ranks: bool) -> None:
        """Go on from a state, with anchors of the devices and precision of ``parameters``.

        Args:
            state: what :meth:`state_dict` returned; without an entry that begins anew.
            parameters: all, as they will be trained.
            same_ranks: as many as saved it; otherwise residuals are dropped.
        """
        self.residuals, self.anchored = {}, False
        if state.get("anchors") is not None:
            self.capture(parameters)
            for anchor, saved in zip(self.anchors, state["anchors"], strict=True):
                anchor.copy_(saved)
        if same_ranks:
            self.residuals = {i: r.to(self.anchors[i].device, copy=True) for i, r in state["residuals"].items()}
        if self.optimizer is not None and state.get("outer") is not None:
            self.optimizer.load_state_dict(state["outer"])


def anchor_of(parameter: torch.Tensor) -> torch.Tensor:
    """A copy in which small differences are not lost."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True).contiguous()


def _is_plain(group: dict[str, Any]) -> bool:
    idle = ("momentum", "weight_decay", "dampening")
    return float(group["lr"]) == 1 and not any(group.get(name) for name in idle) and not group.get("maximize")
