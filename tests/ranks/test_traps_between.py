"""What users do with gradients between backward and step, and gradients of unusual make (T31, T32)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._training import (
    TINY,
    Batch,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    fill,
    generator,
    gradients,
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


buckets = pytest.mark.parametrize("bucket_mb", [TINY, 8], ids=["many-buckets", "one-bucket"])
blocking = pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])


Between = Callable[[torch.optim.Optimizer, nn.Module], None]


def _clear(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad(set_to_none=True)


def _zero(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad(set_to_none=False)


def _drop_all(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _drop_some(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    model[0].weight.grad = None
    model[4].bias.grad = None


def _clip(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def _clip_values(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def _scale(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad *= 0.5


def _detach(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad.detach_()


def _replace(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.grad * 0.5


def _drop_and_replace(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Neighbours in one bucket: the one that is gone must not come back when the other one is averaged."""
    model[0].weight.grad = None
    model[0].bias.grad = model[0].bias.grad * 0.5


def _replace_data(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad.data = parameter.grad.data * 0.5


@blocking
@pytest.mark.parametrize(
    "between",
    [
        _clear,
        _zero,
        _drop_all,
        _drop_some,
        _clip,
        _clip_values,
        _scale,
        _detach,
        _replace,
        _drop_and_replace,
        _replace_data,
    ],
    ids=lambda between: between.__name__[1:],
)
def test_t31_between_backward_and_step(ranks: Ranks, between: Between, blocking: bool) -> None:
    """What users do with gradients before step() has the effect that it has in one process; one rank is late."""

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Batch], late: bool) -> None:
        for step in range(2):
            optimizer.zero_grad()
            if late:
                time.sleep(0.003)
            loss_of(model, data(step)).backward()
            between(optimizer, model)
            optimizer.step()

    def body(comm: Communicator) -> None:
        for bucket_mb in (TINY, 8):
            model, expected = net(), net()
            optimizer = wrap(comm, adamw, model, blocking=blocking, bucket_mb=bucket_mb)
            plain = adamw(expected)
            run(optimizer, model, lambda step: batch(step, comm.rank), comm.rank == comm.size - 1)
            run(plain, expected, lambda step: whole(step, comm.size), False)
            assert_close(model, expected)
            assert_close(optimizer, plain)
            assert_ranks_equal(comm, model, optimizer)
            del optimizer

    ranks(body)


@blocking
def test_t31_kept_gradient_is_the_users(ranks: Ranks, blocking: bool) -> None:
    """Step leaves gradients as they are, and a clone of them outlives the next backward."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model, blocking=blocking)
        loss_of(model, batch(0, comm.rank)).backward()
        kept = gradients(model)
        before = [p.grad for p in model.parameters()]
        optimizer.step()
        assert_equal(before, kept)
        optimizer.zero_grad()
        train(optimizer, model, [batch(1, comm.rank)])
        first = net()
        loss_of(first, whole(0, comm.size)).backward()
        assert_close(kept, gradients(first))

    ranks(body)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_t32_gradients_with_a_history(ranks: Ranks) -> None:
    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Batch]) -> None:
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, data(step)).backward(create_graph=True)
            optimizer.step()
        optimizer.zero_grad()  # breaks the cycle of parameter and gradient

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        run(wrap(comm, sgd, model), model, lambda step: batch(step, comm.rank))
        run(sgd(expected), expected, lambda step: whole(step, comm.size))
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t32_gradient_penalty(ranks: Ranks) -> None:
    """Double backward, as in WGAN-GP: the inner derivative is taken without hooks, the outer one fires them."""

    def loss_with_penalty(model: nn.Module, data: Batch) -> torch.Tensor:
        x = data[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean() + loss_of(model, data)

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Batch]) -> None:
        for step in range(3):
            optimizer.zero_grad()
            loss_with_penalty(model, data(step)).backward()
            optimizer.step()

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        run(wrap(comm, adamw, model), model, lambda step: batch(step, comm.rank))
        run(adamw(expected), expected, lambda step: whole(step, comm.size))
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t32_gradient_with_a_history_set_by_hand(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
        parameter.grad = parameter * (comm.rank + 1)
        assert parameter.grad.requires_grad
        optimizer.step()
        assert_close(parameter, torch.full((3,), 1 - (comm.size + 1) / 2, dtype=torch.float64))

    ranks(body)


@blocking
@buckets
def test_t32_layouts(ranks: Ranks, bucket_mb: float, blocking: bool) -> None:
    """Channels last, transposed parameters, expanded and permuted gradients."""

    class Layouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(2, 3, 2)
            self.turned = nn.Parameter(torch.empty(5, 3).T)
            self.gaps = nn.Parameter(torch.empty(4, 6)[:, ::2])
            self.summed = nn.Parameter(torch.empty(3, 5))
            self.expanded = nn.Parameter(torch.empty(7))
            fill(self.double())
            self.convolution.to(memory_format=torch.channels_last)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            images = x.view(-1, 2, 2, 2).contiguous(memory_format=torch.channels_last)
            hidden = self.convolution(images).flatten(1)
            return hidden @ self.turned + (hidden @ self.summed) ** 2 + self.gaps.mean() ** 2 + self.expanded.sum()

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], torch.Tensor]) -> None:
        for step in range(3):
            optimizer.zero_grad()
            (model(data(step)).square().mean() + model.expanded.sum()).backward()
            optimizer.step()

    def inputs(step: int, rank: int) -> torch.Tensor:
        return torch.randn(4, 8, generator=generator(step * 100 + rank), dtype=torch.float64)

    def body(comm: Communicator) -> None:
        model, expected = Layouts(), Layouts()
        strides = [p.stride() for p in model.parameters()]
        optimizer, plain = wrap(comm, adamw, model, bucket_mb=bucket_mb, blocking=blocking), adamw(expected)
        run(optimizer, model, lambda step: inputs(step, comm.rank))
        run(plain, expected, lambda step: torch.cat([inputs(step, rank) for rank in range(comm.size)]))
        assert [p.stride() for p in model.parameters()] == strides
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t32_expanded_gradient_set_by_hand(ranks: Ranks) -> None:
    """Its elements share one memory cell, so nothing may be written through it."""

    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
        given = torch.tensor(comm.rank + 1.0, dtype=torch.float64)
        parameter.grad = given.expand(3, 4)
        optimizer.step()
        assert_close(parameter, torch.full((3, 4), -(comm.size + 1) / 2, dtype=torch.float64))
        assert given.item() == comm.rank + 1.0 or comm.size == 1

    ranks(body)
