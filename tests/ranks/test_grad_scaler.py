"""GradScaler: all ranks skip a step, or none does, and their scales stay equal (T9)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
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
    gradients,
    loss_of,
    net,
    sgd,
    train,
    whole,
    words,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

SINGLE = torch.float32
SCALE = 2.0**10
STEPS = 4

ALGORITHMS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "fused SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "fused AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
}
SCALERS: dict[str, Callable[..., torch.amp.GradScaler]] = {
    "torch's": torch.amp.GradScaler,
    "heatopt's": heatopt.GradScaler,
}
every_scaler = pytest.mark.parametrize("make_scaler", SCALERS.values(), ids=SCALERS.keys())


def test_is_torchs_scaler() -> None:
    assert issubclass(heatopt.GradScaler, torch.amp.GradScaler)
    scaler = heatopt.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    torchs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    assert scaler.state_dict() == torchs.state_dict()
    again = heatopt.GradScaler("cpu")
    again.load_state_dict(scaler.state_dict())
    assert again.state_dict() == torchs.state_dict()
    assert copy.deepcopy(scaler).state_dict() == torchs.state_dict()


@every_scaler
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("bad_step", [0, 2], ids=["first-step", "later-step"])
def test_t09_overflow_on_one_rank(
    ranks: Ranks, make_scaler: Callable[..., torch.amp.GradScaler], name: str, bad_step: int
) -> None:
    """On each rank in turn: every rank skips that step, and ends as a run without a scaler that leaves it out."""
    make = ALGORITHMS[name]

    def body(comm: Communicator) -> None:
        good = [step for step in range(STEPS) if step != bad_step]
        unscaled, whole_model = net(SINGLE), net(SINGLE)
        other, plain = wrap(comm, make, unscaled), make(whole_model)
        train(other, unscaled, [batch(step, comm.rank, dtype=SINGLE) for step in good])
        train(plain, whole_model, [whole(step, comm.size, dtype=SINGLE) for step in good])
        assert_close(unscaled, whole_model, rtol=1e-4, atol=1e-5)

        for bad_rank in range(comm.size):
            model = net(SINGLE)
            optimizer = wrap(comm, make, model)
            scaler = make_scaler("cpu", init_scale=SCALE, growth_interval=2)
            scales = []
            for step in range(STEPS):
                optimizer.zero_grad()
                loss = loss_of(model, batch(step, comm.rank, dtype=SINGLE))
                if (step, comm.rank) == (bad_step, bad_rank):
                    loss = loss * math.inf
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
            assert scales == {0: [SCALE / 2, SCALE / 2, SCALE, SCALE], 2: [SCALE, SCALE * 2, SCALE, SCALE]}[bad_step]
            assert_equal(model, unscaled)  # scales are powers of two
            assert_equal(optimizer, other)
            assert_ranks_equal(comm, model, optimizer)
            del optimizer

    ranks(body)


@pytest.mark.parametrize("overflow", [True, False])
@pytest.mark.parametrize("explicit", [True, False], ids=["unscale_", "step"])
def test_t09_gradients_set_by_hand(ranks: Ranks, explicit: bool, overflow: bool) -> None:
    """No hook has seen them, so only heatopt's scaler averages them before it looks for overflow."""

    def body(comm: Communicator) -> None:
        for bad_rank in range(comm.size):
            model = net(SINGLE)
            optimizer = wrap(comm, sgd, model)
            scaler = heatopt.GradScaler("cpu", init_scale=SCALE)
            scaler.scale(torch.ones(1))
            for parameter in model.parameters():
                bad = overflow and comm.rank == bad_rank
                parameter.grad = torch.full_like(parameter, math.inf if bad else SCALE * (comm.rank + 1))
            if explicit:
                scaler.unscale_(optimizer)
                if not overflow:
                    for gradient in gradients(model):
                        assert_close(gradient, torch.full_like(gradient, (comm.size + 1) / 2), rtol=1e-6)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (SCALE / 2 if overflow else SCALE)
            step = 0 if overflow else 0.1 * (comm.size + 1) / 2
            assert_close(model, [p.detach() - step for p in net(SINGLE).parameters()], rtol=1e-5, atol=1e-6)
            assert_ranks_equal(comm, model)
            del optimizer

    ranks(body)


def test_t09_gradient_overwritten_on_one_rank(ranks: Ranks) -> None:
    """In place, after backward: nobody else can see it, but all hear of it and skip."""

    def body(comm: Communicator) -> None:
        for bad_rank in range(comm.size):
            model = net(SINGLE)
            optimizer = wrap(comm, sgd, model)
            scaler = heatopt.GradScaler("cpu", init_scale=SCALE)
            scaler.scale(loss_of(model, batch(0, comm.rank, dtype=SINGLE))).backward()
            if comm.rank == bad_rank:
                model[2].weight.grad[0, 0] = math.nan
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == SCALE / 2
            assert_equal(model, net(SINGLE))
            del optimizer

    ranks(body)


