"""heatopt.compat.hetu: Hetu's formulas on any number of ranks, its scaler, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.compat import hetu
from heatopt.lr_scheduler import megatron_lr, megatron_weight_decay
from tests.ranks._hetu import CONSTANT, adam, gradient_of, sgd
from tests.ranks._training import (
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    loss_of,
    net,
    whole,
    words,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

STYLES = ["constant", "linear", "cosine", "inverse-square-root"]
STEPS = 7


@torch.no_grad()
def follow_adam(model: nn.Module, style: str, size: int, steps: int) -> None:
    """Adam as Hetu's kernel has it, with the weight decay added to the gradient, in one process."""
    rate = megatron_lr(0.02, 0.002, init_lr=0.001, lr_warmup_steps=2, lr_decay_steps=5, lr_decay_style=style)
    decay = megatron_weight_decay(0.01, 0.1, wd_incr_steps=4, wd_incr_style="cosine")
    parameters = list(model.parameters())
    means, variances = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    for n in range(steps):
        with torch.enable_grad():
            found = gradient_of(model, n, size)
        for p, g, mean, variance in zip(parameters, found, means, variances, strict=True):
            g = g + decay.value(n) * p
            mean.copy_(mean * 0.8 + g * (1 - 0.8))
            variance.copy_(variance * 0.95 + g * g * (1 - 0.95))
            bias1, bias2 = 1 - 0.8 ** (n + 1), math.sqrt(1 - 0.95 ** (n + 1))
            p.sub_(rate.value(n) * (mean / bias1) / (variance.sqrt() / bias2 + 1e-3))


