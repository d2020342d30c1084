"""Schedules drive wrapped, sharded and fused optimizers as they drive a plain one; metrics that decide are reduced."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import ThreadWorld
from heatopt.lr_scheduler import (
    ExponentialDecay,
    LinearScaling,
    Milestones,
    ParamScheduler,
    Ramp,
    Rounded,
    Schedule,
    WarmupDecay,
    goyal_lr,
    megatron_lr,
    megatron_weight_decay,
)
from tests.ranks._training import (
    Batch,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    net,
    sgd,
    train,
    whole,
    wrap,
)
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

RATES: dict[str, Schedule] = {
    "constant": megatron_lr(0.02, init_lr=0.01, lr_warmup_steps=3, lr_decay_steps=5, lr_decay_style="constant"),
    "linear": megatron_lr(0.02, 0.001, lr_warmup_steps=2, lr_decay_steps=5),
    "cosine": megatron_lr(0.02, 0.001, lr_warmup_steps=2, lr_decay_steps=5, lr_decay_style="cosine"),
    "inverse-square-root": megatron_lr(0.02, 0.001, lr_decay_steps=5, lr_decay_style="inverse-square-root"),
    "WSD": megatron_lr(0.02, 0.001, lr_warmup_steps=1, lr_decay_steps=5, lr_decay_style="WSD", wsd_decay_steps=3),
    "ramp": Ramp(0.001, 0.02, steps=5, style="cosine"),
    "exponential": ExponentialDecay(0.02, 2, 0.5),
    "staircase": ExponentialDecay(0.02, 2, 0.5, staircase=True),
    "goyal": LinearScaling(Milestones(0.005, (4,)), 4, warmup_steps=3),
    "scaled": 0.5 * Ramp(0.001, 0.02, steps=5),
}

OPTIONS: dict[str, dict[str, Any]] = {"wrapped": {}, "sharded": {"shard": "state"}, "fused": {"fuse": True}}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups: matrices and the rest."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1]}, {"params": [p for p in parameters if p.dim() <= 1]}]
    return torch.optim.AdamW(groups, lr=1.0, weight_decay=1.0)


def scheduled(optimizer: torch.optim.Optimizer, rate: Schedule = RATES["cosine"], **options: Any) -> ParamScheduler:
    """Learning rate, weight decay and betas; the second group has its own."""
    return ParamScheduler(
        optimizer,
        lr=rate,
        weight_decay=megatron_weight_decay(0.01, 0.2, wd_incr_steps=4, wd_incr_style="cosine"),
        betas=(Ramp(0.9, 0.8, steps=6), None),
        groups={1: {"lr": 0.5 * rate, "weight_decay": 0.0}},
        **options,
    )


def options_of(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    return [tuple(group[name] for name in ("lr", "weight_decay", "betas")) for group in optimizer.param_groups]


def expected_options(rate: Schedule, n: int) -> list[tuple[Any, ...]]:
    """The same at count ``n``, from the schedules alone."""
    decay = megatron_weight_decay(0.01, 0.2, wd_incr_steps=4, wd_incr_style="cosine").value(n)
    betas = (Ramp(0.9, 0.8, steps=6).value(n), 0.999)
    return [(rate.value(n), decay, betas), (0.5 * rate.value(n), 0.0, betas)]


def run(scheduler: Any, model: nn.Module, data: Callable[[int], Batch], steps: range = range(7)) -> list[Any]:
    """Train, and return the options after each step."""
    seen = [options_of(scheduler.optimizer)]
    for step in steps:
        train(scheduler.optimizer, model, [data(step)])
        scheduler.step()
        seen.append(options_of(scheduler.optimizer))
    return seen


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", RATES)
def test_scheduled_training_equals_one_process(ranks: Ranks, name: str, how: str) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model, **OPTIONS[how]), adamw(expected)
        found = run(scheduled(optimizer, RATES[name]), model, lambda step: batch(step, comm.rank))
        assert found == run(scheduled(plain, RATES[name]), expected, lambda step: whole(step, comm.size))
        assert options_of(optimizer.torch_optimizer) == found[-1]
        assert found == [expected_options(RATES[name], n) for n in range(8)]
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@pytest.mark.parametrize("method", [heatopt.LocalSGD, heatopt.SlowMo, heatopt.DiLoCo, heatopt.CO2])
def test_local_updates_follow_the_schedule(ranks: Ranks, method: Any) -> None:
    """As if the options had been set by hand before each update, averages and outer steps between them or not."""

    def body(comm: Communicator) -> None:
        model, other = net(), net()
        optimizer, by_hand = (method(adamw(m), model=m, comm=comm, sync_every=3) for m in (model, other))
        found = run(scheduled(optimizer), model, lambda step: batch(step, comm.rank))
        expected = [expected_options(RATES["cosine"], n) for n in range(8)]
        assert found == expected
        for step, options in enumerate(expected[:-1]):
            for group, (rate, decay, betas) in zip(by_hand.param_groups, options, strict=True):
                group.update(lr=rate, weight_decay=decay, betas=betas)
            train(by_hand, other, [batch(step, comm.rank)])
        assert_equal(model, other)
        assert_equal(optimizer.state_dict()["state"], by_hand.state_dict()["state"])

    ranks(body)


@pytest.mark.parametrize("how", ["sharded", "fused"])
def test_sharded_and_fused_have_the_same_bits(ranks: Ranks, how: str) -> None:
    def body(comm: Communicator) -> None:
        model, other = net(), net()
        for one, options in ((model, {}), (other, OPTIONS[how])):
            run(scheduled(wrap(comm, adamw, one, **options)), one, lambda step: batch(step, comm.rank))
        assert_equal(model, other)

    ranks(body)


@pytest.mark.parametrize("how", OPTIONS)
def test_driven_from_the_wrapped_optimizer(ranks: Ranks, how: str) -> None:
    """The groups are its own, so a scheduler of either drives both."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, adamw, model, **OPTIONS[how])
        scheduler = scheduled(optimizer.torch_optimizer)
        for step in range(4):
            train(optimizer, model, [batch(step, comm.rank)])
            scheduler.step()
        run(scheduled(adamw(expected)), expected, lambda step: whole(step, comm.size), range(4))
        assert_close(model, expected)

    ranks(body)


