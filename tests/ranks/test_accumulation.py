"""Gradients that add up over several backward calls (T8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._training import (
    TINY,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    every_mode,
    gradients,
    loss_of,
    net,
    sgd,
    whole,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


def local_gradients(model: nn.Module, numbers: list[int], rank: int) -> list[torch.Tensor]:
    """What one rank alone would have accumulated."""
    alone = net()
    alone.load_state_dict(model.state_dict())
    for number in numbers:
        loss_of(alone, batch(number, rank)).backward()
    return [p.grad for p in alone.parameters()]


def averaged(model: nn.Module, numbers: Callable[[int], list[int]], size: int) -> list[torch.Tensor]:
    """The mean over ranks of each rank's sum of gradients over the batches that ``numbers`` gives it."""
    totals = [torch.zeros_like(p) for p in model.parameters()]
    for rank in range(size):
        if numbers(rank):
            for total, part in zip(totals, local_gradients(model, numbers(rank), rank), strict=True):
                total += part
    return [total / size for total in totals]


@every_mode
@pytest.mark.parametrize("calls", [2, 3])
def test_t08_no_sync(ranks: Ranks, calls: int, mode: dict[str, Any]) -> None:
    """Inside gradients stay local and nothing is sent; the first backward outside averages the sum."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model, **mode), adamw(expected)
        for step in range(3):
            optimizer.zero_grad()
            plain.zero_grad()
            numbers = [10 * step + number for number in range(calls)]
            with optimizer.no_sync():
                for done, number in enumerate(numbers[:-1], 1):
                    loss_of(model, batch(number, comm.rank)).backward()
                    found = [p.grad for p in model.parameters()]
                    assert_close(found, local_gradients(model, numbers[:done], comm.rank), rtol=1e-14)
            loss_of(model, batch(numbers[-1], comm.rank)).backward()
            for number in numbers:
                loss_of(expected, whole(number, comm.size)).backward()
            assert_close([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])
            optimizer.step()
            plain.step()
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@every_mode
def test_t08_no_sync_and_then_step(ranks: Ranks, mode: dict[str, Any]) -> None:
    """Without a backward outside, step() averages."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, **mode), sgd(expected)
        for step in range(2):
            optimizer.zero_grad()
            plain.zero_grad()
            with optimizer.no_sync(), optimizer.no_sync():  # nesting is no other thing
                loss_of(model, batch(step, comm.rank)).backward()
            optimizer.step()
            loss_of(expected, whole(step, comm.size)).backward()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t08_synchronize(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        with optimizer.no_sync():
            loss_of(model, batch(0, comm.rank)).backward()
        optimizer.synchronize()
        wanted = averaged(model, lambda rank: [0], comm.size)
        assert_close(gradients(model), wanted)
        before = gradients(model)
        optimizer.synchronize()  # changes nothing more
        assert_equal(gradients(model), before)
        assert_ranks_equal(comm, before)
        optimizer.step()

    ranks(body)


def test_t08_exception_inside_no_sync(ranks: Ranks) -> None:
    """The context ends with the exception: the next backward is synchronised again."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        with pytest.raises(LookupError), optimizer.no_sync():
            raise LookupError
        loss_of(model, batch(0, comm.rank)).backward()
        assert_close(gradients(model), averaged(model, lambda rank: [0], comm.size))

    ranks(body)


def test_t08_no_sync_on_some_ranks_only(ranks: Ranks) -> None:
    """A rank that accumulates while others do not: step() still uses the mean of the sums."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        before = [p.detach().clone() for p in model.parameters()]
        wanted = averaged(model, lambda rank: [0, 1], comm.size)
        if comm.rank == comm.size - 1:
            with optimizer.no_sync():
                for number in range(2):
                    loss_of(model, batch(number, comm.rank)).backward()
        else:
            for number in range(2):
                loss_of(model, batch(number, comm.rank)).backward()
        optimizer.step()
        assert_close(list(model.parameters()), [p - 0.1 * g for p, g in zip(before, wanted, strict=True)])
        assert_ranks_equal(comm, model)

    ranks(body)


@every_mode
@pytest.mark.parametrize("steps", [2, 3])
def test_t08_accumulation_steps(ranks: Ranks, steps: int, mode: dict[str, Any]) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, adamw, model, accumulation_steps=steps, **mode)
        plain = adamw(expected)
        for step in range(3):
            optimizer.zero_grad()
            plain.zero_grad()
            for call in range(steps):
                number = 10 * step + call
                (loss_of(model, batch(number, comm.rank)) / steps).backward()
                (loss_of(expected, whole(number, comm.size)) / steps).backward()
                if call < steps - 1:
                    local = local_gradients(model, [10 * step + n for n in range(call + 1)], comm.rank)
                    assert_close(gradients(model), [g / steps for g in local])
            assert_close(gradients(model), gradients(expected))
            optimizer.step()
            plain.step()
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@pytest.mark.parametrize("calls", [1, 2, 4, 5])
def test_t08_step_within_an_accumulation(ranks: Ranks, calls: int) -> None:
    """More or fewer backward calls than announced: step() averages what is missing, and counting starts anew."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, accumulation_steps=3), sgd(expected)
        for step in range(3):
            optimizer.zero_grad()
            plain.zero_grad()
            for call in range(calls):
                loss_of(model, batch(10 * step + call, comm.rank)).backward()
                loss_of(expected, whole(10 * step + call, comm.size)).backward()
            optimizer.step()
            plain.step()
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@every_mode
def test_t08_several_backward_calls(ranks: Ranks, mode: dict[str, Any]) -> None:
    """Each of them is synchronised; after the k-th the gradients are the means of the sums of k."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model, **mode), adamw(expected)
        for step in range(2):
            optimizer.zero_grad()
            plain.zero_grad()
            for call in range(3):
                loss_of(model, batch(10 * step + call, comm.rank)).backward()
                loss_of(expected, whole(10 * step + call, comm.size)).backward()
                assert_close(gradients(model), gradients(expected))
                assert_ranks_equal(comm, gradients(model))
            optimizer.step()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@every_mode
