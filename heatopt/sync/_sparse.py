"""Averages of sparse gradients: indices and values travel, never a dense copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from heatopt.comm import Communicator

__all__ = ["average_sparse"]

_ABSENT = -1


def average_sparse(
    channel: Communicator, parameters: Sequence[torch.Tensor], divisor: float, share: float | None
) -> list[torch.Tensor | None]:
    """Return the mean over ranks of each parameter's gradient as a coalesced sparse tensor.

    ``None`` where no rank has a gradient. A rank without one counts as zero. Entries are summed in rank order, half
    types in single precision, so all ranks get the same bits. Collective; parameters in the same order on all ranks.

    Args:
        channel: the ranks.
        parameters: whose gradients.
        divisor: what the sums are divided by.
        share: what this rank's gradients are multiplied by before; None if it has none, and counts as zero.
    """
    gradients = [None if share is None else _coalesced(parameter, share) for parameter in parameters]
    counts = np.array([_ABSENT if g is None else g._nnz() for g in gradients], dtype=np.int64)
    table = channel.exchange_words(counts, "exchange of sparse gradients' sizes")
    return [
        _average_one(channel, parameter, gradient, table[:, position], divisor)
        for position, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True))
    ]


def _coalesced(parameter: torch.Tensor, share: float) -> torch.Tensor | None:
    gradient = parameter.grad
    if gradient is None:
        return None
    gradient = gradient.detach()
    # A dense gradient of a parameter that is sparse elsewhere: its rows.
    gradient = gradient.coalesce() if gradient.is_sparse else gradient.to_sparse(1)
    if share == 1.0:
        return gradient
    return gradient * share if share else torch.zeros_like(gradient).coalesce()


def _average_one(
    channel: Communicator,
    parameter: torch.Tensor,
    gradient: torch.Tensor | None,
    counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    divisor: float,
) -> torch.Tensor | None:
    if (counts == _ABSENT).all():
        return None
    longest = int(counts.max())
    # A rank without a gradient does not know how many dimensions are sparse: one, but for exotic layouts.
    own_dims = np.array([0 if gradient is None else gradient.sparse_dim()], dtype=np.int64)
    sparse_dims = int(channel.exchange_words(own_dims, "exchange of sparse gradients' layout").max())
    indices = torch.zeros(sparse_dims, longest, dtype=torch.int64, device=parameter.device)
    values = torch.zeros(longest, *parameter.shape[sparse_dims:], dtype=parameter.dtype, device=parameter.device)
    if gradient is not None:
        if gradient.sparse_dim() != sparse_dims:
            gradient = gradient.to_dense().to_sparse(sparse_dims)
        indices[:, : gradient._nnz()] = gradient.indices()
        values[: gradient._nnz()] = gradient.values()
    what = "exchange of sparse gradients"
    all_indices = channel.gather_rows(indices.view(-1), what).view(channel.size, *indices.shape)
    flat = values.contiguous().view(-1)
    all_values = channel.gather_rows(flat, what).view(channel.size, *values.shape)
    kept = [(rank, max(int(count), 0)) for rank, count in enumerate(counts)]
    joined_indices = torch.cat([all_indices[rank, :, :count] for rank, count in kept], dim=1)
    joined_values = torch.cat([all_values[rank, :count] for rank, count in kept])
    if parameter.dtype in (torch.float16, torch.bfloat16):
        joined_values = joined_values.float()
    total = torch.sparse_coo_tensor(joined_indices, joined_values, parameter.shape, check_invariants=False).coalesce()
    values = total.values()
    # Real and imaginary parts are divided each, as in a dense reduction; a complex division rounds otherwise.
    mean = torch.view_as_complex(torch.view_as_real(values) / divisor) if values.is_complex() else values / divisor
    mean = mean.to(parameter.dtype)
    return torch.sparse_coo_tensor(total.indices(), mean, parameter.shape, is_coalesced=True, check_invariants=False)
