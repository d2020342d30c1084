"""Compressed gradients that are cleared before an update have not been used: they leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._compression import (
    STEPS,
    TOP,
    Reference,
    gradients_of,
    largest,
    residuals,
    still,
)
from tests.ranks._training import (
    TINY,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    gradients,
    loss_of,
    net,
    train,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


def delete(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def delete_and_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    delete(optimizer, model)
    optimizer.step()


CLEAR: dict[str, Callable[[Any, nn.Module], object]] = {
    "optimizer": lambda optimizer, model: optimizer.zero_grad(),
    "module": lambda optimizer, model: model.zero_grad(),
    "zeros": lambda optimizer, model: model.zero_grad(set_to_none=False),
    "by hand": delete,
    "before the step": delete_and_step,
}


@pytest.mark.parametrize("local", [False, True], ids=["at once", "accumulated"])
@pytest.mark.parametrize("how", CLEAR)
def test_gradients_that_are_cleared_leave_no_trace(ranks: Ranks, how: str, local: bool) -> None:
    """By whatever means; what comes next may be synchronised, or accumulate first."""

    def body(comm: Communicator) -> None:
        results = []
        for clear in (None, CLEAR[how]):
            model = net()
            optimizer = wrap(comm, adamw, model, compression=TOP)
            for step in range(STEPS):
                if clear is not None:
                    loss_of(model, batch(step + 100, comm.rank)).backward()
                    clear(optimizer, model)
                if local:
                    with optimizer.no_sync():
                        loss_of(model, batch(step + 200, comm.rank)).backward()
                loss_of(model, batch(step, comm.rank)).backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append([model, residuals(optimizer)])
            del optimizer
        assert_equal(*results)
        assert_ranks_equal(comm, results[1][0])

    ranks(body, min_size=2)


@pytest.mark.parametrize("bucket_mb", [TINY, 8], ids=["many buckets", "one bucket"])
def test_some_gradients_are_cleared(ranks: Ranks, bucket_mb: float) -> None:
    """Of these the residuals are those of before; the others go on from what the average has left of them.

    The first to arrive, the last and one between are cleared, of which the next loss does not need the last.
    """
    cleared = (0, 2, 5)

    def body(comm: Communicator) -> None:
        model, source = net(), Reference(largest(0.2))
        optimizer = wrap(comm, still, model, compression=TOP, bucket_mb=bucket_mb)
        optimizer.zero_grad()
        for step in range(2):
            source.average([gradients_of(model, step, rank) for rank in range(comm.size)])
            train(optimizer, model, [batch(step, comm.rank)])
        before = {key: residual.clone() for key, residual in source.residuals.items()}
        optimizer.zero_grad()
        loss_of(model, batch(2, comm.rank)).backward()
        sent = source.average([gradients_of(model, 2, rank) for rank in range(comm.size)])
        assert_close(gradients(model), sent)
        parameters = list(model.parameters())
        for number in cleared:
            parameters[number].grad = None
            source.residuals |= {key: residual for key, residual in before.items() if key[1] == number}
        parameters[0].requires_grad_(False)
        loss_of(model, batch(3, comm.rank)).backward()
        parameters[0].requires_grad_(True)
        found = [gradients_of(model, 3, rank) for rank in range(comm.size)]
        for number, average in enumerate(sent):
            for of_rank in found:
                of_rank[number] += 0 if number in cleared or average is None else average
        averages = source.average([[None, *of_rank[1:]] for of_rank in found])
        assert_close(gradients(model), averages)
        optimizer.step()
        for key, residual in before.items():
            if key[1] == 0:
                source.residuals[key] = residual
        assert_close(residuals(optimizer), source.residuals_of(comm.rank, model))

    ranks(body, min_size=2)


def test_a_loss_that_needs_none_of_the_cleared_ones(ranks: Ranks) -> None:
    """Rank 0 sends of the first parameter what waited before that was cleared, since others have a gradient of it."""

    def body(comm: Communicator) -> None:
        first, second = (nn.Parameter(torch.zeros(4)) for _ in range(2))
        inner = torch.optim.SGD([first, second], lr=0.0)
        optimizer = heatopt.DataParallelOptimizer(inner, comm=comm, compression=heatopt.TopK(0.25))

        def backward(*gradient: float) -> None:
            own = torch.tensor(gradient) @ first if any(gradient) else second[0]
            own.backward()

        backward(4.0, 3.0, 2.0, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        backward(0.0, 0.0, 0.0, 5.0)
        first.grad = None
        backward(0.0, 0.0, 4.0 if comm.rank else 0.0, 0.0)
        others = (comm.size - 1) / comm.size
        assert_close(first.grad, torch.tensor([0.0, 3.0 * (1 - others), 6.0 * others, 0.0]), rtol=1e-6)
        optimizer.step()
        waiting, _ = residuals(optimizer).values()
        assert_equal(waiting, torch.tensor([0.0, 3.0, 0.0, 1.0] if comm.rank else [0.0, 0.0, 2.0, 1.0]))

    ranks(body, min_size=2)


def test_averages_that_are_zero_are_not_cleared(ranks: Ranks) -> None:
    """What ranks send may cancel, or be cancelled by what comes next: that has been used, not cleared."""

    def body(comm: Communicator) -> None:
        x = nn.Parameter(torch.zeros(3))
        optimizer = heatopt.DataParallelOptimizer(
            torch.optim.SGD([x], lr=0.0), comm=comm, compression=heatopt.TopK(0.3)
        )
        (x @ torch.tensor([-4.0 if comm.rank else 4.0 * (comm.size - 1), 1.0, 0.5])).backward()
        assert_equal(x.grad, torch.zeros(3))
        (x @ torch.tensor([0.0, 2.0, 0.0])).backward()
        assert_equal(x.grad, torch.tensor([0.0, 3.0, 0.0]))
        with optimizer.no_sync():
            (x @ torch.tensor([0.0, -3.0, 0.0])).backward()
        (x @ torch.tensor([1.0, 0.0, 0.0])).backward()
        assert_equal(x.grad, torch.tensor([1.0, 0.0, 0.0]))
        optimizer.step()
        assert_equal(residuals(optimizer), [torch.tensor([0.0, 0.0, 0.5])])

    ranks(body, min_size=2)
