"""Weighted gradients together with what else acts on gradients."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import ThreadWorld
from tests.ranks._training import (
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    gradients,
    loss_of,
    net,
    sgd,
    wrap,
)
from tests.ranks._weights import own, rows_of, together, weighted_backward, whole
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


def test_autograd_grad_is_left_alone(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        parameters = list(model.parameters())
        expected = torch.autograd.grad(loss_of(model, batch(0, comm.rank)), parameters)
        for weight in (3, 0):
            with optimizer.weight(weight):
                assert_equal(torch.autograd.grad(loss_of(model, batch(0, comm.rank)), parameters), expected)

    ranks(body)


def test_join(ranks: Ranks) -> None:
    """Those that still train weigh; the others do not count."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model), adamw(expected)
        with optimizer.join():
            for step in range(comm.rank + 1):
                optimizer.zero_grad()
                weighted_backward(optimizer, model, own(step, comm.rank))
                optimizer.step()
        for step in range(comm.size):
            data = together([own(step, rank) for rank in range(step, comm.size)])
            plain.zero_grad()
            if len(data[0]):
                loss_of(expected, data).backward()
            else:
                for parameter in expected.parameters():
                    parameter.grad = torch.zeros_like(parameter)
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_grad_scaler(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        scaler = heatopt.GradScaler("cpu", init_scale=64.0)
        for step in range(2):
            optimizer.zero_grad()
            with optimizer.weight(rows_of(step, comm.rank)):
                scaler.scale(loss_of(model, own(step, comm.rank))).backward()
            scaler.step(optimizer)
            scaler.update()
            plain.zero_grad()
            loss_of(expected, whole(step, comm.size)).backward()
            plain.step()
        assert scaler.get_scale() == 64.0
        assert_close(model, expected)

    ranks(body)


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "each rank another order"])
def test_two_optimizers(ranks: Ranks, order: int) -> None:
    """Each has weights of its own, also where ranks come to their reductions in different orders."""

    def body(comm: Communicator) -> None:
        models, expected = [net(seed=1), net(seed=2)], [net(seed=1), net(seed=2)]
        optimizers = [wrap(comm, sgd, model) for model in models]
        steps = [0, 1][:: order if comm.rank % 2 else 1]
        counts = [[rows_of(k, r) for r in range(comm.size)] for k in range(2)]
        with ExitStack() as stack:
            for k in range(2):
                stack.enter_context(optimizers[k].weight(counts[k][comm.rank]))
            for k in steps:
                loss_of(models[k], own(k, comm.rank)).backward()
        for k in range(2):
            loss_of(expected[k], whole(k, comm.size)).backward()
            assert_close(gradients(models[k]), gradients(expected[k]))

    ranks(body)


@pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")
@pytest.mark.parametrize("crossed", [False, True], ids=["in order", "each rank another order"])
def test_messages_of_two_optimizers(crossed: bool) -> None:
    """A header tells of one optimizer: only ranks that are in different ones ask for the weights in each reduction."""
    world = ThreadWorld(3)

    def body(comm: Communicator) -> list[list[str]]:
        parameters = [nn.Parameter(torch.ones(4)) for _ in range(2)]
        optimizers = [heatopt.DataParallelOptimizer(torch.optim.SGD([p]), comm=comm) for p in parameters]
        order = [1, 0] if crossed and comm.rank else [0, 1]
        found = []
        for weighted in (False, True):
            before = sum(event.rank == comm.rank for event in list(world.events))
            for k in order:
                with optimizers[k].weight(comm.rank + k) if weighted else nullcontext():
                    parameters[k].sum().backward()
            found.append([event.kind for event in list(world.events) if event.rank == comm.rank][before:])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return found

    for plain, weighted in world.run(body):
        reductions = [["all_gather"], ["all_gather", "all_gather"]][crossed]
        assert plain == 2 * ["words", *reductions]
        assert weighted == 2 * ["words", *(["words"] * crossed + ["all_gather"]) * len(reductions)]
