"""Puts tensors where they belong, with the bits and the dtypes that they had."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from heatopt.sharding import uncast

__all__ = ["restore_model", "restore_optimizer"]


def restore_model(model: torch.nn.Module, saved: Mapping[str, Any]) -> None:
    """Load the state of a module that has the same names."""
    state: OrderedDict[str, Any] = OrderedDict(saved)
    # Versions of the modules: without them some would take the state for one of an old torch.
    metadata = getattr(model.state_dict(), "_metadata", None)
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]
    model.load_state_dict(state)


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the state of an optimizer, and undo torch's casts to the dtype of the parameter."""
    exact = dict(saved["state"])
    for group, options in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        _move_options(options, group)
    optimizer.load_state_dict(saved)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        if index in exact and parameter in optimizer.state:
            optimizer.state[parameter] = uncast(optimizer.state[parameter], exact[index])
        if not parameter.is_contiguous():
            _arrange(optimizer.state.get(parameter, {}), parameter)


def _move_options(options: dict[str, Any], present: Mapping[str, Any]) -> None:
    """Tensors among the options, such as the learning rate, go where those are that they replace."""
    for name, value in options.items():
        if isinstance(value, torch.Tensor) and isinstance(present.get(name), torch.Tensor):
            options[name] = value.to(present[name].device)


def _arrange(state: dict[str, Any], parameter: torch.Tensor) -> None:
    """Give states of the parameter's shape its order in memory (channels last, say), as the algorithm itself does.

    Kernels are slower where the orders differ, and some round otherwise.
    """
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.shape == parameter.shape:
            state[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
