"""Which wrapper averages a parameter's gradient: no more than one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["claim", "refuse_owned", "release"]

_owners: Any = WeakIdKeyDictionary()


def claim(parameters: Iterable[torch.Tensor], owner: torch.optim.Optimizer) -> None:
    """Note that ``owner`` averages the gradients of ``parameters``, as long as it lives."""
    reference = weakref.ref(owner)
    for parameter in parameters:
        _owners[parameter] = reference


def release(parameters: Iterable[torch.Tensor], owner: torch.optim.Optimizer) -> None:
    """``owner`` leaves ``parameters`` to another wrapper."""
    for parameter in parameters:
        found = _owners.get(parameter)
        if found is not None and found() is owner:
            del _owners[parameter]


def refuse_owned(
    parameters: Iterable[torch.Tensor], names: dict[int, str], owner: torch.optim.Optimizer | None = None
) -> None:
    """Raise ValueError if a parameter belongs to another wrapper than ``owner``."""
    for position, parameter in enumerate(parameters):
        found = _owners.get(parameter)
        if found is not None and found() not in (None, owner):
            raise ValueError(
                f"parameter {names.get(id(parameter), position)!r} belongs to another DataParallelOptimizer; "
                "delete that one first, or give each optimizer parameters of its own"
            )
