"""Hetu's optimizers and its gradient scaler, on torch tensors.

>>> optimizer = hetu.AdamOptimizer(
...     init_lr=0.0, max_lr=1e-3, min_lr=1e-5, lr_warmup_steps=100, lr_decay_steps=1000, lr_decay_style="cosine",
...     start_wd=0.0, end_wd=0.01, wd_incr_steps=1000, wd_incr_style="linear", beta1=0.9, beta2=0.999, eps=1e-8,
... )
>>> for x, y in loader:
...     optimizer.minimize(loss_fn(model(x), y))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy
import torch

from heatopt.compat._late import LateOptimizer
from heatopt.lr_scheduler import WarmupDecay, megatron_lr, megatron_weight_decay
from heatopt.optim import GradScaler as _GradScaler

__all__ = ["AdamOptimizer", "GradScaler", "SGDOptimizer"]

_PREFIX = "var_"  # Hetu's states are tensors, named after their variable, which the documentation calls "var"


class _Optimizer(LateOptimizer):
    """What Hetu's optimizers have in common."""

    _rate: WarmupDecay
    _names: dict[str, str]
    """Hetu's name of a state: torch's."""

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._rate.value(self.scheduler.last_epoch if self.is_attached else 0))

    def minimize(
        self,
        loss: torch.Tensor,
        var_list: Sequence[torch.Tensor] | None = None,
        grad_loss: torch.Tensor | None = None,
        name: str = "",
    ) -> torch.Tensor:
        """Update the variables by the averaged gradients of ``loss``, and count the step. Collective.

        Args:
            loss: of this rank. Gradients that were there before do not count.
            var_list: what to update. None or an empty list: all variables, which are those given as ``params``, or else
                those that require gradients in the graph of the first loss. A list at the first loss is all that there
                ever are. A variable without a gradient on any rank stays.
            grad_loss: the gradient with respect to the loss; 1 if not given.
            name: of the operation, in Hetu's graph; there is no graph here.

        Returns:
            The loss, without its graph: the update is done.

        Raises:
            ValueError: the ranks' parameters differ at the first loss; or there are other variables than known in
                ``var_list``, or in the loss without one if the first had one.
        """
        return self.update(loss, var_list or None, grad_loss)

    def get_states(self, var: torch.Tensor) -> dict[str, Any]:
        """Copies of the whole states of a variable, by torch's names and by Hetu's. Collective if sharded.

        Hetu's are those of the optimizer's documentation, each also as it calls the tensor: "mean" and "var_mean".
        """
        states = self.wrapped.get_states(var)
        theirs = {name: self._to_hetus(name, states[own]) for name, own in self._names.items() if own in states}
        return {**states, **theirs, **{_PREFIX + name: state for name, state in theirs.items()}}

    def set_states(self, var: torch.Tensor, state_name: str, value: Any) -> None:
        """Replace a state of a variable by a NumPy array or a tensor, equal on all ranks. Collective if sharded.

        Before the first step of the variable its other states become what they start with.

        Args:
            var: the variable.
            state_name: one of those that :meth:`get_states` has.
            value: the whole state. "step", a number, may have one dimension, as in Hetu.

        Raises:
            TypeError: no array, nor what one can be made of.
            ValueError: the variable has no such state, or one of another shape.
        """
        name = state_name.removeprefix(_PREFIX)
        own = self._names.get(name, state_name)
        present = self.wrapped.get_states(var)
        first = {} if present else self._first_states(var)
        known = {**present, **first}
        if own not in known:
            listed = ", ".join(map(repr, {**known, **self._names})) or "none"
            raise ValueError(f"the variable has no state {state_name!r}; it has {listed}")
        if not isinstance(value, torch.Tensor):
            value = torch.as_tensor(numpy.asarray(value))
        if known[own].dim() == 0 and value.numel() == 1:
            value = value.reshape(())
        for other, state in first.items():
            self.wrapped.set_states(var, other, state)
        self.wrapped.set_states(var, own, self._to_torchs(name, value))

    def _first_states(self, var: torch.Tensor) -> dict[str, torch.Tensor]:
        """The states of a variable before its first step."""
        dtype = torch.promote_types(var.dtype, self._options.get("master_dtype") or var.dtype)
        return {
            own: torch.zeros(()) if own == "step" else torch.zeros_like(var.detach(), dtype=dtype)
            for own in self._names.values()
        }

    def _to_hetus(self, name: str, state: torch.Tensor) -> torch.Tensor:
        """torch's state as Hetu's state ``name``."""
        return state

    def _to_torchs(self, name: str, state: torch.Tensor) -> torch.Tensor:
        """Hetu's state ``name`` as torch's."""
        return state


