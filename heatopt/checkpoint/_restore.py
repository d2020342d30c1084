"""Puts tensors where they belong, with the bits and the dtypes that they had."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

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
    optimizer.load_state_dict(saved)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        if index in exact and parameter in optimizer.state:
            optimizer.state[parameter] = _uncast(optimizer.state[parameter], exact[index])


def _uncast(loaded: Any, saved: Any) -> Any:
    """``loaded``, with the tensors of ``saved`` where the dtypes differ."""
    if isinstance(loaded, torch.Tensor) and isinstance(saved, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(saved, dict):
        for key in loaded:
            if key in saved:
                loaded[key] = _uncast(loaded[key], saved[key])
        return loaded
    if isinstance(loaded, (list, tuple)) and isinstance(saved, (list, tuple)) and len(loaded) == len(saved):
        return type(loaded)(_uncast(one, other) for one, other in zip(loaded, saved, strict=True))
    return loaded
