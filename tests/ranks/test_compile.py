"""torch.compile: the order in which hooks fire decides nothing (T3), and collectives stay out of graphs (T26).

Compilation is not for several threads at once, so several ranks compile under a launcher only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tests.ranks._training import (
    MODES,
    adamw,
    assert_close,
    assert_ranks_equal,
    batch,
    every_mode,
    loss_of,
    net,
    reference,
    sgd,
    train,
    whole,
    wrap,
)
from tests.support.designs import combinations
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

# Warnings about deprecated things that torch's own compiler uses.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def compiler(ranks: Ranks) -> Iterator[None]:
    if ranks.size > 1 and not LAUNCH.launched:
        pytest.skip("torch.compile is not for several threads at once: run it under mpiexec or torchrun")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="aot_eager")


@pytest.mark.parametrize(
    ("who", "mode"),
    [pytest.param(w, *m.values, id=f"{w}-{m.id}") for w, m in combinations(["all", "first", "last"], MODES)],
)
def test_t03_some_ranks_compile(ranks: Ranks, who: str, mode: dict[str, Any]) -> None:
    """Hooks of a compiled model fire in another order; sums and buckets are the same."""

    def body(comm: Communicator) -> None:
        compiling = {"all": range(comm.size), "first": [0], "last": [comm.size - 1]}[who]
        model, expected = net(), net()
        optimizer = wrap(comm, adamw, model, **mode)
        forward = compiled(model) if comm.rank in compiling else model
        train(optimizer, forward, [batch(step, comm.rank) for step in range(3)])
        assert_close(optimizer, reference(adamw, expected, comm.size, 3))
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@every_mode
def test_t03_order_of_hooks(ranks: Ranks, mode: dict[str, Any]) -> None:
    """Each rank uses the layers in an order of its own, so hooks fire in another one, without a compiler."""

    def body(comm: Communicator) -> None:
        def forward(layers: nn.ModuleList, x: torch.Tensor, shift: int) -> torch.Tensor:
            for number in range(len(layers)):
                x = torch.tanh(layers[(number + shift) % len(layers)](x))
            return x

        def build() -> nn.ModuleList:
            layers = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(4))
            for number, parameter in enumerate(layers.parameters()):
                torch.nn.init.constant_(parameter, 0.1 * (number + 1))
            return layers

        model, expected = build(), build()
        optimizer, plain = wrap(comm, adamw, model, **mode), adamw(expected)
        for step in range(2):
            optimizer.zero_grad()
            plain.zero_grad()
            forward(model, batch(step, comm.rank)[0], comm.rank).square().mean().backward()
            parts = [forward(expected, batch(step, r)[0], r).square().mean() for r in range(comm.size)]
            (torch.stack(parts).sum() / comm.size).backward()
            optimizer.step()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping", "in place"])
def test_t26_model_compiled(ranks: Ranks, when: str) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        forward: nn.Module = model
        if when == "before wrapping":
            forward = compiled(model)
            optimizer = wrap(comm, adamw, forward)
        else:
            optimizer = wrap(comm, adamw, model)
            if when == "in place":
                model.compile(backend="aot_eager")
            else:
                forward = compiled(model)
        train(optimizer, forward, [batch(step, comm.rank) for step in range(3)])
        assert_close(optimizer, reference(adamw, expected, comm.size, 3))
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


# The compiler makes torch's AdamW compute its corrections in single precision.
IN_STEP = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize("make", [sgd, adamw], ids=lambda make: make.__name__)
def test_t26_step_compiled(ranks: Ranks, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """As torch's tutorial compiles an optimizer: ``step`` in a compiled function, also with gradients set by hand."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, make, model), make(expected)

        @compiled
        def update() -> None:
            optimizer.step()

        for step in range(3):
            optimizer.zero_grad()
            plain.zero_grad()
            loss_of(model, batch(step, comm.rank)).backward()
            loss_of(expected, whole(step, comm.size)).backward()
            if step == 1:
                for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
                    parameter.grad = parameter.detach() * (comm.rank + 1)
                    other.grad = other.detach() * (comm.size + 1) / 2
            update()
            plain.step()
        assert_close(model, expected, **IN_STEP)
        assert_close(optimizer, plain, **IN_STEP)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t26_bound_step_compiled(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, adamw, model)
        step_of = compiled(optimizer.step)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, batch(step, comm.rank)).backward()
            step_of()
        assert_close(optimizer, reference(adamw, expected, comm.size, 3), **IN_STEP)
        assert_close(model, expected, **IN_STEP)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t26_whole_step_compiled(ranks: Ranks) -> None:
    """Forward, backward and step in one compiled function."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, adamw, model)

        @compiled
        def update(x: torch.Tensor, y: torch.Tensor) -> None:
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.clip_grad_norm_(1e6)
            optimizer.step()

        for step in range(3):
            update(*batch(step, comm.rank))
        assert_close(optimizer, reference(adamw, expected, comm.size, 3), **IN_STEP)
        assert_close(model, expected, **IN_STEP)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t26_no_sync_and_closure_under_the_compiler(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        forward = compiled(model)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(forward, batch(2, comm.rank))
            loss.backward()
            return loss.detach()

        with optimizer.no_sync():
            loss_of(forward, batch(0, comm.rank)).backward()
        loss_of(forward, batch(1, comm.rank)).backward()
        optimizer.step()
        optimizer.step(closure)
        for step in range(2):
            loss_of(expected, whole(step, comm.size)).backward()
        plain.step()
        train(plain, expected, [whole(2, comm.size)])
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)