class AdamOptimizer(_Optimizer):
    """Adam with learning rate and weight decay by schedules: :func:`heatopt.lr_scheduler.megatron_lr` and
    :func:`heatopt.lr_scheduler.megatron_weight_decay`, whose arguments these are.

    It is :class:`torch.optim.Adam`, whose bias correction and place of ``eps`` are Hetu's: lr m' / (sqrt(v') + eps).
    Three things are to be known:

    * The count n of the schedules is that of steps taken, so the first step has ``init_lr``. Hetu counts from 1: to
      follow it, give ``params``, and call ``optimizer.scheduler.step()`` once before the first step.
    * The weight decay is added to the gradient, as in torch's Adam. Hetu's kernel is given it, and leaves it out.
    * The states ``mean`` and ``variance`` are torch's ``exp_avg`` and ``exp_avg_sq``; ``step`` is torch's, too: the
      number of steps taken, where Hetu's is that of the next one.

    Args:
        init_lr: learning rate at the start of the warm-up.
        max_lr: at its end.
        min_lr: at the end of the decay.
        lr_warmup_steps: length of the warm-up.
        lr_decay_steps: end of the decay, in steps from the start.
        lr_decay_style: "constant", "linear", "cosine" or "inverse-square-root".
        start_wd: weight decay at the start.
        end_wd: at the end.
        wd_incr_steps: length of its rise.
        wd_incr_style: "constant", "linear" or "cosine".
        options: ``beta1``, ``beta2`` and ``eps``, Adam's; ``params``, if they are not to be taken from the first loss;
            and options of :class:`heatopt.DataParallelOptimizer` (``comm``, ``shard``, ``fuse``, ...).

    Raises:
        TypeError: an argument of the wrong type, or an unknown keyword.
        ValueError: a number out of its range, or an unknown style.
    """

    def __init__(
        self,
        init_lr: float,
        max_lr: float,
        min_lr: float,
        lr_warmup_steps: int,
        lr_decay_steps: int,
        lr_decay_style: str,
        start_wd: float = 0.0,
        end_wd: float = 0.0,
        wd_incr_steps: int = -1,
        wd_incr_style: str = "constant",
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        *,
        params: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        self._rate = _rate(init_lr, max_lr, min_lr, lr_warmup_steps, lr_decay_steps, lr_decay_style)
        decay = megatron_weight_decay(start_wd, end_wd, wd_incr_steps=wd_incr_steps, wd_incr_style=wd_incr_style)

        def make(parameters: list[Any]) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, betas=(beta1, beta2), eps=eps)

        make([torch.zeros(0)])  # torch's own checks, now
        self._names = {"step": "step", "mean": "exp_avg", "variance": "exp_avg_sq"}
        super().__init__(make, {"lr": self._rate, "weight_decay": decay}, options)
        if params is not None:
            self.attach(params)


