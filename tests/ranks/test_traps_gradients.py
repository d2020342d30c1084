"""Gradients that some ranks do not have, or not always (T1, T16)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
    loss_of,
    net,
    reference,
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


class Branches(nn.Module):
    """A common trunk and branches of which a call uses one; nothing uses the last one."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.branches = nn.ModuleList(nn.Linear(5, 3) for _ in range(count))
        fill(self.double())

    def forward(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        return self.branches[branch](torch.tanh(self.trunk(x)))


def branch_loss(model: nn.Module, data: Batch, branch: int) -> torch.Tensor:
    return (model(data[0], branch) - data[1]).square().mean()


@blocking
@buckets
def test_t01_branch_chosen_by_rank_and_step(ranks: Ranks, bucket_mb: float, blocking: bool) -> None:
    """A branch that no rank used keeps no gradient, so AdamW leaves it alone; one that some used is divided by all."""

    def choice(step: int, rank: int) -> int:
        return (step * rank) % 3  # step 0: all use branch 0

    def body(comm: Communicator) -> None:
        model, expected = Branches(), Branches()
        optimizer = wrap(comm, adamw, model, bucket_mb=bucket_mb, blocking=blocking)
        plain = adamw(expected)
        for step in range(4):
            optimizer.zero_grad()
            plain.zero_grad()
            branch_loss(model, batch(step, comm.rank), choice(step, comm.rank)).backward()
            parts = [branch_loss(expected, batch(step, rank), choice(step, rank)) for rank in range(comm.size)]
            (torch.stack(parts).sum() / comm.size).backward()
            for parameter, wanted in zip(model.parameters(), expected.parameters(), strict=True):
                assert (parameter.grad is None) == (wanted.grad is None)
                if parameter.grad is not None:
                    assert_close(parameter.grad, wanted.grad)
            optimizer.step()
            plain.step()
        never = model.branches[3]
        assert never.weight.grad is None
        assert never.weight not in optimizer.state
        assert_equal(never, Branches().branches[3])
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@buckets
def test_t01_rank_whose_loss_touches_no_parameter(ranks: Ranks, bucket_mb: float) -> None:
    """Each rank in turn has nothing to learn, or calls no backward at all; the divisor stays the number of ranks."""

    def body(comm: Communicator) -> None:
        for idle in range(comm.size):
            model, expected = net(), net()
            optimizer, plain = wrap(comm, adamw, model, bucket_mb=bucket_mb), adamw(expected)
            for step in range(3):
                optimizer.zero_grad()
                plain.zero_grad()
                if comm.rank != idle:
                    loss_of(model, batch(step, comm.rank)).backward()
                elif step == 1:
                    torch.ones(2, requires_grad=True).sum().backward()
                optimizer.step()
                busy = [rank for rank in range(comm.size) if rank != idle]
                if busy:
                    (loss_of(expected, whole(step, busy)) * len(busy) / comm.size).backward()
                plain.step()
            assert_close(model, expected)
            assert_close(optimizer, plain)
            assert_ranks_equal(comm, model, optimizer)
            del optimizer

    ranks(body)


def test_t01_first_and_last_parameters_unused(ranks: Ranks) -> None:
    """On one rank the first bucket to be launched never fills, on another one the last."""

    def body(comm: Communicator) -> None:
        layers = [nn.Parameter(torch.full((3,), float(n + 1), dtype=torch.float64)) for n in range(6)]
        optimizer = heatopt.DataParallelOptimizer(torch.optim.AdamW(layers, lr=0.1), comm=comm, bucket_mb=TINY)
        used = [[0, 1, 2], [2, 3, 4], [1, 3]]
        torch.stack([layers[n] for n in used[comm.rank % 3]]).sum().backward()
        for n, layer in enumerate(layers):
            users = sum(n in used[rank % 3] for rank in range(comm.size))
            if users:
                assert_equal(layer.grad, torch.full((3,), float(users), dtype=torch.float64) / comm.size)
            else:
                assert layer.grad is None
        optimizer.step()
        assert_ranks_equal(comm, layers)
        assert_equal(layers[5], torch.full((3,), 6.0, dtype=torch.float64))

    ranks(body)


def test_more_buckets_than_bits_in_a_header(ranks: Ranks) -> None:
    """Two hundred buckets; ranks use and set some of them only, far ones too."""

    def body(comm: Communicator) -> None:
        count = 200
        layers = [nn.Parameter(torch.full((2,), float(n), dtype=torch.float64)) for n in range(count)]
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(layers, lr=1.0), comm=comm, bucket_mb=TINY / 10)
        used = range(comm.rank, count - 10, 3)
        torch.stack([layers[n] * (n + 1) for n in used]).sum().backward()
        by_hand = {7: 70.0, 68: 680.0, 129: 1290.0, count - 1: 1.0}
        for number, value in by_hand.items():
            if comm.rank == comm.size - 1:
                layers[number].grad = torch.full((2,), value, dtype=torch.float64)
        expected = [
            sum(n + 1.0 for r in range(comm.size) if n in range(r, count - 10, 3)) / comm.size for n in range(count)
        ]
        for number, value in by_hand.items():
            # The other ranks have the average of the backward there, or nothing.
            expected[number] = (expected[number] * (comm.size - 1) + value) / comm.size
        optimizer.step()
        for n, layer in enumerate(layers):
            assert_close(layer, torch.full((2,), n - expected[n], dtype=torch.float64))
            assert (layer.grad is None) == (expected[n] == 0)
        assert_ranks_equal(comm, layers)

    ranks(body)


