"""ParamScheduler on plain optimizers: what it writes, when, how it is saved, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from heatopt import lr_scheduler as schedulers
from heatopt.lr_scheduler import Constant, Milestones, ParamScheduler, Ramp, Rounded, Schedule, WarmupDecay

RATE = WarmupDecay(0.3, 0.07, init_value=0.01, warmup_steps=7, decay_steps=50, style="cosine")
DECAY = Ramp(0.01, 0.1, steps=20, style="cosine")
MOMENTUM = Ramp(0.95, 0.85, steps=9)


def sgd(groups: int = 2, **options: Any) -> torch.optim.SGD:
    chosen = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.5, **options}
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(groups)], **chosen)


def adam(**options: Any) -> torch.optim.Adam:
    return torch.optim.Adam([nn.Parameter(torch.ones(2))], foreach=False, **options)


def advance(scheduler: LRScheduler, steps: int, **arguments: Any) -> None:
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step(**arguments)


def options(optimizer: torch.optim.Optimizer, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(group[name] for name in names) for group in optimizer.param_groups]


# What is written


def test_options_follow_their_schedules() -> None:
    optimizer = sgd()
    scheduler = ParamScheduler(optimizer, lr=RATE, weight_decay=DECAY, momentum=MOMENTUM)
    assert isinstance(scheduler, LRScheduler)
    for n in range(60):
        expected = (RATE.value(n), DECAY.value(n), MOMENTUM.value(n))
        assert options(optimizer, "lr", "weight_decay", "momentum") == [expected] * 2
        assert scheduler.values(n) == [dict(zip(("lr", "weight_decay", "momentum"), expected, strict=True))] * 2
        assert scheduler.get_last_lr() == scheduler.get_lr() == [expected[0]] * 2
        assert scheduler.last_epoch == n
        advance(scheduler, 1)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1.0, 1.0]  # what torch's schedulers leave


@pytest.mark.parametrize("increments", [[32, 16, 48], [0, 96], [np.int64(95), 1]])
def test_samples_can_be_counted(increments: list[Any]) -> None:
    optimizer = sgd()
    scheduler = ParamScheduler(optimizer, lr=Ramp(0.0, 1.0, steps=1000))
    for increment in increments:
        optimizer.step()
        scheduler.step(increment)
    assert type(scheduler.last_epoch) is int
    assert options(optimizer, "lr") == [(Ramp(0.0, 1.0, steps=1000).value(96),)] * 2


def test_step_of_nothing_writes_again() -> None:
    optimizer = sgd()
    scheduler = ParamScheduler(optimizer, lr=RATE)
    optimizer.param_groups[1]["lr"] = 7.0
    scheduler.step(0)
    assert options(optimizer, "lr") == [(0.01,)] * 2


def test_elements_of_a_tuple() -> None:
    optimizer = adam()
    scheduler = ParamScheduler(optimizer, betas=(None, Ramp(0.9, 0.99, steps=3)))
    assert scheduler.values(3) == [{"betas": (None, 0.99)}]
    advance(scheduler, 2)
    assert optimizer.param_groups[0]["betas"] == (0.9, Ramp(0.9, 0.99, steps=3).value(2))
    assert scheduler.get_last_lr() == scheduler.get_lr() == [1e-3]  # not driven
    ParamScheduler(optimizer, betas=(0.5, None))
    assert optimizer.param_groups[0]["betas"] == (0.5, Ramp(0.9, 0.99, steps=3).value(2))


def test_tensors_are_filled() -> None:
    rate, beta = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    optimizer = adam(lr=rate, betas=(torch.tensor(0.9), beta), capturable=False)
    scheduler = ParamScheduler(optimizer, lr=RATE, betas=(None, DECAY))
    advance(scheduler, 5)
    group = optimizer.param_groups[0]
    assert group["lr"] is rate
    assert group["betas"][1] is beta
    assert (rate.item(), beta.item()) == (RATE.value(5), DECAY.value(5))
    assert group["betas"][0].item() == torch.tensor(0.9).item()
    (last,) = scheduler.get_last_lr()
    assert isinstance(last, torch.Tensor)
    assert last is not rate  # the user may write into it
    assert last.item() == RATE.value(5)


def test_any_option_that_is_a_number() -> None:
    optimizer = sgd()
    for group in optimizer.param_groups:
        group["sync_every"] = 4
    scheduler = ParamScheduler(optimizer, sync_every=Rounded(Ramp(1.0, 8.0, steps=7)))
    found = []
    for _ in range(9):
        found.append(optimizer.param_groups[1]["sync_every"])
        advance(scheduler, 1)
    assert found == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert all(type(period) is int for period in found)


@pytest.mark.parametrize("given", [np.float64(0.25), np.float32(0.25), Constant(np.float64(0.25))])
def test_numbers_of_numpy_become_plain(given: Any) -> None:
    scheduler = ParamScheduler(sgd(), lr=given)
    assert type(scheduler.optimizer.param_groups[0]["lr"]) is float
    assert repr(scheduler.state_dict()["settings"][0]) == "{'lr': {'kind': 'Constant', 'number': 0.25}}"


def test_groups_that_differ() -> None:
    optimizer = sgd(3)
    scheduler = ParamScheduler(
        optimizer,
        lr=RATE,
        weight_decay=DECAY,
        groups={1: {"lr": 0.1 * RATE, "weight_decay": 0.0}, 2: {"weight_decay": None, "momentum": MOMENTUM}},
    )
    advance(scheduler, 4)
    assert options(optimizer, "lr", "weight_decay", "momentum") == [
        (RATE.value(4), DECAY.value(4), 0.9),
        (0.1 * RATE.value(4), 0.0, 0.9),
        (RATE.value(4), 0.5, MOMENTUM.value(4)),
    ]


def test_groups_alone() -> None:
    optimizer = sgd()
    advance(ParamScheduler(optimizer, groups={1: {"lr": replace(RATE, max_value=0.6)}}), 7)
    assert options(optimizer, "lr") == [(1.0,), (0.6,)]


def test_groups_that_are_added() -> None:
    optimizer = sgd()
    scheduler = ParamScheduler(optimizer, lr=RATE, groups={0: {"momentum": MOMENTUM}})
    advance(scheduler, 3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 5.0})
    assert options(optimizer, "lr") == [(RATE.value(3),), (RATE.value(3),), (5.0,)]
    advance(scheduler, 1)
    assert options(optimizer, "lr", "momentum") == [
        (RATE.value(4), MOMENTUM.value(4)),
        (RATE.value(4), 0.9),
        (RATE.value(4), 0.9),
    ]
    scheduler.override(2, lr=2 * RATE, momentum=0.0)
    assert options(optimizer, "lr", "momentum")[2] == (2 * RATE.value(4), 0.0)
    scheduler.override(2, lr=None)
    advance(scheduler, 1)
    assert options(optimizer, "lr")[1:] == [(RATE.value(5),), (2 * RATE.value(4),)]


def test_several_schedulers_of_one_optimizer() -> None:
    optimizer = sgd()
    ours = ParamScheduler(optimizer, weight_decay=DECAY)
    chained = schedulers.ChainedScheduler([schedulers.StepLR(optimizer, 2, 0.5), ours])
    advance(chained, 3)
    assert options(optimizer, "lr", "weight_decay") == [(0.5, DECAY.value(3))] * 2
    assert chained.get_last_lr() == [0.5, 0.5]


def test_one_after_the_other() -> None:
    optimizer = sgd(1)
    ours = ParamScheduler(optimizer, lr=Ramp(0.0, 1.0, steps=3), momentum=MOMENTUM)
    later = ParamScheduler(optimizer, lr=Ramp(9.0, 5.0, steps=4))
    sequence = schedulers.SequentialLR(optimizer, [ours, later], milestones=[4])
    found = []
    for _ in range(9):
        found.append(optimizer.param_groups[0]["lr"])
        advance(sequence, 1)
    assert found == pytest.approx([0, 1 / 3, 2 / 3, 1, 9, 8, 7, 6, 5], abs=1e-15)
    assert optimizer.param_groups[0]["momentum"] == MOMENTUM.value(3)


# Order of the calls


def test_a_step_before_the_optimizers_warns() -> None:
    scheduler = ParamScheduler(sgd(), lr=RATE)
    with pytest.warns(UserWarning, match=r"before `optimizer\.step\(\)`"):
        scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(ParamScheduler(sgd(), lr=RATE), 3)


def test_a_warning_that_is_an_error_leaves_the_count() -> None:
    scheduler = ParamScheduler(sgd(), lr=RATE)
    with pytest.raises(UserWarning):
        scheduler.step(10)
    assert scheduler.last_epoch == 0
    assert options(scheduler.optimizer, "lr") == [(0.01,)] * 2


# Saved and loaded


def full(optimizer: torch.optim.Optimizer, **changes: Any) -> ParamScheduler:
    given = {"lr": RATE, "weight_decay": DECAY, "groups": {1: {"lr": 0.1 * RATE, "momentum": None}}, **changes}
    return ParamScheduler(optimizer, **given)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 49, 50, 51, 400])
def test_going_on_at_any_count(count: int) -> None:
    """Bit for bit what a run has that was never interrupted, whatever the optimizer had before."""
    whole = full(sgd())
    advance(whole, count)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    again = full(sgd(lr=9.0))
    again.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        assert again.state_dict() == whole.state_dict()
        assert options(again.optimizer, "lr", "weight_decay") == options(whole.optimizer, "lr", "weight_decay")
        assert again.get_last_lr() == whole.get_last_lr()
        advance(again, 1)
        advance(whole, 1)
    jumped = full(sgd())
    jumped.optimizer.step()
    jumped.step(whole.last_epoch)
    assert options(jumped.optimizer, "lr", "weight_decay") == options(whole.optimizer, "lr", "weight_decay")


def test_state_is_a_copy() -> None:
    scheduler = full(sgd())
    state = scheduler.state_dict()
    kept = copy.deepcopy(state)
    advance(scheduler, 2)
    assert state == kept
    state["settings"][0]["lr"]["max_value"] = 3.0
    assert scheduler.state_dict()["settings"] == kept["settings"]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"lr": replace(RATE, max_value=0.4)}, "parameter group 0, lr, max_value: 0.3 there, 0.4 here"),
        ({"lr": replace(RATE, style="linear")}, "parameter group 0, lr, style: 'cosine' there, 'linear' here"),
        ({"lr": 0.3}, "parameter group 0, lr: {'kind': 'WarmupDecay', .* there, {'kind': 'Constant', .* here"),
        ({"groups": {1: {"lr": 0.2 * RATE}}}, "parameter group 1, lr, factor: 0.1 there, 0.2 here"),
        ({"groups": {}}, "parameter group 1, lr: {'kind': 'Scaled', .* here"),
        ({"momentum": 0.9}, "parameter group 0, momentum: None there, {'kind': 'Constant'"),
    ],
)
def test_other_schedules_are_refused(changes: dict[str, Any], difference: str) -> None:
    saved = full(sgd())
    advance(saved, 5)
    other = full(sgd(), **changes)
    before, written = other.state_dict(), options(other.optimizer, "lr", "weight_decay")
    with pytest.raises(ValueError, match=rf"^the state has other schedules: {difference}.*on_load='restore' to take"):
        other.load_state_dict(saved.state_dict())
    assert other.state_dict() == before
    assert options(other.optimizer, "lr", "weight_decay") == written


def test_restore_takes_the_schedules_of_the_state() -> None:
    saved = full(adam(), groups={}, betas=(None, Ramp(0.9, 0.99, steps=30)))
    advance(saved, 5)
    other = ParamScheduler(adam(), lr=1.0, eps=1e-5, on_load="restore")
    other.load_state_dict(saved.state_dict())
    assert other.state_dict() == saved.state_dict()
    other.optimizer.param_groups[0]["eps"] = 1e-7
    advance(other, 9)
    advance(saved, 9)
    names = ("lr", "weight_decay", "betas")
    assert options(other.optimizer, *names) == options(saved.optimizer, *names)
    assert other.optimizer.param_groups[0]["eps"] == 1e-7  # the state does not drive it
    other.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    advance(other, 1)
    assert other.optimizer.param_groups[1]["lr"] == 1.0  # nothing was saved for a group that is new


def test_keep_takes_the_count_alone() -> None:
    saved = full(sgd())
    advance(saved, 5)
    other = ParamScheduler(sgd(3), lr=2 * RATE, on_load="keep")
    other.load_state_dict(saved.state_dict())
    assert (other.last_epoch, options(other.optimizer, "lr")) == (5, [(2 * RATE.value(5),)] * 3)
    other.optimizer.param_groups[0]["lr"] = 0.0  # as a state of the optimizer would, if it is loaded later
    other.step(0)
    assert options(other.optimizer, "lr") == [(2 * RATE.value(5),)] * 3


@pytest.mark.parametrize("on_load", ["refuse", "restore"])
def test_another_number_of_groups_is_refused(on_load: str) -> None:
    state = full(sgd()).state_dict()
    with pytest.raises(ValueError, match=r"^the state is for 2 parameter groups, but the optimizer has 3$"):
        full(sgd(3), on_load=on_load).load_state_dict(state)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, ValueError, "this is no state of a ParamScheduler: 'last_epoch' is missing"),
        (schedulers.StepLR(sgd(), 3).state_dict(), ValueError, "this is no state .*'settings' is missing in "),
        ({"last_epoch": -1, "_step_count": 1, "settings": []}, ValueError, "last_epoch of the state must be >= 0"),
        ({"last_epoch": 0.5, "_step_count": 1, "settings": []}, TypeError, "last_epoch of the state must be a whole"),
    ],
)
def test_states_of_something_else(state: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        full(sgd()).load_state_dict(state)


def test_restored_schedules_must_fit() -> None:
    state = ParamScheduler(adam(), betas=(0.5, 0.6)).state_dict()
    other = ParamScheduler(sgd(1), lr=RATE, on_load="restore")
    with pytest.raises(ValueError, match="parameter group 0 of SGD has no option 'betas'"):
        other.load_state_dict(state)
    assert other.state_dict()["settings"] == [{"lr": RATE.settings()}]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies(copied: Any) -> None:
    scheduler = full(sgd())
    advance(scheduler, 5)
    other = copied(scheduler)
    assert other.optimizer is not scheduler.optimizer
    advance(other, 2)
    assert options(scheduler.optimizer, "lr") == [(RATE.value(5),), (0.1 * RATE.value(5),)]
    assert options(other.optimizer, "lr") == [(RATE.value(7),), (0.1 * RATE.value(7),)]


# Errors


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "there is nothing to drive: give schedules by option, such as lr=..., or groups="),
        ({"rate": 0.1}, ValueError, "parameter group 0 of SGD has no option 'rate'; it has lr, momentum, dampening"),
        ({"params": 0.1}, ValueError, "parameter group 0 of SGD has no option 'params'"),
        ({"lr": "0.1"}, TypeError, "lr must be a heatopt.lr_scheduler.Schedule or a number, got '0.1'"),
        ({"lr": Milestones}, TypeError, "lr must be .*the class: make an instance of it first"),
        ({"lr": lambda n: 0.1}, TypeError, "lr must be a heatopt.lr_scheduler.Schedule or a number"),
        ({"lr": None}, TypeError, "lr must be a schedule or a number, got None: leave it out, or use groups="),
        ({"lr": float("inf")}, ValueError, "lr must be finite, got inf"),
        ({"lr": (0.1, 0.2)}, ValueError, r"'lr' of parameter group 0 of SGD is 1\.0: give one schedule, not 2"),
        ({"nesterov": 1.0}, ValueError, "'nesterov' of parameter group 0 of SGD is False, and .* only drive a number"),
        ({"fused": 1.0}, ValueError, "'fused' of parameter group 0 of SGD is None, and .* only drive a number"),
        ({"groups": [{"lr": 0.1}]}, TypeError, "groups must map numbers of groups to their schedules"),
        ({"groups": {2: {"lr": 0.1}}}, ValueError, "there is no parameter group 2; the optimizer has 2, from 0"),
        ({"groups": {-1: {"lr": 0.1}}}, ValueError, "number of a group must be >= 0, got -1"),
        ({"groups": {"0": {"lr": 0.1}}}, TypeError, "number of a group must be a whole number, got '0'"),
        ({"groups": {1: 0.1}}, TypeError, r"schedules of group 1 must be given by option, .* got 0\.1"),
        ({"groups": {1: {"rate": 0.1}}}, ValueError, "parameter group 1 of SGD has no option 'rate'"),
        ({"lr": 0.1, "on_load": "ignore"}, ValueError, "on_load must be one of 'refuse', 'restore', 'keep', got 'ign"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = sgd()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=f"^{message}"):
        ParamScheduler(optimizer, **given)
    assert optimizer.state_dict() == before
    assert not hasattr(optimizer.step, "_wrapped_by_lr_sched")


@pytest.mark.parametrize("betas", [0.5, (0.5,), (0.5, 0.6, 0.7)])
def test_wrong_tuples(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"^'betas' of parameter group 0 of Adam is \(0.9, 0.999\): give 2 schedules"):
        ParamScheduler(adam(), betas=betas)


def test_not_an_optimizer() -> None:
    with pytest.raises(TypeError, match=r"^optimizer must be a torch\.optim\.Optimizer, got list"):
        ParamScheduler([], lr=RATE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("increment", "error", "message"),
    [
        (-1, ValueError, "increment must be >= 0, got -1"),
        (1.0, TypeError, r"increment must be a whole number, got 1\.0"),
        (None, TypeError, "increment must be a whole number, got None"),
        (True, TypeError, "increment must be a whole number, got True"),
    ],
)
def test_wrong_increments(increment: Any, error: type[Exception], message: str) -> None:
    scheduler = ParamScheduler(sgd(), lr=RATE)
    scheduler.optimizer.step()
    with pytest.raises(error, match=f"^{message}"):
        scheduler.step(increment)
    assert scheduler.last_epoch == 0


def test_a_wrong_override_changes_nothing() -> None:
    scheduler = full(sgd())
    before = scheduler.state_dict()
    for wrong in ({"rate": 0.1}, {"lr": "1"}, {"momentum": (1.0, 2.0)}):
        with pytest.raises((TypeError, ValueError)):
            scheduler.override(1, weight_decay=0.3, **wrong)
        assert scheduler.state_dict() == before
    with pytest.raises(ValueError, match="there is no parameter group 5"):
        scheduler.override(5, lr=0.1)
    assert scheduler.state_dict() == before


def test_a_group_that_lacks_an_option() -> None:
    """Named, before anything is written."""
    optimizer = sgd()
    optimizer.param_groups[0]["period"] = optimizer.param_groups[1]["period"] = 1
    scheduler = ParamScheduler(optimizer, lr=RATE, period=Rounded(DECAY))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    optimizer.step()
    with pytest.raises(ValueError, match="parameter group 2 of SGD has no option 'period'"):
        scheduler.step(5)
    assert scheduler.last_epoch == 0
    assert options(optimizer, "lr")[:2] == [(0.01,)] * 2


class NoDataclass(Schedule):
    def at(self, n: float) -> float:
        return 1.0


class NotANumber(Constant):
    def at(self, n: float) -> float:
        return float("nan")


def test_wrong_schedules_of_ones_own() -> None:
    with pytest.raises(TypeError, match="NoDataclass must be a dataclass, so that its settings are known"):
        ParamScheduler(sgd(), lr=NoDataclass())
    with pytest.raises(ValueError, match="lr must be finite, got nan"):
        ParamScheduler(sgd(), lr=NotANumber(1.0))