@pytest.mark.parametrize("how", OPTIONS)
def test_going_on_from_a_checkpoint(ranks: Ranks, how: str, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"

        def make(seed: int, **options: Any) -> tuple[nn.Module, ParamScheduler]:
            model = net(seed=seed)
            return model, scheduled(wrap(comm, adamw, model, **OPTIONS[how]), **options)

        model, scheduler = make(0)
        run(scheduler, model, lambda step: batch(step, comm.rank), range(4))
        heatopt.save(path, model=model, optimizer=scheduler.optimizer, scheduler=scheduler)
        expected = run(scheduler, model, lambda step: batch(step, comm.rank), range(4, 7))

        again, resumed = make(1)
        heatopt.load(path, model=again, optimizer=resumed.optimizer, scheduler=resumed)
        assert run(resumed, again, lambda step: batch(step, comm.rank), range(4, 7)) == expected
        assert_equal(again, model)

        _, other = make(1, rate=RATES["linear"])
        with pytest.raises(heatopt.CheckpointError, match="group 0, lr, style: 'cosine' there, 'linear' here; make"):
            heatopt.load(path, optimizer=other.optimizer, scheduler=other)
        assert other.last_epoch == 0
        _, restored = make(1, rate=RATES["linear"], on_load="restore")
        heatopt.load(path, optimizer=restored.optimizer, scheduler=restored)
        assert restored.values(5) == resumed.values(5)

    ranks(body)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_train_on(ranks: Ranks, copied: Callable[[Any], Any]) -> None:
    def body(comm: Communicator) -> None:
        expected = [expected_options(RATES["cosine"], n) for n in range(6)]
        model = net()
        scheduler = scheduled(wrap(comm, adamw, model))
        run(scheduler, model, lambda step: batch(step, comm.rank), range(2))
        other, others = copied((model, scheduler))
        assert run(others, other, lambda step: batch(step, 0), range(2, 5)) == expected[2:]
        assert options_of(scheduler.optimizer) == expected[2]
        assert others.optimizer.param_groups[0]["params"][0] is next(other.parameters())

    ranks(body)


def test_group_that_is_added_later(ranks: Ranks) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([*model.parameters()][2:], lr=0.1)

    def follow(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Batch]) -> None:
        scheduler = ParamScheduler(optimizer, lr=Ramp(0.1, 0.5, steps=4))
        train(optimizer, model, [data(0)])
        scheduler.step()
        optimizer.add_param_group({"params": [*model.parameters()][:2]})
        scheduler.override(1, lr=Ramp(0.2, 0.3, steps=4))
        for step in range(1, 4):
            train(optimizer, model, [data(step)])
            scheduler.step()
        assert scheduler.get_last_lr() == [0.5, 0.3]

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        follow(wrap(comm, make, model), model, lambda step: batch(step, comm.rank))
        follow(make(expected), expected, lambda step: whole(step, comm.size))
        assert_close(model, expected)

    ranks(body)


