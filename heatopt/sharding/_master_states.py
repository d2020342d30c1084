"""State dicts with the masters beside torch's own entries; see [Note: Master weights]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from heatopt.sharding._masters import MASTER, Masters
from heatopt.sharding._states import AroundStates, States, uncast

__all__ = ["MASTERS", "MasterStates"]

MASTERS = "master_weights"
"""The entry of a state dict that has all masters, by the number of their parameter there."""


class MasterStates(AroundStates):
    """The states of an optimizer with masters.

    Args:
        optimizer: the wrapped one.
        states: hold its states, the masters among them.
        masters: say which parameters have one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, states: States, masters: Masters) -> None:
        super().__init__(optimizer, states)
        self._masters = masters
        masters.widen_states(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return _with_masters_beside(self._states.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict with or without masters; torch's cast to the dtypes of parameters is undone."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        masters = self._checked(state_dict, parameters)
        loaded: list[dict[str, Any]] = []  # what the hooks of the wrapped optimizer have made of it
        last_hook = self._optimizer.register_load_state_dict_pre_hook(lambda _, found: loaded.append(found))
        try:
            self._states.load_state_dict({key: value for key, value in state_dict.items() if key != MASTERS})
        finally:
            last_hook.remove()
        state, saved = self._optimizer.state, loaded[0]["state"]
        # Groups have other parameters only if the hooks have put other ones there.
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for number, parameter in zip(_numbers(loaded[0]), parameters, strict=True):
            if self._masters.has_one(parameter):
                if number in saved:
                    state[parameter] = uncast(state[parameter], saved[number])
                if number in masters:
                    state[parameter][MASTER] = masters[number].to(parameter.device, self._masters.dtype, copy=True)
        self._masters.widen_states(self._optimizer)

    def _checked(self, state_dict: dict[str, Any], parameters: Sequence[torch.Tensor]) -> dict[Any, torch.Tensor]:
        """The masters in ``state_dict``."""
        masters: dict[Any, torch.Tensor] = state_dict.get(MASTERS, {})
        for number, parameter in zip(_numbers(state_dict), parameters, strict=False):  # torch compares their counts
            master = masters.get(number)
            # A checkpoint gives each rank its part, which has one dimension.
            if master is not None and master.shape != parameter.shape and master.dim() != 1:
                raise ValueError(
                    f"the master weight of parameter {number} has shape {tuple(master.shape)}, but the parameter has "
                    f"{tuple(parameter.shape)}"
                )
        return masters

    def state_dict_in_parts(self) -> dict[str, Any]:
        return _with_masters_beside(self._states.state_dict_in_parts())

    def set(self, parameter: torch.Tensor, name: str, value: Any) -> None:
        """Replace one entry; a new master becomes the value of its parameter too, rounded."""
        if name == MASTER:
            self.require(parameter)
            if not self._masters.has_one(parameter):
                raise ValueError(f"a parameter of {parameter.dtype} has no master of {self._masters.dtype}")
            value = torch.as_tensor(value).to(parameter.device, self._masters.dtype)
            if value.shape != parameter.shape:
                raise ValueError(f"state {name!r} has shape {tuple(parameter.shape)}, got {tuple(value.shape)}")
        super().set(parameter, name, value)
        if name == MASTER:
            self.write(parameter, value)


def _numbers(state_dict: dict[str, Any]) -> list[Any]:
    return [number for group in state_dict["param_groups"] for number in group["params"]]


def _with_masters_beside(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Move the masters to an entry of their own; the dictionaries with the states are the optimizer's, and left."""
    state: dict[Any, Any] = {}
    masters: dict[Any, Any] = {}
    for number, entries in state_dict["state"].items():
        if isinstance(entries, dict) and MASTER in entries:
            masters[number] = entries[MASTER]
            entries = {key: value for key, value in entries.items() if key != MASTER}
            if not entries:
                continue
        state[number] = entries
    return {**state_dict, "state": state, MASTERS: masters}