@pytest.mark.parametrize("scaled_before", [True, False], ids=["scaled-before", "never-scaled"])
@pytest.mark.parametrize("overflow", [True, False])
def test_t09_rank_without_backward(ranks: Ranks, scaled_before: bool, overflow: bool) -> None:
    """Each rank in turn has no data, at the first step or at a later one; the others' decision is its too."""

    def body(comm: Communicator) -> None:
        for idle in range(comm.size):
            model = net(SINGLE)
            optimizer = wrap(comm, adamw, model)
            scaler = heatopt.GradScaler("cpu", init_scale=SCALE)
            steps = range(2) if scaled_before else range(1)
            for step in steps:
                optimizer.zero_grad()
                if comm.rank != idle or step < len(steps) - 1:
                    loss = loss_of(model, batch(step, comm.rank, dtype=SINGLE))
                    bad = overflow and step == len(steps) - 1
                    scaler.scale(loss * math.inf if bad else loss).backward()
                scaler.step(optimizer)
                scaler.update()
            skipped = overflow and comm.size > 1
            assert scaler.get_scale() == (SCALE / 2 if skipped else SCALE)

            expected = net(SINGLE)
            plain = adamw(expected)
            for step in steps:
                plain.zero_grad()
                last = step == len(steps) - 1
                busy = [rank for rank in range(comm.size) if rank != idle or not last]
                if busy and not (last and overflow):
                    loss = loss_of(expected, whole(step, busy, dtype=SINGLE))
                    (loss * len(busy) / comm.size).backward()
                    plain.step()
            assert_close(model, expected, rtol=1e-4, atol=1e-5)
            assert_ranks_equal(comm, model, optimizer)
            del optimizer

    ranks(body)


def test_t09_no_gradient_anywhere(ranks: Ranks) -> None:
    """A step without any gradient is an ordinary one: nothing moves, nothing overflows."""

    def body(comm: Communicator) -> None:
        model = net(SINGLE)
        optimizer = wrap(comm, adamw, model)
        scaler = heatopt.GradScaler("cpu", init_scale=SCALE)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == SCALE
        assert_equal(model, net(SINGLE))

    ranks(body)


@every_scaler
def test_unscale_clip_step(ranks: Ranks, make_scaler: Callable[..., torch.amp.GradScaler]) -> None:
    """The order of torch's own documentation."""

    def run(
        optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Any], own_clip: bool
    ) -> list[float]:
        scaler = make_scaler("cpu", init_scale=SCALE)
        norms = []
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, data(step))).backward()
            scaler.unscale_(optimizer)
            if own_clip and isinstance(optimizer, heatopt.DataParallelOptimizer):
                norms.append(optimizer.clip_grad_norm_(0.05).item())
            else:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05).item())
            scaler.step(optimizer)
            scaler.update()
        return norms

    def body(comm: Communicator) -> None:
        for own_clip in (True, False):
            model, expected = net(SINGLE), net(SINGLE)
            optimizer, plain = wrap(comm, sgd, model), sgd(expected)
            found = run(optimizer, model, lambda step: batch(step, comm.rank, dtype=SINGLE), own_clip)
            wanted = run(plain, expected, lambda step: whole(step, comm.size, dtype=SINGLE), False)
            assert found == pytest.approx(wanted, rel=1e-4)
            assert_close(model, expected, rtol=1e-4, atol=1e-5)
            assert_ranks_equal(comm, model, optimizer)
            del optimizer

    ranks(body)


@every_scaler
def test_accumulation_under_a_scaler(ranks: Ranks, make_scaler: Callable[..., torch.amp.GradScaler]) -> None:
    """An overflow in a backward that stayed local skips the step on all ranks."""

    def body(comm: Communicator) -> None:
        for overflow in (False, True):
            model, expected = net(SINGLE), net(SINGLE)
            optimizer, plain = wrap(comm, sgd, model), sgd(expected)
            scaler = make_scaler("cpu", init_scale=SCALE)
            with optimizer.no_sync():
                loss = loss_of(model, batch(0, comm.rank, dtype=SINGLE))
                bad = overflow and comm.rank == comm.size - 1
                scaler.scale(loss * math.inf if bad else loss).backward()
            scaler.scale(loss_of(model, batch(1, comm.rank, dtype=SINGLE))).backward()
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (SCALE / 2 if overflow else SCALE)
            if not overflow:
                for step in range(2):
                    loss_of(expected, whole(step, comm.size, dtype=SINGLE)).backward()
                plain.step()
            assert_close(model, expected, rtol=1e-4, atol=1e-5)
            assert_ranks_equal(comm, model)
            del optimizer

    ranks(body)