def test_samples_of_the_global_batch(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        scheduler = ParamScheduler(wrap(comm, sgd, model), lr=WarmupDecay(0.3, warmup_steps=10, decay_steps=100))
        for step in range(3):
            train(scheduler.optimizer, model, [batch(step, comm.rank)])
            scheduler.step(len(batch(step, comm.rank)[0]) * comm.size)
        assert scheduler.last_epoch == 12 * comm.size

    ranks(body)


def test_ranks_that_count_differently_are_named(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        scheduler = ParamScheduler(optimizer, lr=Ramp(0.0, 1.0, steps=64))
        train(optimizer, model, [batch(0, comm.rank)])
        scheduler.step(32 if comm.rank == comm.size - 1 else 16)
        with pytest.raises(heatopt.RankMismatchError, match=rf"'lr' .*has 0\.25, rank {comm.size - 1} has 0\.5"):
            train(optimizer, model, [batch(1, comm.rank)])
        assert_ranks_equal(comm, model)

    ranks(body, min_size=2)


def test_learning_rate_from_the_number_of_ranks(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        scheduler = ParamScheduler(wrap(comm, sgd, model), lr=goyal_lr(0.01, warmup_steps=2, comm=comm))
        rates = [0.01, 0.01 * (1 + comm.size) / 2, 0.01 * comm.size, 0.01 * comm.size]
        for step, expected in enumerate(rates):
            assert scheduler.get_last_lr() == pytest.approx([expected], rel=1e-15)
            train(scheduler.optimizer, model, [batch(step, comm.rank)])
            scheduler.step()

    ranks(body)


def test_option_that_no_torch_optimizer_has(ranks: Ranks) -> None:
    """A period, say: a whole number at each step, which ranks compare as they do all options."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        optimizer.param_groups[0]["sync_every"] = 8
        scheduler = ParamScheduler(optimizer, sync_every=Rounded(Ramp(8.0, 1.0, steps=3)))
        periods = []
        for step in range(4):
            periods.append(optimizer.param_groups[0]["sync_every"])
            train(optimizer, model, [batch(step, comm.rank)])
            scheduler.step()
        assert periods == [8, 6, 3, 1]

    ranks(body)


@pytest.mark.skipif(LAUNCH.launched, reason="looks into a world of threads")
@pytest.mark.parametrize("size", [2, 3])
def test_nothing_is_communicated(size: int) -> None:
    world = ThreadWorld(size)

    def body(comm: Communicator) -> int:
        model = net()
        scheduler = scheduled(wrap(comm, adamw, model))
        train(scheduler.optimizer, model, [batch(0, comm.rank)])
        comm.barrier()

        def own() -> int:
            return len([event for event in list(world.events) if event.rank == comm.rank])

        before = own()
        scheduler.step(5)
        scheduler.load_state_dict(scheduler.state_dict())
        scheduler.override(0, lr=0.1)
        return own() - before

    assert world.run(body) == [0] * size
