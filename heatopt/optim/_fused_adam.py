"""Adam on flat memory, by the arguments of torch_npu's fused Adam."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import zip_longest
from operator import is_
from typing import Any

import torch

from heatopt.optim._closures import Closure
from heatopt.optim._data_parallel import DataParallelOptimizer

__all__ = ["FusedAdam"]

_AVERAGES = frozenset(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
_Place = tuple[dict[str, Any], str, torch.Tensor]


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
    _places: Sequence[_Place] = ()
    _known: Sequence[Any] | None = None  # the parameters; in a copy None, until its first step
    _memory_known: Sequence[Any] = ()  # address and shape of the parameters after the last step

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

    def step(self, closure: Closure | None = None, *, weight: float | None = None) -> Any:
        parameters = self._parameters()
        self._check_groups(parameters)
        exchanged = _memory_of(parameters) != self._memory_known
        if exchanged:
            for position, parameter in enumerate(parameters):
                self._fit_state(position, parameter)
        if not all(place.get(name) is parameter for place, name, parameter in self._places):
            self._check_module()
        result = super().step(closure, weight=weight)
        if exchanged:
            # Where they are now, in flat memory, no other tensor can come to lie; where they were, one may.
            self._memory_known = _memory_of(parameters)
        return result

    step.hooked = True  # type: ignore[attr-defined]  # as in the base class

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._known = self._parameters()
        if self._model is not None and self._model() is not None:
            self._places = self._find_places(self._model())

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

    def _fit_state(self, position: int, parameter: torch.Tensor) -> None:
        """Take the state along to the parameter's present dtype and device."""
        state = self.state.get(parameter, {})
        for key in _AVERAGES & state.keys():
            if state[key].shape != parameter.shape:
                name, shape = self._names.get(id(parameter), position), tuple(parameter.shape)
                raise ValueError(
                    f"parameter {name!r} has another shape, {shape}, than its state, {tuple(state[key].shape)}: "
                    "delete that (del optimizer.state[p]) to start anew, or make a new optimizer"
                )
            state[key] = state[key].to(parameter)

    def _find_places(self, model: torch.nn.Module) -> list[_Place]:
        """Where the module keeps the optimizer's parameters."""
        own = {id(parameter) for parameter in self._parameters()}
        return [
            (module._parameters, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in own
        ]

    def _check_module(self) -> None:
        """Raise ValueError if a parameter has left the module; it may have moved within it (by a parametrization)."""
        model = self._model()
        if model is None:
            return
        present = {id(parameter) for parameter in model.parameters()}
        own = {id(parameter) for parameter in self._parameters()}
        for place, name, parameter in self._places:
            stranger = place.get(name) is not None and id(place[name]) not in own  # for one that is tied elsewhere
            if stranger or id(parameter) not in present:
                where = "at each of its places in" if id(parameter) in present else "in"
                raise ValueError(
                    f"parameter {self._names.get(id(parameter), name)!r} is no longer {where} the model: it was "
                    "replaced or removed, so this optimizer would update one that nothing uses there; write "
                    "p.data = value or p.copy_(value) to change a parameter, or make a new optimizer"
                )
        self._places = self._find_places(model)


def _memory_of(parameters: Sequence[torch.Tensor]) -> list[Any]:
    """Where parameters are; with their shapes, since a part or another view of one may begin at its address."""
    return [*map(torch.Tensor.data_ptr, parameters), *map(torch.Tensor.size, parameters)]
