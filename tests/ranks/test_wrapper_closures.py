"""Closures: the average is made inside them, and the algorithm sees the mean of the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._training import (
    assert_close,
    batch,
    loss_of,
    net,
    sgd,
    whole,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


@pytest.mark.parametrize("kind", ["number", "scalar", "one element", "none"])
def test_t05_step_returns_the_mean_loss(ranks: Ranks, kind: str) -> None:
    def returned(loss: torch.Tensor) -> Any:
        return {"number": loss.item(), "scalar": loss, "one element": loss.reshape(1), "none": None}[kind]

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        calls = 0

        def closure() -> Any:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = loss_of(model, batch(0, comm.rank))
            loss.backward()
            return returned(loss)

        loss = optimizer.step(closure)
        wanted = loss_of(expected, whole(0, comm.size))
        wanted.backward()
        plain.step()
        assert calls == 1
        assert_close(model, expected)
        if kind == "none":
            assert loss is None
        elif kind == "number":
            assert isinstance(loss, float)
            assert loss == pytest.approx(wanted.item(), rel=1e-12)
        else:
            assert loss.shape == returned(wanted).shape
            assert loss.dtype == torch.float64
            assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        assert len(set(comm.all_gather_object(loss.item() if isinstance(loss, torch.Tensor) else loss))) == 1

    ranks(body)


def test_t05_reduction_is_inside_the_closure(ranks: Ranks) -> None:
    """The closure replaces the gradients, so an average made before it would be lost."""

    def body(comm: Communicator) -> None:
        x = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([x], lr=1.0), comm=comm)

        def closure() -> torch.Tensor:
            x.grad = None
            loss = ((x - (comm.rank + 1)) ** 2 / 2).sum()
            (x.grad,) = torch.autograd.grad(loss, x)  # no hook sees this gradient
            return loss

        optimizer.step(closure)
        assert x.item() == pytest.approx((comm.size + 1) / 2, abs=1e-15)

    ranks(body)


def test_t05_loss_with_history_brings_no_warning(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(0, comm.rank))
            loss.backward()
            return loss

        optimizer.step(closure)

    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns at the first time only, which may have been in another test
    try:
        ranks(body)
    finally:
        torch.set_warn_always(always)


def test_t05_closure_with_keyword_and_no_grad_mode(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        for one, module, data in ((optimizer, model, batch(0, comm.rank)), (plain, expected, whole(0, comm.size))):

            def closure(one: Any = one, module: nn.Module = module, data: Any = data) -> torch.Tensor:
                assert torch.is_grad_enabled()  # also where step() is called without
                one.zero_grad()
                loss = loss_of(module, data)
                loss.backward()
                return loss

            with torch.no_grad():
                one.step(closure=closure)
        assert_close(model, expected)

    ranks(body)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_t06_lbfgs_on_rosenbrock(ranks: Ranks, line_search: str | None) -> None:
    """Each rank has some of the terms; iterates and the number of closure calls are those of one process."""
    terms = 12

    def part(x: torch.Tensor, numbers: range) -> torch.Tensor:
        """Mean of Rosenbrock terms with different constants."""
        return torch.stack([100 * (x[1] - x[0] ** 2) ** 2 / (1 + k) + (1 + k / 50 - x[0]) ** 2 for k in numbers]).mean()

    def run(wrapped: bool, comm: Communicator) -> tuple[list[list[float]], list[float], int]:
        x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        own = range(comm.rank, terms, comm.size) if wrapped else range(terms)
        optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
            [x], lr=0.01 if line_search is None else 1, max_iter=5, line_search_fn=line_search
        )
        if wrapped:
            optimizer = heatopt.DataParallelOptimizer(optimizer, comm=comm)
        calls = 0

        def closure() -> torch.Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = part(x, own)
            loss.backward()
            return loss.detach()

        iterates, losses = [], []
        for _ in range(3):
            losses.append(optimizer.step(closure).item())
            iterates.append(x.tolist())
        return iterates, losses, calls

    def body(comm: Communicator) -> list[list[float]] | None:
        if terms % comm.size:
            return None  # the mean of means needs equal parts
        found, expected = run(True, comm), run(False, comm)
        assert found[2] == expected[2]
        assert torch.tensor(found[0]).allclose(torch.tensor(expected[0]), rtol=1e-6)
        assert found[1] == pytest.approx(expected[1], rel=1e-6)
        return found[0]

    results = ranks(body)
    assert all(result == results[0] for result in results)