@pytest.mark.parametrize("options", [{}, {"shard": "state"}, {"fuse": True}], ids=["wrapped", "sharded", "fused"])
@pytest.mark.parametrize("style", STYLES)
def test_adam_is_hetus(ranks: Ranks, style: str, options: dict[str, Any]) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = adam(comm, style, **options)
        rates = []
        for step in range(STEPS):
            rates.append(optimizer.learning_rate)
            loss = loss_of(model, batch(step, comm.rank))
            found = optimizer.minimize(loss)
            assert found.equal(loss.detach())
            assert not found.requires_grad
        follow_adam(expected, style, comm.size, STEPS)
        assert_close(model, expected)
        assert_ranks_equal(comm, model)
        rate = megatron_lr(0.02, 0.002, init_lr=0.001, lr_warmup_steps=2, lr_decay_steps=5, lr_decay_style=style)
        assert rates == [rate.value(n) for n in range(STEPS)]

    ranks(body)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_hetus(ranks: Ranks, momentum: float, nesterov: bool) -> None:
    """The velocity has the learning rate inside it there."""
    nesterov = nesterov and momentum > 0

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = sgd(comm, momentum=momentum, nesterov=nesterov)
        parameters = list(expected.parameters())
        velocities = [torch.zeros_like(p) for p in parameters]
        for step in range(4):
            optimizer.minimize(loss_of(model, batch(step, comm.rank)))
            found = gradient_of(expected, step, comm.size)
            with torch.no_grad():
                for p, g, v in zip(parameters, found, velocities, strict=True):
                    if nesterov:
                        v.copy_(momentum * (v - 0.1 * g))
                        p.add_(v - 0.1 * g)
                    else:
                        v.copy_(momentum * v - 0.1 * g)
                        p.add_(v)
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_sgd_warms_up(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = sgd(comm, init_lr=0.02, lr_warmup_steps=4)
        for step in range(6):
            optimizer.minimize(loss_of(model, batch(step, comm.rank)))
            for p, g in zip(expected.parameters(), gradient_of(expected, step, comm.size), strict=True):
                p.data.sub_([0.02, 0.04, 0.06, 0.08, 0.1, 0.1][step] * g)
        assert_close(model, expected)

    ranks(body)


@pytest.mark.parametrize("given", [False, True], ids=["from-the-loss", "params"])
def test_minimize_takes_the_gradients_of_its_loss_alone(ranks: Ranks, given: bool) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = sgd(comm, params=model.parameters() if given else None)
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.minimize(loss_of(model, batch(step, comm.rank)), var_list=[], grad_loss=None, name="update")
            for p, g in zip(expected.parameters(), gradient_of(expected, step, comm.size), strict=True):
                p.data.sub_(0.1 * g)
        assert_close(model, expected)

    ranks(body)


def test_var_list_and_grad_loss(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        variables = list(model.parameters())
        optimizer = sgd(comm, params=variables)
        chosen = [variables[0], variables[3]]
        for step in range(2):
            loss = loss_of(model, batch(step, comm.rank))
            optimizer.minimize(loss, var_list=chosen, grad_loss=torch.full_like(loss, 3.0))
            found = gradient_of(expected, step, comm.size)
            with torch.no_grad():
                for number in (0, 3):
                    list(expected.parameters())[number].sub_(0.1 * 3.0 * found[number])
        assert_close(model, expected)
        with pytest.raises(ValueError, match=r"var_list, or the loss .* has a tensor that is not among"):
            optimizer.minimize(loss_of(model, batch(3, comm.rank)), var_list=[torch.ones(2, requires_grad=True)])

    ranks(body)


def test_var_list_at_the_first_loss(ranks: Ranks) -> None:
    """Without it all variables are meant later, of which the others could not be updated: no silence about that."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = sgd(comm)
        chosen = list(model.parameters())[:2]
        optimizer.minimize(loss_of(model, batch(0, comm.rank)), var_list=chosen)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(ValueError, match="or the loss if there is none, has a tensor that is not among"):
            optimizer.minimize(loss_of(model, batch(1, comm.rank)))
        assert_equal([parameter.detach() for parameter in model.parameters()], before)
        for parameter in list(model.parameters())[2:]:
            parameter.requires_grad_(False)
        optimizer.minimize(loss_of(model, batch(1, comm.rank)))
        assert not any(torch.equal(parameter.detach(), kept) for parameter, kept in zip(chosen, before, strict=False))

    ranks(body)


def test_variables_of_the_first_loss(ranks: Ranks) -> None:
    """In the order of their use; one that the loss does not need, or that needs no gradient, is left out."""

    def body(comm: Communicator) -> None:
        model = net()
        first = next(model.parameters())
        first.requires_grad_(False)
        optimizer = adam(comm)
        assert not optimizer.is_attached
        with pytest.raises(RuntimeError, match="not known before the first loss"):
            optimizer.get_states(first)
        optimizer.minimize(loss_of(model, batch(0, comm.rank)))
        (group,) = optimizer.wrapped.param_groups
        own = {id(p) for p in group["params"]}
        assert own == {id(p) for p in model.parameters()} - {id(first)}
        with pytest.raises(ValueError, match="has its parameters already"):
            optimizer.attach(model.parameters())

    ranks(body)


def test_different_starts_are_refused_once(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(seed=comm.rank), net()
        optimizer = sgd(comm)
        with pytest.raises(ValueError, match="the ranks started with different parameters"):
            optimizer.minimize(loss_of(model, batch(0, comm.rank)))
        assert_equal(model, expected)
        assert optimizer.learning_rate == 0.1
        optimizer.minimize(loss_of(model, batch(0, comm.rank)))
        for p, g in zip(expected.parameters(), gradient_of(expected, 0, comm.size), strict=True):
            p.data.sub_(0.1 * g)
        assert_close(model, expected)

    ranks(body, min_size=2)


def test_sparse_gradients(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = words(), words()
        optimizer = sgd(comm, params=model.parameters(), model=model)
        plain = torch.optim.SGD(expected.parameters(), lr=0.1)
        for step in range(2):
            optimizer.minimize(loss_of(model, batch(step, comm.rank)))
            plain.zero_grad()
            loss_of(expected, whole(step, comm.size)).backward()
            plain.step()
        assert_close(model, expected)

    ranks(body)


# The scaler


@pytest.mark.parametrize("make", [adam, sgd])
def test_scaler_skips_on_all_ranks(ranks: Ranks, make: Callable[..., Any]) -> None:
    """An overflow on the last rank: as a run without scaler that leaves that step out, learning rate included."""

    def body(comm: Communicator) -> None:
        model, expected = net(torch.float32), net(torch.float32)
        optimizer, plain = make(comm), make(comm)
        scaler = hetu.GradScaler(1024.0, 2.0, 0.5, 2, True, device="cpu")
        scales = []
        for step in range(5):
            loss = loss_of(model, batch(step, comm.rank, dtype=torch.float32))
            if step == 1 and comm.rank == comm.size - 1:
                loss = loss * math.inf
            scaler.minimize(optimizer, scaler.scale(loss), var_list=[], name="update")
            scaler.update()
            scales.append(scaler.get_scale())
            if step != 1:
                plain.minimize(loss_of(expected, batch(step, comm.rank, dtype=torch.float32)))
        assert scales == [1024.0, 512.0, 512.0, 1024.0, 1024.0]
        assert optimizer.learning_rate == plain.learning_rate
        assert_equal(model, expected)  # scales are powers of two
        assert_ranks_equal(comm, model)

    ranks(body)


def test_scaler_by_hetus_arguments() -> None:
    scaler = hetu.GradScaler(init_scale=8.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=3, device="cpu")
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (4.0, 0.25, 3)
    one, two = scaler.scale([torch.ones(1), torch.full((2,), 3.0)])
    assert_equal([one, two], [torch.full((1,), 8.0), torch.full((2,), 24.0)])
    assert scaler.scale(torch.tensor(2.0)) == 16.0
    scaler.update(new_scale=2.0)
    assert scaler.get_scale() == 2.0
    assert hetu.GradScaler(device="cpu").state_dict() == heatopt.GradScaler("cpu").state_dict()
    disabled = hetu.GradScaler(enabled=False)
    assert disabled.scale(torch.tensor(2.0)) == 2.0
    with pytest.raises(TypeError, match="op must be an AdamOptimizer or SGDOptimizer"):
        scaler.minimize(torch.optim.SGD([nn.Parameter(torch.ones(1))]), torch.ones(1))  # type: ignore[arg-type]


# What is refused


@pytest.mark.parametrize(
    ("kind", "changed", "error", "message"),
    [
        (hetu.SGDOptimizer, {"lr_decay_style": "linear"}, ValueError, "must be 'constant', as in Hetu, got 'linear'"),
        (
            hetu.SGDOptimizer,
            {"init_lr": 0.0, "lr_warmup_steps": 2, "momentum": 0.9},
            ValueError,
            "with a warm-up is another algorithm",
        ),
        (hetu.SGDOptimizer, {"momentum": -1.0}, ValueError, "momentum"),
        (hetu.AdamOptimizer, {"lr_decay_style": "WSD"}, ValueError, "is Megatron's, not Hetu's"),
        (hetu.AdamOptimizer, {"lr_decay_style": "cubic"}, ValueError, "must be one of"),
        (hetu.AdamOptimizer, {"beta1": 1.5}, ValueError, "beta"),
        (hetu.AdamOptimizer, {"eps": -1.0}, ValueError, "epsilon"),
        (hetu.AdamOptimizer, {"start_wd": 0.1}, ValueError, "end_wd must be >= 0.1"),
        (hetu.AdamOptimizer, {"init_lr": 1.0}, ValueError, "at most"),
        (hetu.AdamOptimizer, {"comprehension": 0.1}, TypeError, "unexpected keyword argument 'comprehension'"),
    ],
)
def test_wrong_arguments(kind: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind(**{**CONSTANT, **changed})
