"""The norm of all gradients, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["clip_gradients"]

_HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> torch.Tensor:
    """Scale the gradients of ``parameters`` in place so that their joint norm is at most ``max_norm``.

    Returns:
        The norm before.

    As :func:`torch.nn.utils.clip_grad_norm_`, but half types are summed in single precision and sparse gradients
    count by their coalesced values.
    """
    values = [_values(p) for p in parameters if p.grad is not None and p.grad.numel()]
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


def _values(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout is torch.strided:
        return gradient.detach()
    if not gradient.is_coalesced():
        # The sum of what stands for one index counts, not each part of it.
        parameter.grad = gradient = gradient.coalesce()
    return gradient.detach()._values()
