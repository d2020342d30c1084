"""reduce_metric: one number for all ranks, by which all decide alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import heatopt
from tests.ranks._training import adamw, assert_close, assert_equal, assert_ranks_equal, batch, net, train, whole, wrap
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

OF_ALL: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: math.fsum(values) / len(values),
    "sum": math.fsum,
    "max": max,
    "min": min,
}


@pytest.mark.parametrize("op", OF_ALL)
@pytest.mark.parametrize("kind", [float, int, np.float32, np.int64, Fraction])
def test_numbers(ranks: Ranks, op: str, kind: Any) -> None:
    def body(comm: Communicator) -> None:
        found = heatopt.reduce_metric(kind(3 * comm.rank - 2), op, comm)
        assert type(found) is float
        assert found == OF_ALL[op]([3 * rank - 2 for rank in range(comm.size)])

    ranks(body)


def test_numbers_are_reduced_in_float64(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        found = heatopt.reduce_metric(1 + comm.rank * 2.0**-50, comm=comm)
        assert found == 1 + (comm.size - 1) / 2 * 2.0**-50

    ranks(body)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5)])
@pytest.mark.parametrize("op", OF_ALL)
def test_tensors(ranks: Ranks, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def body(comm: Communicator) -> None:
        own = torch.full(shape, 4.0 * comm.rank - 1, dtype=dtype, requires_grad=True)
        before = own.detach().clone()
        found = heatopt.reduce_metric(own * 1, op, comm)
        expected = OF_ALL[op]([4.0 * rank - 1 for rank in range(comm.size)])
        assert_equal(found, torch.full(shape, expected, dtype=dtype))
        assert not found.requires_grad
        assert_equal(heatopt.reduce_metric(own, op, comm), found)
        assert_equal(own, before)
        assert_ranks_equal(comm, found)

    ranks(body)


def test_counts(ranks: Ranks) -> None:
    """How many predictions were right: sums of integers stay integers, and their mean is refused on all ranks."""

    def body(comm: Communicator) -> None:
        right = torch.tensor([comm.rank, 2])
        assert_equal(heatopt.reduce_metric(right, "sum", comm), torch.tensor([sum(range(comm.size)), 2 * comm.size]))
        with pytest.raises(TypeError, match="convert the tensor to a floating dtype first"):
            heatopt.reduce_metric(right, comm=comm)

    ranks(body)


def test_nan_of_one_rank_is_everybodys(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        assert math.isnan(heatopt.reduce_metric(math.nan if comm.rank == comm.size - 1 else 1.0, comm=comm))

    ranks(body)


@pytest.mark.parametrize("shard", ["none", "state"])
def test_plateau_of_the_mean(ranks: Ranks, shard: str) -> None:
    """Ranks have different losses, yet their learning rates fall together: when those of one process would."""
    # By step, for any number of ranks: the mean goes down, then up; each rank's own goes another way.
    means = [5.0, 4.0, 4.5, 4.75, 3.0, 3.5, 3.75]

    def follow(optimizer: Any, model: Any, data: Callable[[int], Any], metric: Callable[[int], float]) -> list[float]:
        plateau = heatopt.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
        rates = []
        for step in range(len(means)):
            train(optimizer, model, [data(step)])
            plateau.step(metric(step))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    def body(comm: Communicator) -> None:
        def own(step: int) -> float:
            return means[step] + (-1) ** step * (comm.rank - (comm.size - 1) / 2) * 8

        model, expected = net(), net()
        found = follow(
            wrap(comm, adamw, model, shard=shard),
            model,
            lambda step: batch(step, comm.rank),
            lambda step: heatopt.reduce_metric(own(step), comm=comm),
        )
        rates = follow(adamw(expected), expected, lambda step: whole(step, comm.size), means.__getitem__)
        assert found == rates
        assert len(set(rates)) == 3
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        ("0.5", {}, TypeError, r"value must be a number or a torch\.Tensor, got '0\.5' of type str"),
        (None, {}, TypeError, r"value must be a number or a torch\.Tensor, got None of type NoneType"),
        (True, {}, TypeError, r"value must be a number or a torch\.Tensor, got True of type bool"),
        ([0.5], {}, TypeError, r"value must be a number or a torch\.Tensor, got \[0\.5\] of type list"),
        (0.5, {"op": "median"}, ValueError, r"op must be one of \('sum', 'mean', 'max', 'min'\), got 'median'"),
        (0.5, {"comm": 3}, TypeError, r"comm must be a heatopt\.comm\.Communicator or None, got 3 of type int"),
    ],
)
def test_wrong_arguments(
    ranks: Ranks, value: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(error, match=f"^{message}"):
            heatopt.reduce_metric(value, **{"comm": comm, **options})

    ranks(body)


@pytest.mark.parametrize(
    ("first", "last"), [(torch.zeros(2), torch.zeros(3)), (0.5, torch.tensor(0.5)), (torch.zeros(1), torch.zeros(()))]
)
def test_values_that_differ_in_kind(ranks: Ranks, first: Any, last: Any) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(heatopt.RankMismatchError):
            heatopt.reduce_metric(last if comm.rank == comm.size - 1 else first, comm=comm)

    ranks(body, min_size=2)