def test_t08_same_graph_twice(ranks: Ranks, mode: dict[str, Any]) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, **mode), sgd(expected)
        for module, data in ((model, batch(0, comm.rank)), (expected, whole(0, comm.size))):
            loss = loss_of(module, data)
            loss.backward(retain_graph=True)
            loss.backward()
        assert_close(gradients(model), gradients(expected))
        optimizer.step()
        plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t08_backward_of_some_parameters(ranks: Ranks) -> None:
    """``inputs=`` restricts a backward; the second one reaches the others, and half of the first's again."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model), adamw(expected)
        for module, data in ((model, batch(0, comm.rank)), (expected, whole(0, comm.size))):
            parameters = list(module.parameters())
            loss = loss_of(module, data)
            loss.backward(retain_graph=True, inputs=parameters[:4])
            loss.backward(inputs=parameters[2:])
        assert_close(gradients(model), gradients(expected))
        optimizer.step()
        plain.step()
        assert_close(model, expected)
        assert_close(optimizer, plain)

    ranks(body)


def test_t08_two_losses_of_two_parts(ranks: Ranks) -> None:
    """A backward for each half of the network: no bucket is reduced with half of its gradients only."""

    def body(comm: Communicator) -> None:
        for mode in ({"bucket_mb": TINY}, {"bucket_mb": 8}):
            layers = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(4)]
            optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(layers, lr=1.0), comm=comm, **mode)
            weight = comm.rank + 1.0
            (weight * (layers[0] + layers[1])).sum().backward()
            (weight * (layers[2] + 2 * layers[1])).sum().backward()
            mean = (comm.size + 1) / 2
            expected = [mean, 3 * mean, mean]
            for layer, wanted in zip(layers[:3], expected, strict=True):
                assert_close(layer.grad, torch.full((3,), wanted, dtype=torch.float64))
            assert layers[3].grad is None
            optimizer.step()
            assert_ranks_equal(comm, layers)
            del optimizer

    ranks(body)


@every_mode
def test_t08_unequal_numbers_of_backward_calls(ranks: Ranks, mode: dict[str, Any]) -> None:
    """Rank r calls backward r times: the step uses the mean over ranks of each one's sum."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model, **mode)
        expected = net()
        plain = sgd(expected)
        for step in range(2):
            optimizer.zero_grad()
            wanted = averaged(expected, lambda rank, step=step: [10 * step + n for n in range(rank)], comm.size)
            for call in range(comm.rank):
                loss_of(model, batch(10 * step + call, comm.rank)).backward()
            optimizer.step()
            if comm.size > 1:
                for parameter, gradient in zip(expected.parameters(), wanted, strict=True):
                    parameter.grad = gradient
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)