@buckets
def test_t16_freezing_and_unfreezing(ranks: Ranks, bucket_mb: float) -> None:
    """A parameter that was frozen at construction, one that is frozen for a while, and all of them together."""

    def run(make: Callable[[nn.Module], torch.optim.Optimizer], data: Callable[[int], Batch]) -> Any:
        model = net()
        model[0].weight.requires_grad_(False)
        model[4].bias.requires_grad_(False)
        optimizer = make(model)
        for step in range(6):
            if step == 1:
                model[4].bias.requires_grad_(True)  # was frozen at construction
                model[2].weight.requires_grad_(False)
            if step == 3:
                model[2].weight.requires_grad_(True)
                model[0].weight.requires_grad_(True)
            if step == 4:
                model[2].requires_grad_(False)
                model[2].weight.grad = None
            train(optimizer, model, [data(step)])
        return model, optimizer

    def body(comm: Communicator) -> None:
        model, optimizer = run(lambda m: wrap(comm, adamw, m, bucket_mb=bucket_mb), lambda s: batch(s, comm.rank))
        expected, plain = run(adamw, lambda step: whole(step, comm.size))
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t16_everything_frozen_at_construction(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        model.requires_grad_(False)
        optimizer = wrap(comm, adamw, model)
        optimizer.step()
        assert not optimizer.state
        model.requires_grad_(True)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        assert_close(optimizer, reference(adamw, expected, comm.size, 2))
        assert_close(model, expected)

    ranks(body)


def test_t16_frozen_on_one_rank_only(ranks: Ranks) -> None:
    """There it counts as zero; all ranks apply the same average."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        last = comm.size - 1
        if comm.rank == last:
            model[2].weight.requires_grad_(False)
        train(optimizer, model, [batch(0, comm.rank)])
        loss_of(expected, whole(0, comm.size)).backward()
        others = net()
        if last:
            loss_of(others, whole(0, last)).backward()
            expected[2].weight.grad = others[2].weight.grad * last / comm.size
            plain.step()
            assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t16_unfrozen_on_one_rank_only(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        layers = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
        layers[1].requires_grad_(False)
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(layers, lr=1.0), comm=comm, bucket_mb=TINY)
        if comm.rank == comm.size - 1:
            layers[1].requires_grad_(True)
        (layers[0] + layers[1]).sum().backward()
        optimizer.step()
        assert_close(layers, [torch.zeros(2).double(), torch.full((2,), 1 - 1 / comm.size, dtype=torch.float64)])
        assert_ranks_equal(comm, layers)

    ranks(body)
