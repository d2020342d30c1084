"""Training the same model alone with the whole batch, and as one of many ranks with a part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heatopt import DataParallelOptimizer
from tests.support import parity
from tests.support.algorithms import Case

if TYPE_CHECKING:
    from heatopt.comm import Communicator

SMALL_BUCKET_MB = 0.0005
"""Spreads the parameters of :class:`~tests.support.problems.Net` over several buckets, some with more than one."""

Loss = Callable[[], Tensor]


def train(optimizer: torch.optim.Optimizer, losses: Iterable[Loss], use_closure: bool = False) -> None:
    """One step for each loss; a loss is computed from the parameters as they are."""
    for loss_function in losses:

        def closure(compute: Loss = loss_function) -> Tensor:
            optimizer.zero_grad()
            loss = compute()
            loss.backward()
            return loss

        if use_closure:
            optimizer.step(closure)  # type: ignore[arg-type]  # a loss as a tensor, as torch's own examples
        else:
            closure()
            optimizer.step()


def train_alone(
    case: Case, model: nn.Module, losses: Iterable[Loss], parameters: Iterable[Any] | None = None
) -> dict[str, Any]:
    """What a plain torch optimizer makes of ``model``: see :func:`~tests.support.parity.snapshot`."""
    optimizer = case.optimizer(model.parameters() if parameters is None else parameters)
    train(optimizer, losses, case.needs_closure)
    return parity.snapshot(model, optimizer)


def train_as_rank(
    comm: Communicator,
    case: Case,
    model: nn.Module,
    losses: Iterable[Loss],
    parameters: Iterable[Any] | None = None,
    /,
    **settings: Any,
) -> dict[str, Any]:
    """What the wrapper makes of ``model``, asserted to be equal on all ranks, to the last bit. Collective.

    Training starts from wrong parameters on all ranks but the first.
    """
    disturb(model, comm.rank)
    plain = case.optimizer(model.parameters() if parameters is None else parameters)
    optimizer = DataParallelOptimizer(plain, comm=comm, **({"bucket_mb": SMALL_BUCKET_MB} | settings))
    train(optimizer, losses, case.needs_closure)
    result = parity.snapshot(model, optimizer)
    parity.assert_ranks_equal(comm, result)
    return result


@torch.no_grad()
def disturb(model: nn.Module, rank: int) -> None:
    """Make the parameters of each rank but the first wrong, for a wrapper to put right."""
    for parameter in model.parameters():
        parameter.add_(rank)
