"""The norm of all gradients, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["clip_gradients"]

_HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def clip_gradients(
    gradients: Iterable[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> torch.Tensor:
    """Scale ``gradients`` in place so that their joint norm is at most ``max_norm``; return the norm before.

    As :func:`torch.nn.utils.clip_grad_norm_`, but half types are summed in single precision and sparse gradients
    count by their coalesced values.
    """
    values = [_values(gradient) for gradient in gradients]
    if not values:
        return torch.tensor(0.0)
    norms = [
        torch.linalg.vector_norm(value, norm_type, dtype=torch.float32 if value.dtype in _HALF else None)
        for value in values
    ]
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    total: torch.Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(values[0].device, widest) for norm in norms]), norm_type
    )
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


def _values(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.detach()
    if gradient.layout is torch.strided:
        return gradient
    # Averaged sparse gradients are coalesced; one that is not would count an index twice.
    return gradient._values() if gradient.is_coalesced() else _coalesce_in_place(gradient)


def _coalesce_in_place(gradient: torch.Tensor) -> torch.Tensor:
    coalesced = gradient.coalesce()
    gradient.copy_(coalesced)
    gradient._coalesced_(True)
    return gradient._values()
