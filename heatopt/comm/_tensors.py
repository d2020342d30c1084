"""What may travel: checks of tensors, and their flat form."""

from __future__ import annotations

import torch

from heatopt.comm._collectives import REDUCE_OPS, REDUCIBLE

__all__ = ["check_reduction", "check_tensor", "describe_call", "flatten"]


def check_tensor(tensor: object) -> None:
    """Raise TypeError unless ``tensor`` is one."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(tensor).__name__}")


def check_reduction(tensor: torch.Tensor, op: str) -> None:
    """Raise TypeError or ValueError unless ``tensor`` can be reduced by ``op``."""
    check_tensor(tensor)
    if op not in REDUCE_OPS:
        raise ValueError(f"op must be one of {REDUCE_OPS}, got {op!r}")
    if tensor.layout != torch.strided or tensor.dtype not in REDUCIBLE:
        raise TypeError(f"cannot reduce a tensor of layout {tensor.layout} and dtype {tensor.dtype}; convert it first")
    if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(
            f"the mean of {tensor.dtype} is not of that dtype; convert the tensor to a floating dtype first"
        )
    if op in ("max", "min") and tensor.is_complex():
        raise TypeError(f"complex numbers have no {op}; reduce tensor.abs() instead")


def describe_call(name: str, blocking: bool) -> str:
    """Name of a call in messages and agreements: a blocking and a launched collective do not match each other."""
    return name if blocking else f"{name} (launched)"


def flatten(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as one contiguous dimension: a view where possible, else a copy (lazy conjugation included)."""
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1)
