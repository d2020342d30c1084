"""Adam on flat memory, by the arguments of torch_npu's fused Adam."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import zip_longest
from operator import is_
from typing import Any, NamedTuple

import torch

from heatopt.optim._closures import Closure
from heatopt.optim._data_parallel import DataParallelOptimizer
from heatopt.optim._flat import FlatStepper
from heatopt.optim._flat_kinds import SameKind

__all__ = ["FusedAdam"]

_AVERAGES = frozenset(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))


class _Places(NamedTuple):
    """Where a module keeps parameters: ``holders[n][names[n]] is parameters[n]``."""

    holders: list[dict[str, Any]]
    names: list[str]
    parameters: list[torch.Tensor]

    def hold(self) -> bool:
        """True if all parameters are there."""
        return all(map(is_, map(dict.get, self.holders, self.names), self.parameters))


class _TakesStatesAlong(FlatStepper):
    """Where parameters go, to another dtype or device, their states follow.

    Args:
        optimizer: of Adam.
        check: raises if they cannot; a method of the object that keeps this one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, check: Callable[[], None]) -> None:
        super().__init__(optimizer)
        self._check: Any = weakref.WeakMethod(check)  # or they would be a cycle, and outlive their last user

    def _before_moving(self) -> None:
        self._check()()
        for parameter, state in self._optimizer.state.items():
            state.update({key: state[key].to(parameter) for key in _AVERAGES & state.keys()})


class FusedAdam(DataParallelOptimizer):
    """:class:`torch.optim.Adam` in a :class:`DataParallelOptimizer` with ``fuse=True``: few updates of flat memory.

    The results are those of :class:`torch.optim.Adam` to rounding; parameters of several shapes and dtypes may share a
    group; one without gradient is skipped. Source: torch_npu's ``NpuFusedAdam``, whose results are undefined once a
    parameter has been re-allocated. Here each way to do so is noticed by the next ``step()``:

    * Other data (``model.cpu()``, ``model.half()``, ``p.data = other``): it moves into flat memory again, and its state
      follows it to its dtype and device. Data of another shape than the state: ValueError.
    * Another parameter, or None, in ``param_groups``: ValueError. New ones come by :meth:`add_param_group`.
    * Another parameter, or None, in the module (``module.weight = nn.Parameter(...)``): ValueError that names it, if
      ``model`` was given. Without it that cannot be seen, as with torch's Adam: the old parameter gets no gradients.

    A copy (``deepcopy``, ``pickle``) does not look at the module.

    Args:
        params: parameters, or dicts of groups.
        lr: learning rate, at least 0.
        betas: decay of the averages of the gradients and of their squares, both in [0, 1).
        eps: added to the root of the latter, at least 0.
        weight_decay: times the parameter is added to its gradient; at least 0.
        amsgrad: divide by the root of the largest average so far.
        options: of :class:`DataParallelOptimizer`: ``model``, ``comm``, ``bucket_mb``, ...; all but ``fuse``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of its range.
    """

    _model: Any = None  # weak: an optimizer keeps no module alive; None where there is none, and in copies
    _places = _Places([], [], [])
    _same_kind = SameKind(())  # as the parameters had when their shapes were checked
    _known: Sequence[Any] | None = None  # the parameters; in a copy None, until its first step

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        adam = torch.optim.Adam(params, lr, betas, eps, weight_decay, amsgrad)
        super().__init__(adam, fuse=True, **options)
        self._known = self._parameters()
        if options.get("model") is not None:
            self._model = weakref.ref(options["model"])
            self._places = self._find_places(options["model"])

    def _assemble(self, torch_optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        super()._assemble(torch_optimizer, *arguments)
        self._stepper = _TakesStatesAlong(torch_optimizer, self._check_parameters)

    def step(self, closure: Closure | None = None, *, weight: float | None = None) -> Any:
        if self._comm.size > 1:
            self._check_parameters()  # before gradients travel; one process checks when something has changed
        if not self._places.hold():
            self._check_module()
        return super().step(closure, weight=weight)

    step.hooked = True  # type: ignore[attr-defined]  # as in the base class

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._known = self._parameters()
        if self._model is not None and self._model() is not None:
            self._places = self._find_places(self._model())

    def _check_parameters(self) -> None:
        """Raise ValueError if somebody has changed the groups, or shapes of parameters."""
        parameters = self._parameters()
        self._check_groups(parameters)
        if not self._same_kind(parameters):
            self._check_shapes(parameters)
            self._same_kind = SameKind(parameters)

    def _check_groups(self, parameters: Sequence[Any]) -> None:
        """Raise ValueError unless the groups hold the very parameters that ranks have agreed on."""
        if self._known is None:
            self._known = parameters
        if len(parameters) == len(self._known) and all(map(is_, parameters, self._known)):
            return
        pairs = zip_longest(parameters, self._known, fillvalue="no parameter any more")
        position, found = next((number, found) for number, (found, known) in enumerate(pairs) if found is not known)
        kind = "another tensor" if isinstance(found, torch.Tensor) else str(found)
        raise ValueError(
            f"parameter {position} of the groups is {kind}, and not the one that this optimizer was made with: write "
            "p.data = value to change a parameter, call add_param_group() for a new one, or make a new optimizer"
        )

    def _check_shapes(self, parameters: Sequence[torch.Tensor]) -> None:
        """Raise ValueError if a state no longer has its parameter's shape."""
        for position, parameter in enumerate(parameters):
            state = self.state.get(parameter, {})
            for found in (tuple(state[key].shape) for key in _AVERAGES & state.keys()):
                if found != tuple(parameter.shape):
                    raise ValueError(
                        f"parameter {self._names.get(id(parameter), position)!r} has another shape, "
                        f"{tuple(parameter.shape)}, than its state, {found}: delete that (del optimizer.state[p]) to "
                        "start anew, or make a new optimizer"
                    )

    def _find_places(self, model: torch.nn.Module) -> _Places:
        """Where the module keeps the optimizer's parameters."""
        own = {id(parameter) for parameter in self._parameters()}
        places = _Places([], [], [])
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in own:
                    places.holders.append(module._parameters)
                    places.names.append(name)
                    places.parameters.append(parameter)
        return places

    def _check_module(self) -> None:
        """Raise ValueError if a parameter has left the module; it may have moved within it (by a parametrization)."""
        model = self._model()
        if model is None:
            return
        present = {id(parameter) for parameter in model.parameters()}
        own = {id(parameter) for parameter in self._parameters()}
        for holder, name, parameter in zip(*self._places, strict=True):
            stranger = holder.get(name) is not None and id(holder[name]) not in own  # for one that is tied elsewhere
            if stranger or id(parameter) not in present:
                where = "at each of its places in" if id(parameter) in present else "in"
                raise ValueError(
                    f"parameter {self._names.get(id(parameter), name)!r} is no longer {where} the model: it was "
                    "replaced or removed, so this optimizer would update one that nothing uses there; write "
                    "p.data = value or p.copy_(value) to change a parameter, or make a new optimizer"
                )
        self._places = self._find_places(model)
