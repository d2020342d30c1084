"""The norm of all gradients, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from heatopt.sync import GradientShards

__all__ = ["clip_gradients"]

_HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[torch.Tensor],
    shards: GradientShards,
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
) -> torch.Tensor:
    """Scale gradients in place so that their joint norm is at most ``max_norm``. Collective if they are sharded.

    Args:
        parameters: their gradients are equal on all ranks.
        shards: what each rank keeps of the others.
        max_norm: largest norm allowed.
        norm_type: order of the norm.
        error_if_nonfinite: raise RuntimeError, on all ranks, if the norm is inf or nan.

    Returns:
        The norm before, equal on all ranks.

    As :func:`torch.nn.utils.clip_grad_norm_`, but half types are summed in single precision and sparse gradients
    count by their coalesced values.
    """
    values = _values(parameters)
    kept = _values(shards.holders())
    norms = _norms(values, norm_type)
    norms += shards.gather_norms(_joint(_norms(kept, norm_type), norm_type) if kept else None)
    if not norms:
        return torch.tensor(0.0)
    values += kept
    total = _joint(norms, norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"the {norm_type:g}-norm of the gradients is {total.item()}, so they cannot be clipped; "
            "pass error_if_nonfinite=False to scale by it anyway"
        )
    # The same arithmetic as torch's own clipping: the factor is at most 1, and applied without a branch on its value.
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for value in values:
        value.mul_(factor.to(value.device, torch.float64 if value.dtype == torch.float64 else torch.float32))
    return total


def _norms(values: list[torch.Tensor], norm_type: float) -> list[torch.Tensor]:
    return [
        torch.linalg.vector_norm(value, norm_type, dtype=torch.float32 if value.dtype in _HALF else None)
        for value in values
    ]


def _joint(norms: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    joint: torch.Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0].device, widest) for norm in norms]), norm_type
    )
    return joint


def _values(holders: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [_value(holder, holder.grad) for holder in holders if holder.grad is not None and holder.grad.numel()]


def _value(holder: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    if gradient.layout is torch.strided:
        return gradient.detach()
    if not gradient.is_coalesced():
        # The sum of what stands for one index counts, not each part of it.
        holder.grad = gradient = gradient.coalesce()
    return gradient.detach()._values()
