"""Weights that are refused, on all ranks, and what can be done after that."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch

from heatopt.errors import HeatoptError, RankMismatchError
from tests.ranks._training import (
    assert_equal,
    assert_ranks_equal,
    batch,
    loss_of,
    net,
    sgd,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (-1, ValueError),
        (-0.5, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        (None, TypeError),
        ("5", TypeError),
        (torch.tensor(5.0), TypeError),
        (2j, TypeError),
    ],
)
def test_wrong_weights(ranks: Ranks, weight: Any, error: type[Exception]) -> None:
    def body(comm: Communicator) -> None:
        optimizer = wrap(comm, sgd, net())
        with pytest.raises(error, match="number of samples or tokens"):
            optimizer.weight(weight)
        if weight is not None:
            with pytest.raises(error, match="number of samples or tokens"):
                optimizer.step(weight=weight)

    ranks(body)


def test_wrong_uses(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        with pytest.raises(ValueError, match="inside the closure"):
            optimizer.step(lambda: None, weight=3)
        with optimizer.weight(2), pytest.raises(HeatoptError, match="nested"), optimizer.weight(3):
            pass
        with pytest.raises(HeatoptError, match="have a weight already"):
            optimizer.step(weight=3)
        optimizer.zero_grad()
        loss_of(model, batch(0, comm.rank)).backward()
        optimizer.step()
        assert_ranks_equal(comm, model)

    ranks(body)


def test_step_weight_comes_too_late(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        before = [p.detach().clone() for p in model.parameters()]
        loss_of(model, batch(0, comm.rank)).backward()
        with pytest.raises(ValueError, match=r"no effect.*with optimizer\.weight"):
            optimizer.step(weight=3)
        assert_equal(list(model.parameters()), before)
        optimizer.step()
        assert_ranks_equal(comm, model)

    ranks(body, min_size=2)


def test_backward_without_weight_on_top(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        with optimizer.weight(2):
            loss_of(model, batch(0, comm.rank)).backward()
        with pytest.raises(HeatoptError, match=r"without a weight.*zero_grad"):
            loss_of(model, batch(0, comm.rank)).backward()
        optimizer.zero_grad()
        loss_of(model, batch(0, comm.rank)).backward()
        optimizer.step()
        assert_ranks_equal(comm, model)

    ranks(body, min_size=2)


@pytest.mark.parametrize("odd", ["first", "last"])
@pytest.mark.parametrize("at", ["backward", "local", "step"])
def test_ranks_disagree(ranks: Ranks, at: str, odd: str) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        is_odd = comm.rank == (0 if odd == "first" else comm.size - 1)
        if at == "step":
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with pytest.raises(RankMismatchError, match=r"step\(weight=n\)"):
                optimizer.step(**({} if is_odd else {"weight": 2}))
            return

        def train() -> None:
            with (
                nullcontext() if is_odd else optimizer.weight(2),
                optimizer.no_sync() if at == "local" else nullcontext(),
            ):
                loss_of(model, batch(0, comm.rank)).backward()
            optimizer.step()

        with pytest.raises(RankMismatchError, match=r"gave its gradients a weight, rank . called backward\(\) without"):
            train()

    ranks(body, min_size=2)
