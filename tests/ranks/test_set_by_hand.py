"""Gradients that no backward made, cleared ones, and ones that stay for another step (T8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tests.ranks._training import (
    TINY,
    adamw,
    assert_close,
    assert_ranks_equal,
    batch,
    every_mode,
    gradients,
    loss_of,
    net,
    reference,
    sgd,
    whole,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


@every_mode
@pytest.mark.parametrize("who", ["all", "last"])
def test_t08_gradients_set_by_hand(ranks: Ranks, who: str, mode: dict[str, Any]) -> None:
    def body(comm: Communicator) -> None:
        setters = range(comm.size) if who == "all" else [comm.size - 1]
        for call in ("step", "synchronize", "clip_grad_norm_"):
            model = net()
            optimizer = wrap(comm, sgd, model, **mode)
            if comm.rank in setters:
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, comm.rank + 1.0)
            if call == "synchronize":
                optimizer.synchronize()
            elif call == "clip_grad_norm_":
                optimizer.clip_grad_norm_(1e9)
            optimizer.step()
            mean = sum(rank + 1.0 for rank in setters) / comm.size
            assert_close(model, [p.detach() - 0.1 * mean for p in net().parameters()])
            assert_close(gradients(model), [torch.full_like(p, mean) for p in model.parameters()])
            assert_ranks_equal(comm, model, gradients(model))
            del optimizer

    ranks(body)


def test_t08_one_gradient_set_by_hand_beside_others(ranks: Ranks) -> None:
    """A gradient exchanged after backward is averaged with its neighbours in the bucket, which do not change."""

    def body(comm: Communicator) -> None:
        for mode in ({"bucket_mb": TINY}, {"bucket_mb": 8}):
            model, expected = net(), net()
            optimizer, plain = wrap(comm, sgd, model, **mode), sgd(expected)
            loss_of(model, batch(0, comm.rank)).backward()
            loss_of(expected, whole(0, comm.size)).backward()
            model[2].weight.grad = torch.full_like(model[2].weight, comm.rank + 1.0)
            expected[2].weight.grad = torch.full_like(expected[2].weight, (comm.size + 1) / 2)
            optimizer.step()
            plain.step()
            assert_close(model, expected)
            assert_ranks_equal(comm, model)
            del optimizer

    ranks(body)


def test_t08_autograd_grad(ranks: Ranks) -> None:
    """torch.autograd.grad calls no hook."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model), adamw(expected)
        for step in range(3):
            for one, module, data in (
                (optimizer, model, batch(step, comm.rank)),
                (plain, expected, whole(step, comm.size)),
            ):
                found = torch.autograd.grad(loss_of(module, data), list(module.parameters()))
                for parameter, gradient in zip(module.parameters(), found, strict=True):
                    parameter.grad = gradient
                one.step()
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t08_functional_derivatives(ranks: Ranks) -> None:
    """Gradients of torch.func, copied into ``p.grad`` tensors that stay the same."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)

        def run(one: torch.optim.Optimizer, module: nn.Module, data: Any) -> None:
            def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
                return (torch.func.functional_call(module, parameters, data[0]) - data[1]).square().mean()

            found = torch.func.grad(loss)({name: p.detach() for name, p in module.named_parameters()})
            for name, parameter in module.named_parameters():
                parameter.grad = found[name]
            one.step()

        for step in range(2):
            run(optimizer, model, batch(step, comm.rank))
            run(plain, expected, whole(step, comm.size))
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


@every_mode
@pytest.mark.parametrize("set_to_none", [True, False])
def test_t08_zero_grad_between(ranks: Ranks, set_to_none: bool, mode: dict[str, Any]) -> None:
    """What was accumulated before zero_grad() is forgotten, be it local or averaged."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, **mode), sgd(expected)
        loss_of(model, batch(0, comm.rank)).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        with optimizer.no_sync():
            loss_of(model, batch(1, comm.rank)).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, batch(2, comm.rank)).backward()
        loss_of(expected, whole(2, comm.size)).backward()
        assert_close(gradients(model), gradients(expected))
        optimizer.step()
        plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t08_zero_grad_within_accumulation_steps(ranks: Ranks) -> None:
    """Clearing gradients does not change which backward is the synchronised one; step() makes up for it in any case."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, accumulation_steps=2), sgd(expected)
        loss_of(model, batch(0, comm.rank)).backward()
        optimizer.zero_grad()
        for number in (1, 2):
            loss_of(model, batch(number, comm.rank)).backward()
            loss_of(expected, whole(number, comm.size)).backward()
        optimizer.step()
        plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t08_step_twice_with_the_same_gradients(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        plain = reference(sgd, expected, comm.size, 1)
        loss_of(model, batch(0, comm.rank)).backward()
        optimizer.step()
        optimizer.step()
        plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t08_accumulated_over_a_step(ranks: Ranks) -> None:
    """Without zero_grad() between, gradients go on growing, as in torch."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        for step in range(3):
            loss_of(model, batch(step, comm.rank)).backward()
            loss_of(expected, whole(step, comm.size)).backward()
            optimizer.step()
            plain.step()
        assert_close(gradients(model), gradients(expected))
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_unfrozen_small_parameter_is_final_after_backward(ranks: Ranks) -> None:
    """It has no place in the one bucket, and nobody looks at small gradients one by one."""

    def body(comm: Communicator) -> None:
        model = net()
        frozen = next(iter(model.parameters()))
        frozen.requires_grad_(False)
        optimizer = wrap(comm, sgd, model, bucket_mb=8)
        frozen.requires_grad_(True)
        loss_of(model, batch(0, comm.rank)).backward()
        assert_ranks_equal(comm, [parameter.grad for parameter in model.parameters()])
        optimizer.step()
        assert_ranks_equal(comm, model)

    ranks(body)
