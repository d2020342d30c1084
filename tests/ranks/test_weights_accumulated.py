"""Weighted gradients of several micro-batches add up to the mean over all samples of all of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import heatopt
from tests.ranks._training import (
    Batch,
    adamw,
    assert_close,
    assert_ranks_equal,
    batch,
    gradients,
    loss_of,
    net,
    sgd,
    words,
    wrap,
)
from tests.ranks._weights import COUNTS, SHARDS, own, rows_of, together, weighted_backward, whole
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


@pytest.mark.parametrize("local", [True, False], ids=["no_sync", "each synchronised"])
@pytest.mark.parametrize("shard", SHARDS)
def test_accumulation_is_the_mean_of_all_samples(ranks: Ranks, shard: str, local: bool) -> None:
    """Also where a rank has fewer micro-batches than others, or empty ones, and an update comes in between."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model, shard=shard), adamw(expected)
        for step in range(2):
            micro = [[batch(10 * step + k, r, COUNTS[(r + k) % 4]) for k in range(3 + r % 2)] for r in range(comm.size)]
            optimizer.zero_grad()
            for number, data in enumerate(micro[comm.rank]):
                last = number == len(micro[comm.rank]) - 1
                with nullcontext() if last or not local else optimizer.no_sync():
                    weighted_backward(optimizer, model, data)
            optimizer.step()
            plain.zero_grad()
            loss_of(expected, together([data for each in micro for data in each])).backward()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("shard", SHARDS)
def test_accumulation_steps(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, shard=shard, accumulation_steps=3), sgd(expected)
        for data in (own(step, comm.rank) for step in range(3)):
            weighted_backward(optimizer, model, data)
        optimizer.step()
        loss_of(expected, together([whole(step, comm.size) for step in range(3)])).backward()
        plain.step()
        assert_close(model, expected)

    ranks(body)


def test_several_losses_of_the_same_samples_add_up(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        for first in (True, False):  # the second time on top of another micro-batch
            data = own(int(first), comm.rank)
            with optimizer.weight(len(data[0])):
                loss_of(model, data).backward()
                (2 * loss_of(model, data)).backward()
        (3 * loss_of(expected, together([whole(step, comm.size) for step in range(2)]))).backward()
        assert_close(gradients(model), gradients(expected))

    ranks(body)


def test_sparse_gradients_accumulate(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = words(), words()
        optimizer = wrap(comm, lambda module: torch.optim.SGD(module.parameters(), lr=0.1), model)
        for step in range(2):
            with nullcontext() if step else optimizer.no_sync():
                weighted_backward(optimizer, model, own(step, comm.rank))
        loss_of(expected, together([whole(step, comm.size) for step in range(2)])).backward()
        assert_close(gradients(model), gradients(expected))

    ranks(body)


@pytest.mark.parametrize("clear", [True, False], ids=["zero_grad", "None"])
@pytest.mark.parametrize("shard", SHARDS)
def test_a_context_around_the_whole_step(ranks: Ranks, shard: str, clear: bool) -> None:
    """Clearing and updating inside of it do not end it, and what was there before is gone."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, shard=shard), sgd(expected)
        with optimizer.weight(9 - comm.rank), optimizer.no_sync():
            loss_of(model, batch(9, comm.rank)).backward()
        for step in range(3):
            if not clear:
                optimizer.zero_grad()
            with optimizer.weight(rows_of(step, comm.rank)):
                for _ in range(2):  # updates
                    (optimizer if clear else model).zero_grad()
                    loss_of(model, own(step, comm.rank)).backward()
                    optimizer.step()
            for _ in range(2):
                plain.zero_grad()
                loss_of(expected, whole(step, comm.size)).backward()
                plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("clear", ["optimizer", "module", "step"])
def test_cleared_gradients_have_no_weight(ranks: Ranks, clear: str) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        with optimizer.weight(7 + comm.rank), optimizer.no_sync():
            loss_of(model, batch(7, comm.rank)).backward()
        if clear == "step":
            optimizer.step()
            expected.load_state_dict(model.state_dict())
            model.zero_grad()
        else:
            (optimizer if clear == "optimizer" else model).zero_grad()
        weighted_backward(optimizer, model, own(0, comm.rank))
        loss_of(expected, whole(0, comm.size)).backward()
        assert_close(gradients(model), gradients(expected))

    ranks(body)


@pytest.mark.parametrize("layer", [0, 4], ids=["last hook", "first hook"])
@pytest.mark.parametrize("shard", SHARDS)
def test_a_new_plan_between_micro_batches(ranks: Ranks, shard: str, layer: int) -> None:
    """A parameter that is unfrozen gets a place: what has been reduced already keeps its weight."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        for module in (model, expected):
            module[layer].requires_grad_(False)  # type: ignore[index]
        optimizer = wrap(comm, sgd, model, shard=shard)
        plain = sgd(expected)
        size = sum(rows_of(step, rank) for step in range(2) for rank in range(comm.size))
        for step in range(2):
            weighted_backward(optimizer, model, own(step, comm.rank))
            data = whole(step, comm.size)
            (loss_of(expected, data) * len(data[0]) / size).backward()
            for module in (model, expected):
                module[layer].requires_grad_(True)  # type: ignore[index]
        optimizer.step()
        plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_micro_batch_of_one_rank_that_touches_one_parameter(ranks: Ranks, shard: str) -> None:
    """Its samples count for all parameters, on all ranks, though it stays local until ``step()``."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, shard=shard), sgd(expected)
        weighted_backward(optimizer, model, own(0, comm.rank))
        if comm.rank == comm.size - 1:
            with optimizer.weight(4), optimizer.no_sync():
                (3 * model[4].bias.sum()).backward()  # type: ignore[index]
        optimizer.step()
        data = whole(0, comm.size)
        loss = loss_of(expected, data) * len(data[0]) + 4 * 3 * expected[4].bias.sum()  # type: ignore[index]
        (loss / (len(data[0]) + 4)).backward()
        plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_a_micro_batch_of_one_rank_that_touches_no_sparse_gradient(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = words(), words()
        other = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        inner = torch.optim.SGD([*model.parameters(), other], lr=0.1)
        optimizer = heatopt.DataParallelOptimizer(inner, comm=comm, model=model)
        weighted_backward(optimizer, model, own(0, comm.rank))
        if comm.rank == 0:
            with optimizer.weight(4), optimizer.no_sync():
                other.sum().backward()
        optimizer.synchronize()
        data = whole(0, comm.size)
        (loss_of(expected, data) * len(data[0]) / (len(data[0]) + 4)).backward()
        assert_close(gradients(model), gradients(expected))
        assert_close([other.grad], [torch.full_like(other, 4 / (len(data[0]) + 4)).detach()])

    ranks(body)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_gradient_that_comes_twice(ranks: Ranks, blocking: bool) -> None:
    """Re-entrant checkpointing of a shared module fires a hook twice, the second time after its bucket has left."""

    def body(comm: Communicator) -> None:
        def loss(model: Any, data: Batch) -> torch.Tensor:
            x = data[0].clone().requires_grad_()
            hidden = checkpoint(model[0], x, use_reentrant=True)
            return (model[2](torch.tanh(hidden + checkpoint(model[0], 2 * x, use_reentrant=True)))).square().mean()

        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model, blocking=blocking)
        for step in range(2):
            with optimizer.weight(rows_of(step, comm.rank)):
                loss(model, own(step, comm.rank)).backward()
        loss(expected, together([whole(step, comm.size) for step in range(2)])).backward()
        assert_close(gradients(model), gradients(expected))

    ranks(body)
