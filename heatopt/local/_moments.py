"""Which entries of an optimizer's state are moments, and of which order."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["moments_of"]

_FIRST = frozenset({"exp_avg", "momentum_buffer", "grad_avg", "ax"})
_SECOND = frozenset(
    {
        "acc_delta",
        "col_var",
        "exp_avg_sq",
        "exp_inf",
        "max_exp_avg_sq",
        "row_var",
        "square_avg",
        "sum",
        "variance",
    }
)


def moments_of(state: dict[str, Any], order: int) -> dict[str, torch.Tensor]:
    """The moments of ``order`` 1 or 2 in the state of one parameter, by name."""
    names = _FIRST if order == 1 else _SECOND
    return {name: value for name, value in sorted(state.items()) if name in names and _is_mean(value)}


def _is_mean(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
