"""Modules that are converted after wrapping: dtypes and memory formats (T27)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tests.ranks._training import (
    adamw,
    assert_close,
    assert_ranks_equal,
    batch,
    fill,
    loss_of,
    net,
    sgd,
    train,
    whole,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "double": lambda model: model.double(),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "data of one": lambda model: setattr(model[2].weight, "data", model[2].weight.data.double()) or model.double(),
}


@pytest.mark.parametrize("when", [0, 2], ids=["before-training", "later"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_t27_conversion_after_wrapping(ranks: Ranks, name: str, when: int) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)  # without state, which torch does not convert

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[..., Any]) -> None:
        for step in range(5):
            if step == when:
                CONVERSIONS[name](model)
            train(optimizer, model, [data(step, dtype=next(model.parameters()).dtype)])

    def body(comm: Communicator) -> None:
        model, expected = net(torch.float32), net(torch.float32)
        optimizer = wrap(comm, make, model, **({} if when else {"model": None}))
        run(optimizer, model, lambda step, dtype: batch(step, comm.rank, dtype=dtype))
        run(make(expected), expected, lambda step, dtype: whole(step, comm.size, dtype=dtype))
        dtype = expected[0].weight.dtype
        assert all(p.dtype is dtype and p.grad.dtype is dtype for p in model.parameters())
        tolerance = {torch.float16: 5e-3, torch.bfloat16: 5e-2}.get(dtype, 1e-5)
        assert_close(model, expected, rtol=tolerance, atol=tolerance)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t27_conversion_between_backward_and_step(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(torch.float32), net(torch.float32)
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        loss_of(model, batch(0, comm.rank, dtype=torch.float32)).backward()
        loss_of(expected, whole(0, comm.size, dtype=torch.float32)).backward()
        model.double()  # converts the gradients too
        expected.double()
        assert model[0].weight.grad.dtype is torch.float64
        optimizer.step()
        plain.step()
        assert_close(model, expected, rtol=1e-5)
        train(optimizer, model, [batch(1, comm.rank)])
        train(plain, expected, [whole(1, comm.size)])
        assert_close(model, expected, rtol=1e-5)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t27_memory_format_after_wrapping(ranks: Ranks) -> None:
    def build() -> nn.Module:
        return fill(
            nn.Sequential(
                nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Flatten(), nn.Linear(27, 3)
            ).double()
        )

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Any]) -> None:
        for step in range(3):
            if step == 1:
                model.to(memory_format=torch.channels_last)
            train(optimizer, model, [data(step)])

    def body(comm: Communicator) -> None:
        model, expected = build(), build()
        run(wrap(comm, adamw, model), model, lambda step: batch(step, comm.rank))
        run(adamw(expected), expected, lambda step: whole(step, comm.size))
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)
