"""What is trained: an optimizer, its parameters' names and the model's buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from heatopt.sync import Fingerprint, ParameterPrint, printable_options

__all__ = ["PERIOD", "Subject"]

PERIOD = "sync_every"
"""The option of the groups that is the period; where a method has none, they do not have it."""


class Subject:
    """A torch optimizer as the engine sees it.

    Args:
        optimizer: torch's own.
        names: of parameters, by ``id``, for messages.
        model: the module whose buffers are averaged, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[int, str], model: torch.nn.Module | None) -> None:
        self.optimizer = optimizer
        self.names = names
        self.model = model
        self.trained: set[int] = set()
        """Indices of the parameters that an update may have changed since the construction."""

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups."""
        return self.optimizer.param_groups

    def parameters(self) -> list[torch.Tensor]:
        """All parameters, in the order of the groups."""
        return [p for group in self.groups for p in group["params"]]

    def periods(self) -> tuple[Any, ...]:
        """What the groups say that the next period is to be; None for one that says nothing."""
        return tuple(group.get(PERIOD) for group in self.groups)

    def buffers(self) -> list[torch.Tensor]:
        """The model's buffers."""
        return [] if self.model is None else list(self.model.buffers())

    def note_trained(self) -> None:
        """An update is about to happen."""
        if len(self.trained) == sum(len(group["params"]) for group in self.groups):
            return
        for index, parameter in enumerate(self.parameters()):
            if parameter.requires_grad:
                self.trained.add(index)

    def among(self, indices: Sequence[int]) -> tuple[int, ...]:
        """Those of ``indices`` whose parameters may differ between ranks."""
        return tuple(index for index in indices if index in self.trained)

    def fingerprint(self, settings: tuple[tuple[str, str], ...], outer: list[dict[str, Any]]) -> Fingerprint:
        """What must be equal on all ranks."""
        described: list[ParameterPrint] = []
        for number, group in enumerate(self.groups):
            for parameter in group["params"]:
                name = self.names.get(id(parameter), f"parameter {len(described)}")
                shape, dtype, device = tuple(parameter.shape), str(parameter.dtype), parameter.device.type
                manner = "dense" if parameter.requires_grad else "no"
                described.append(ParameterPrint(name, shape, dtype, device, number, manner))
        options = tuple(printable_options(group) for group in (*self.groups, *outer))
        return Fingerprint(settings, options, tuple(described))
