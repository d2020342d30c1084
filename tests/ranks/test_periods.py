"""Periods that schedules drive: which updates are averaged, on all ranks alike, and what cannot be a period."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import heatopt
from heatopt.local._fragments import cut
from heatopt.lr_scheduler import Constant, Milestones, ParamScheduler, Ramp, Rounded, Schedule
from tests.ranks._local import Values, mean, minus, plus, replicas, zeros
from tests.ranks._training import (
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    loss_of,
    net,
    sgd,
    train,
)

if TYPE_CHECKING:
    from heatopt.comm import Communicator
    from tests.support.ranks import Ranks

STEPS = 16
GROWING = Rounded(Ramp(2.0, 7.0, steps=STEPS))
FALLING = Rounded(Ramp(7.0, 2.0, steps=STEPS))
both = pytest.mark.parametrize("schedule", [GROWING, FALLING], ids=["growing", "falling"])

METHODS: dict[str, Callable[..., Any]] = {
    "LocalSGD": lambda o, **k: heatopt.LocalSGD(o, delay=1, average_moments=(1, 2), **k),
    "post-local": lambda o, **k: heatopt.LocalSGD(o, warmup_steps=3, **k),
    "SlowMo": heatopt.SlowMo,
    "Streaming": lambda o, **k: heatopt.DiLoCo(o, fragments=2, delay=2, **k),
    "CO2": heatopt.CO2,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def ends(schedule: Schedule, steps: int = STEPS) -> list[int]:
    """The last update of each period: a period has the length that the groups ask for as it begins.

    The first one begins with the first update, the others with the average after the update before, when the scheduler
    has not been stepped yet for that one.
    """
    found, end = [], int(schedule.value(0))
    while end <= steps:
        found.append(end)
        end += int(schedule.value(end - 1))
    return found


def drive(optimizer: Any, model: nn.Module, scheduler: Any, rank: int, steps: range = range(STEPS)) -> list[int]:
    """Train, and return after which updates averages began."""
    began, before = [], optimizer.report()["averages"]
    for step in steps:
        train(optimizer, model, [batch(step, rank)])
        scheduler.step()
        now = optimizer.report()["averages"]
        began += [step + 1] * (now - before)
        before = now
    return began


# Against obvious loops


@both
@pytest.mark.every_size
def test_local_sgd_bit_for_bit(ranks: Ranks, schedule: Schedule) -> None:
    def body(comm: Communicator) -> None:
        model, plain = net(torch.float32), net(torch.float32)
        optimizer, own = heatopt.LocalSGD(adamw(model), model=model, comm=comm), adamw(plain)
        scheduler = ParamScheduler(optimizer, sync_every=schedule)
        period, place = schedule.value(0), 0
        for step in range(STEPS):
            data = [batch(step, comm.rank, dtype=torch.float32)]
            train(optimizer, model, data)
            train(own, plain, data)
            place += 1
            if place == period:
                for parameter in plain.parameters():
                    comm.allreduce(parameter, "mean")
                period, place = schedule.value(step), 0
            assert_equal(list(model.parameters()), list(plain.parameters()))
            if comm.size > 1:
                assert optimizer.sync_every == period
            scheduler.step()

    ranks(body)


@both
def test_delayed_averages(ranks: Ranks, schedule: Schedule) -> None:
    """An average may arrive in the next period; whatever was done meanwhile is kept."""

    def body(comm: Communicator) -> list[int]:
        model, plain = net(), net()
        optimizer, own = heatopt.LocalSGD(sgd(model), model=model, comm=comm, delay=2), sgd(plain)
        began = drive(optimizer, model, ParamScheduler(optimizer, sync_every=schedule), comm.rank)
        sent: Values = []
        for step in range(1, STEPS + 1):
            train(own, plain, [batch(step - 1, comm.rank)])
            values = list(plain.parameters())
            if step - 2 in ends(schedule):
                for value, before in zip(values, sent, strict=True):
                    with torch.no_grad():
                        value.copy_(comm.allreduce(before.clone(), "mean") + (value - before))
            if step in ends(schedule):
                sent = [value.detach().clone() for value in values]
        assert_equal(list(model.parameters()), values)
        return began

    assert ranks(body, min_size=2)[-1] == ends(schedule)


@both
def test_co2_uses_what_was_sent_a_period_before(ranks: Ranks, schedule: Schedule) -> None:
    def body(comm: Communicator) -> tuple[Values, list[int]]:
        model = net()
        optimizer = heatopt.CO2(sgd(model), model=model, comm=comm)
        began = drive(optimizer, model, ParamScheduler(optimizer, sync_every=schedule), comm.rank)
        return [p.detach() for p in model.parameters()], began

    expected = replicas(sgd, ranks.size)
    start = expected[0].values
    u, sent = zeros(start), None
    for step in range(STEPS):
        for replica in expected:
            replica.update(step)
        if step + 1 in ends(schedule):
            done = minus(start, mean([replica.values for replica in expected]))
            if sent is not None:
                u = plus([0.2 * v for v in u], sent, 0.5)
                start = plus(start, u, -1.0)
            for replica in expected:
                replica.values = start
            sent = done
    for (values, began), replica in zip(ranks(body, min_size=2), expected, strict=True):
        assert_close(values, replica.values, rtol=1e-12, atol=1e-12)
        assert began == ends(schedule)


@both
def test_streaming_diloco(ranks: Ranks, schedule: Schedule) -> None:
    """Two fragments, each sent once per period and merged two updates later, in the next period perhaps."""

    def body(comm: Communicator) -> Values:
        model = net()
        optimizer = heatopt.DiLoCo(sgd(model), model=model, comm=comm, fragments=2, delay=2)
        drive(optimizer, model, ParamScheduler(optimizer, sync_every=schedule), comm.rank)
        return [p.detach() for p in model.parameters()]

    sent_after: dict[int, int] = {}
    start = 0
    for end in ends(schedule, 2 * STEPS):
        sent_after.update({start + (end - start) // 2: 0, end: 1})
        start = end
    expected = replicas(sgd, ranks.size)
    theta = expected[0].values
    velocity = zeros(theta)
    parts = cut([value.numel() for value in theta], 2)
    flight: dict[int, tuple[int, Values]] = {}
    for step in range(1, STEPS + 1):
        for replica in expected:
            replica.update(step - 1)
        if step in flight:
            part, average = flight.pop(step)
            for i in parts[part]:
                delta = theta[i] - average[i]
                velocity[i] = 0.5 * velocity[i] + delta
                theta[i] = theta[i] - 0.7 * (delta + 0.5 * velocity[i])
                for replica in expected:
                    values = replica.values
                    values[i] = 0.5 * theta[i] + 0.5 * values[i]
                    replica.values = values
        if step in sent_after:
            flight[step + 2] = sent_after[step], mean([replica.values for replica in expected])
    for values, replica in zip(ranks(body, min_size=2), expected, strict=True):
        assert_close(values, replica.values, rtol=1e-12, atol=1e-12)


# When a period is read


def test_samples_may_be_counted(ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[int]:
        model = net()
        optimizer = heatopt.LocalSGD(sgd(model), comm=comm)
        schedule = Rounded(Milestones(2, (4 * 6 * comm.size,), gamma=2))
        scheduler = ParamScheduler(optimizer, sync_every=schedule)
        began = []
        for step in range(16):
            train(optimizer, model, [batch(step, comm.rank)])
            scheduler.step(4 * comm.size)
            began.append(optimizer.report()["averages"])
        return [step for step in range(1, 16) if began[step] > began[step - 1]]

    # The sixth update has been counted when the eighth begins a period.
    assert ranks(body, min_size=2)[-1] == [1, 3, 5, 7, 11, 15]


def test_the_first_period_is_read_after_the_warm_up_and_others_when_they_begin(ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[int]:
        model = net()
        optimizer = heatopt.LocalSGD(sgd(model), model=model, comm=comm, sync_every=9, warmup_steps=2)

        class ByHand:
            def step(self) -> None:
                changes = {2: 3, 3: 7, 4: 2, 6: 5}
                optimizer.param_groups[0]["sync_every"] = changes.get(
                    optimizer.report()["updates"], optimizer.param_groups[0]["sync_every"]
                )

        return drive(optimizer, model, ByHand(), comm.rank, range(14))

    assert ranks(body, min_size=2)[-1] == [5, 7, 12]


def test_in_join(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = heatopt.LocalSGD(sgd(model), model=model, comm=comm)
        for group in optimizer.param_groups:
            group["sync_every"] = 3
        with optimizer.join():
            train(optimizer, model, [batch(step, comm.rank) for step in range((7, 0, 4, 2)[comm.rank])])
        assert_ranks_equal(comm, model)
        assert comm.size == 1 or optimizer.sync_every == 3

    ranks(body)


# State


@pytest.mark.parametrize("saved_after", [4, 5, 9])
@every_method
def test_resumed_in_any_place_it_is_bit_equal(ranks: Ranks, method: Callable[..., Any], saved_after: int) -> None:
    def body(comm: Communicator) -> None:
        def make(seed: int, sync_every: int) -> tuple[nn.Module, Any, ParamScheduler]:
            model = net(seed=seed)
            optimizer = method(adamw(model), model=model, comm=comm, sync_every=sync_every)
            return model, optimizer, ParamScheduler(optimizer, sync_every=GROWING)

        model, optimizer, scheduler = make(0, 4)
        drive(optimizer, model, scheduler, comm.rank, range(saved_after))
        saved = copy.deepcopy([thing.state_dict() for thing in (model, optimizer, scheduler)])
        began = drive(optimizer, model, scheduler, comm.rank, range(saved_after, STEPS))
        again, resumed, its_scheduler = make(1, 9)
        for thing, state in zip((again, resumed, its_scheduler), saved, strict=True):
            thing.load_state_dict(state)
        assert drive(resumed, again, its_scheduler, comm.rank, range(saved_after, STEPS)) == began
        assert_equal(again, model)

    ranks(body)


@every_method
def test_a_plain_optimizer_loads_it_and_it_loads_a_plain_one(ranks: Ranks, method: Callable[..., Any]) -> None:
    def body(comm: Communicator) -> None:
        model, plain = net(), net()
        optimizer, own = method(adamw(model), model=model, comm=comm, sync_every=4), adamw(plain)
        optimizer.param_groups[0]["sync_every"] = 5
        train(optimizer, model, [batch(step, comm.rank) for step in range(3)])
        state_dict = adamw(plain).state_dict()
        own.load_state_dict(optimizer.state_dict())
        train(own, plain, [batch(0, 0)])
        optimizer.load_state_dict(state_dict)
        assert [group["sync_every"] for group in optimizer.param_groups] == [5]
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert [group["sync_every"] for group in optimizer.param_groups] == [5, 5]
        began = drive(optimizer, model, ParamScheduler(optimizer, sync_every=5), comm.rank)
        assert comm.size == 1 or 5 + 3 * (method is METHODS["post-local"]) in began

    ranks(body)


# What cannot be


@pytest.mark.parametrize(
    ("period", "message"),
    [
        (2.5, r"sync_every of parameter group 0 must be a whole number >= 1 .*got 2\.5; .*Rounded"),
        (4.0, r"must be a whole number >= 1 .*got 4\.0; .*Rounded"),
        (0, "must be a whole number >= 1 .*got 0"),
        (True, "must be a whole number >= 1 .*got True"),
        ("often", "must be a whole number >= 1 .*got 'often'"),
        (1, "sync_every must be at least 2, with fragments=1 and delay=2, got 1"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_what_is_no_period_is_refused_on_all_ranks(ranks: Ranks, period: Any, message: str, first: bool) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = heatopt.LocalSGD(sgd(model), model=model, comm=comm, sync_every=2, delay=2)
        if not first:
            train(optimizer, model, [batch(0, comm.rank)])
        optimizer.param_groups[0]["sync_every"] = period
        with pytest.raises(ValueError, match=message):
            train(optimizer, model, [batch(1, comm.rank)])
        optimizer.param_groups[0]["sync_every"] = 3
        train(optimizer, model, [batch(step, comm.rank) for step in range(2, 8)])  # and it goes on
        assert optimizer.sync_every == 3
        optimizer.synchronize()
        assert_ranks_equal(comm, model)

    ranks(body, min_size=2)


def test_groups_that_differ_are_refused(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        groups = [{"params": [p]} for p in model.parameters()]
        optimizer = heatopt.DiLoCo(torch.optim.SGD(groups, lr=0.1), comm=comm, sync_every=2)
        ParamScheduler(optimizer, sync_every=Constant(4), groups={3: {"sync_every": 8}})
        with pytest.raises(ValueError, match=r"the same in all parameter groups.*group 0 has 4, group 3 has 8; leave"):
            train(optimizer, model, [batch(0, comm.rank)])

    ranks(body, min_size=2)


@pytest.mark.parametrize("at", [0, 1, 4, 5])
@every_method
def test_ranks_that_ask_for_different_periods_are_named(ranks: Ranks, method: Callable[..., Any], at: int) -> None:
    """Before the first update, within a period, and just before and after one begins."""

    def body(comm: Communicator) -> str:
        model = net()
        optimizer = method(sgd(model), model=model, comm=comm, sync_every=5)
        train(optimizer, model, [batch(step, comm.rank) for step in range(at)])
        if comm.rank == comm.size - 1:
            optimizer.param_groups[0]["sync_every"] = 6
        try:
            train(optimizer, model, [batch(step, comm.rank) for step in range(at, 16)])
        except heatopt.RankMismatchError as error:
            return str(error)
        return "nothing was noticed"

    for message in ranks(body, min_size=2):
        assert "'sync_every" in message or "the first period, of another length than at construction" in message


def test_daso_decides_itself(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        optimizer = heatopt.DASO(sgd(net()), 3, comm=comm)
        with pytest.raises(ValueError, match=r"'sync_every' of DASO .*from the loss.*max_global_skips"):
            ParamScheduler(optimizer, sync_every=Constant(4))

    ranks(body)


def test_the_optimizer_may_be_driven_through_the_wrapped_one(ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[int]:
        model = net()
        inner = sgd(model)
        optimizer = heatopt.SlowMo(inner, model=model, comm=comm)
        scheduler = ParamScheduler(inner, lr=Ramp(0.1, 0.05, steps=9), sync_every=FALLING)
        for step in range(7):
            optimizer.zero_grad()
            loss_of(model, batch(step, comm.rank)).backward()
            optimizer.step()
            scheduler.step()
        return [optimizer.sync_every]

    assert ranks(body, min_size=2)[-1] == [FALLING.value(6)]


def test_whole_numbers_of_numpy(ranks: Ranks) -> None:
    """At construction as in the groups; what a checkpoint has of them is plain."""

    def body(comm: Communicator) -> None:
        optimizer = heatopt.LocalSGD(sgd(net()), comm=comm, sync_every=np.int64(3), delay=np.int32(1))  # type: ignore[arg-type]
        assert optimizer.sync_every == 3
        assert type(optimizer.param_groups[0]["sync_every"]) is int

    ranks(body)