class SGDOptimizer(_Optimizer):
    """SGD: :class:`torch.optim.SGD` with a warm-up of the learning rate.

    Hetu's momentum is in its velocity, v = momentum v - lr g, with the learning rate inside it; torch's,
    b = momentum b + g, has it outside. They are equal, v = -lr b, as long as the learning rate stays. So a momentum
    together with a warm-up is refused. The state ``velocity`` is -lr times torch's ``momentum_buffer``. What is
    counted: see :class:`AdamOptimizer`.

    Args:
        init_lr: learning rate at the start of the warm-up.
        max_lr: at its end, and from there on.
        min_lr: without effect for "constant"; at most ``max_lr``.
        lr_warmup_steps: length of the warm-up.
        lr_decay_steps: more than ``lr_warmup_steps``.
        lr_decay_style: "constant", the one style of Hetu's SGD.
        momentum: at least 0.
        nesterov: Nesterov's momentum.
        params: the variables, if they are not to be taken from the first loss.
        options: of :class:`heatopt.DataParallelOptimizer`: ``comm``, ``shard``, ``fuse``, ...

    Raises:
        TypeError: an argument of the wrong type, or an unknown keyword.
        ValueError: a number out of its range, another style, or momentum with a warm-up.
    """

    def __init__(
        self,
        init_lr: float,
        max_lr: float,
        min_lr: float,
        lr_warmup_steps: int,
        lr_decay_steps: int,
        lr_decay_style: str,
        momentum: float = 0.0,
        nesterov: bool = False,
        *,
        params: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        self._rate = _rate(init_lr, max_lr, min_lr, lr_warmup_steps, lr_decay_steps, lr_decay_style)
        if lr_decay_style != "constant":
            raise ValueError(
                f"lr_decay_style of SGD must be 'constant', as in Hetu, got {lr_decay_style!r}; for another one drive "
                "torch.optim.SGD by a heatopt.lr_scheduler.ParamScheduler"
            )
        if momentum and lr_warmup_steps and init_lr != max_lr:
            raise ValueError(
                f"momentum {momentum!r} with a warm-up is another algorithm in Hetu, where the velocity contains the "
                "learning rate, than in torch: give lr_warmup_steps=0, or use torch.optim.SGD with a "
                "heatopt.lr_scheduler.ParamScheduler for torch's"
            )

        def make(parameters: list[Any]) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, momentum=momentum, nesterov=nesterov)

        make([torch.zeros(0)])  # torch's own checks, now
        self._names = {"velocity": "momentum_buffer"} if momentum else {}
        super().__init__(make, {"lr": self._rate}, options)
        if params is not None:
            self.attach(params)

    def _to_hetus(self, name: str, state: torch.Tensor) -> torch.Tensor:
        return state * -self.learning_rate if name == "velocity" else state

    def _to_torchs(self, name: str, state: torch.Tensor) -> torch.Tensor:
        if name != "velocity":
            return state
        if not self.learning_rate:
            raise ValueError("with a learning rate of 0 no gradients have a velocity: set 'momentum_buffer' instead")
        return state / -self.learning_rate


class GradScaler(_GradScaler):
    """:class:`heatopt.GradScaler` by Hetu's arguments: all ranks skip a step that overflows on one, or none does.

    >>> scaler.minimize(optimizer, scaler.scale(loss))
    >>> scaler.update()

    Args:
        init_scale: the first scale.
        growth_factor: of the scale, after ``growth_interval`` steps without overflow.
        backoff_factor: of the scale, at an overflow.
        growth_interval: see there.
        enabled: False: scale by nothing, and skip nothing.
        device: type of the device of the losses; default: "cuda" where there is one, else "cpu".
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        device: str | None = None,
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)

    def minimize(
        self,
        op: _Optimizer,
        loss: torch.Tensor,
        var_list: Sequence[torch.Tensor] | None = None,
        grad_loss: torch.Tensor | None = None,
        name: str = "",
    ) -> torch.Tensor:
        """The optimizer's ``minimize`` of a scaled loss, by its gradients over the scale. Collective.

        If one of them is inf or nan on any rank, the step is left out, and does not count for the schedules.

        Args:
            op: the optimizer.
            loss: of this rank, from :meth:`scale`.
            var_list: see the optimizer's ``minimize``.
            grad_loss: see there.
            name: see there.

        Returns:
            The scaled loss, without its graph.

        Raises:
            TypeError: ``op`` is no optimizer of :mod:`heatopt.compat.hetu`.
        """
        if not isinstance(op, _Optimizer):
            raise TypeError(f"op must be an AdamOptimizer or SGDOptimizer of heatopt.compat.hetu, got {op!r}")
        return op.update(loss, var_list or None, grad_loss, lambda: self.step(op.wrapped))


def _rate(init_lr: float, max_lr: float, min_lr: float, warmup: int, decay: int, style: str) -> WarmupDecay:
    if style == "WSD":
        raise ValueError("lr_decay_style 'WSD' is Megatron's, not Hetu's; use heatopt.lr_scheduler.megatron_lr")
    return megatron_lr(
        max_lr, min_lr, init_lr=init_lr, lr_warmup_steps=warmup, lr_decay_steps=decay, lr_decay_style=style
    )


def __dir__() -> list[str]:
    return list(__all__)