@every_scaler
def test_two_optimizers_one_scaler(ranks: Ranks, make_scaler: Callable[..., torch.amp.GradScaler]) -> None:
    """An overflow in one of them skips its step alone, on all ranks."""

    def body(comm: Communicator) -> None:
        models = net(SINGLE), net(SINGLE, seed=1)
        optimizers = [wrap(comm, sgd, model) for model in models]
        scaler = make_scaler("cpu", init_scale=SCALE)
        for number, model in enumerate(models):
            loss = loss_of(model, batch(0, comm.rank, dtype=SINGLE))
            bad = number == 1 and comm.rank == comm.size - 1
            scaler.scale(loss * math.inf if bad else loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == SCALE / 2
        expected = net(SINGLE)
        plain = sgd(expected)
        loss_of(expected, whole(0, comm.size, dtype=SINGLE)).backward()
        plain.step()
        assert_close(models[0], expected, rtol=1e-4, atol=1e-5)
        assert_equal(models[1], net(SINGLE, seed=1))
        assert_ranks_equal(comm, *models)

    ranks(body)


@every_scaler
def test_sparse_gradients(ranks: Ranks, make_scaler: Callable[..., torch.amp.GradScaler]) -> None:
    def body(comm: Communicator) -> None:
        for overflow in (False, True):
            model, expected = words(SINGLE), words(SINGLE)
            optimizer = wrap(comm, lambda m: torch.optim.SparseAdam(m.parameters(), lr=0.01), model)
            plain = torch.optim.SparseAdam(expected.parameters(), lr=0.01)
            scaler = make_scaler("cpu", init_scale=SCALE)
            bad = overflow and comm.rank == comm.size - 1
            scaler.scale(loss_of(model, batch(0, comm.rank, dtype=SINGLE)) * (math.inf if bad else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            if not overflow:
                loss_of(expected, whole(0, comm.size, dtype=SINGLE)).backward()
                plain.step()
            assert scaler.get_scale() == (SCALE / 2 if overflow else SCALE)
            assert_close(model, expected, rtol=1e-4, atol=1e-5)
            assert_ranks_equal(comm, model)
            del optimizer

    ranks(body)


def test_disabled_scaler(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        scaler = heatopt.GradScaler("cpu", enabled=False)
        scaler.scale(loss_of(model, batch(0, comm.rank))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        loss_of(expected, whole(0, comm.size)).backward()
        plain.step()
        assert scaler.get_scale() == 1.0
        assert_close(model, expected)

    ranks(body)


def test_misuse_raises_what_torch_raises(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net(SINGLE)
        optimizer = wrap(comm, sgd, model)
        scaler = heatopt.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(loss_of(model, batch(0, comm.rank, dtype=SINGLE))).backward()
        with pytest.raises(RuntimeError, match="Closure"):
            scaler.step(optimizer, closure=lambda: None)
        scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="already been called"):
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        with pytest.raises(RuntimeError, match="already been called"):
            scaler.step(optimizer)
        scaler.update()

    ranks(body)


def test_plain_optimizer_under_heatopts_scaler() -> None:
    def run(scaler: torch.amp.GradScaler) -> nn.Module:
        model = net(SINGLE)
        optimizer = sgd(model)
        for step in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, batch(step, 0, dtype=SINGLE))
            scaler.scale(loss * (math.inf if step == 1 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        return model

    assert_equal(run(heatopt.GradScaler("cpu")), run(torch.amp.GradScaler("cpu")))


def test_autocast(ranks: Ranks) -> None:
    """bfloat16 inside, float32 parameters: losses and gradients of the whole batch to bfloat16's accuracy."""

    def steps(optimizer: torch.optim.Optimizer, model: nn.Module, data: Iterable[Any]) -> None:
        scaler = heatopt.GradScaler("cpu", init_scale=SCALE)
        for one in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, one)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    def body(comm: Communicator) -> None:
        model, expected = net(SINGLE), net(SINGLE)
        optimizer = wrap(comm, sgd, model, bucket_mb=TINY)
        steps(optimizer, model, [batch(step, comm.rank, dtype=SINGLE) for step in range(3)])
        steps(sgd(expected), expected, [whole(step, comm.size, dtype=SINGLE) for step in range(3)])
        assert_close(model, expected, rtol=0.05, atol=0.02)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)
