"""Functions that make ranks equal, for what an optimizer does not own."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any, overload

import torch

from heatopt.comm import Communicator, world
from heatopt.optim._data_parallel import DataParallelOptimizer
from heatopt.sync import average_tensors, broadcast_state, broadcast_tensors

__all__ = ["broadcast_optimizer_state", "broadcast_parameters", "reduce_metric", "sync_buffers"]


def broadcast_parameters(
    model: torch.nn.Module | Iterable[torch.Tensor], root: int = 0, comm: Communicator | None = None
) -> None:
    """Overwrite a module's parameters and buffers, or the given tensors, with those of rank ``root``. Collective.

    Raises:
        ValueError: ``root`` is no rank.
        RankMismatchError: the ranks' tensors differ in number, shape or dtype.
    """
    _require(model, (torch.nn.Module, Iterable), "model", "a torch.nn.Module or an iterable of tensors")
    comm = world() if comm is None else comm
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else list(model)
    for tensor in tensors:
        _require(tensor, torch.Tensor, "model", "a torch.nn.Module or an iterable of tensors")
    comm.check_root(root)
    comm.agree_on([root, *((tuple(t.shape), str(t.dtype)) for t in tensors)], "broadcast_parameters()")
    broadcast_tensors(comm, tensors, root, "broadcast_parameters()")


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root: int = 0, comm: Communicator | None = None
) -> None:
    """Overwrite an optimizer's state and its groups' options with those of rank ``root``, bit for bit. Collective.

    Other ranks may have no state yet; their parameters must correspond to those of ``root``.

    Raises:
        ValueError: ``root`` is no rank.
        RankMismatchError: the ranks' optimizers have different parameters.
    """
    _require(optimizer, torch.optim.Optimizer, "optimizer", "a torch.optim.Optimizer")
    comm = world() if comm is None else comm
    comm.check_root(root)
    inner = optimizer.torch_optimizer if isinstance(optimizer, DataParallelOptimizer) else optimizer
    shapes = [[tuple(p.shape) for p in group["params"]] for group in inner.param_groups]
    comm.agree_on([root, type(inner).__name__, *shapes], "broadcast_optimizer_state()")
    if isinstance(optimizer, DataParallelOptimizer):
        optimizer.make_states_whole(root)
    broadcast_state(comm, inner, root)
    if isinstance(optimizer, DataParallelOptimizer):
        optimizer.states_are_equal()


def sync_buffers(model: torch.nn.Module, mode: str = "mean", comm: Communicator | None = None) -> None:
    """Make the buffers of ``model`` (BatchNorm's running statistics, say) equal on all ranks, in place. Collective.

    Args:
        model: the module; its buffers have the same shapes and dtypes on all ranks.
        mode: "mean" averages floating and complex buffers and takes integer ones (``num_batches_tracked``) from rank 0;
            "broadcast" takes all from rank 0.
        comm: the ranks; default :func:`heatopt.world`.

    Raises:
        ValueError: unknown mode.
        RankMismatchError: the ranks' buffers differ in number, shape or dtype.
    """
    _require(model, torch.nn.Module, "model", "a torch.nn.Module")
    if mode not in ("mean", "broadcast"):
        raise ValueError(f"mode must be 'mean' or 'broadcast', got {mode!r}")
    comm = world() if comm is None else comm
    buffers = list(model.buffers())
    comm.agree_on([mode, *((tuple(b.shape), str(b.dtype)) for b in buffers)], "sync_buffers()")
    if mode == "mean":
        average_tensors(comm, buffers)
    else:
        broadcast_tensors(comm, buffers, 0, "sync_buffers()")


@overload
def reduce_metric(value: torch.Tensor, op: str = "mean", comm: Communicator | None = None) -> torch.Tensor: ...
@overload
def reduce_metric(value: float, op: str = "mean", comm: Communicator | None = None) -> float: ...
def reduce_metric(value: Any, op: str = "mean", comm: Communicator | None = None) -> torch.Tensor | float:
    """Reduce a metric over all ranks, so that all decide alike by it. Collective.

    >>> plateau.step(heatopt.reduce_metric(loss))

    Args:
        value: this rank's, which stays as it is: a number, or a tensor of the same shape and dtype on all ranks.
        op: "mean", "sum", "max" or "min". The mean is one of ranks: with batches of different sizes reduce sums and
            counts, and divide.
        comm: the ranks; default :func:`heatopt.world`.

    Returns:
        Equal on all ranks, a NaN too: for a number a float, reduced in float64; for a tensor a new one of its shape,
        dtype and device, without gradient.

    Raises:
        TypeError: neither a number nor a tensor; or a dtype that has no such reduction, as the mean of integers.
        ValueError: unknown ``op``.
        RankMismatchError: the ranks' values differ in shape or dtype, or their ``op`` does.
    """
    _require(comm, (Communicator, type(None)), "comm", "a heatopt.comm.Communicator or None")
    if isinstance(value, bool) or not isinstance(value, (torch.Tensor, Real)):
        raise TypeError(f"value must be a number or a torch.Tensor, got {value!r} of type {type(value).__name__}")
    comm = world() if comm is None else comm
    if isinstance(value, torch.Tensor):
        return comm.allreduce(value.detach().clone(), op)
    return comm.allreduce(torch.tensor(float(value), dtype=torch.float64), op).item()


def _require(value: object, kind: type | tuple[type, ...], name: str, allowed: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
