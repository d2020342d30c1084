"""State dicts with the residuals of compressed gradients beside torch's own entries; see [Note: Compression]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from heatopt.sharding._states import AroundStates, Carried, States
from heatopt.sync import Residuals

__all__ = ["RESIDUALS", "ResidualStates"]

RESIDUALS = "residuals"
"""The entry of a state dict that has this rank's residuals, by the name of their parameter."""


class ResidualStates(AroundStates):
    """The states of an optimizer whose gradients are compressed.

    Args:
        optimizer: the wrapped one.
        states: hold its states.
        residuals: of this rank; state dicts of other ranks have others.
        compressed: returns the parameters that may have one, with their number among all, by name.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        states: States,
        residuals: Residuals,
        compressed: Callable[[], dict[str, tuple[int, torch.Tensor]]],
    ) -> None:
        super().__init__(optimizer, states)
        self._residuals = residuals
        self._compressed = compressed

    def state_dict(self) -> dict[str, Any]:
        return self._with_residuals(self._states.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict with or without residuals; without, there are none from now on."""
        self._residuals.load(state_dict.get(RESIDUALS, {}), self._compressed())
        self._states.load_state_dict({key: value for key, value in state_dict.items() if key != RESIDUALS})

    def state_dict_in_parts(self) -> dict[str, Any]:
        return self._with_residuals(self._states.state_dict_in_parts())

    def _with_residuals(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, RESIDUALS: self._residuals.state(self._compressed())}

    def carried(self) -> Carried:
        return self._states.carried()._replace(unsent=self._residuals.contents())
