"""What happens after which update, how averages are merged, and DASO's phases: all without ranks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

import heatopt
from heatopt.local import Cycle, DasoPeriods, PeriodicSchedule, Phase
from heatopt.local._fragments import cut
from heatopt.local._moments import moments_of
from heatopt.local._packing import Packed
from heatopt.local._rules import keep_progress, mix, weigh_stale
from heatopt.local._schedule import GroupMean, Merge, MomentMean, ReplicaMean, Send, SyncPlan


def actions(schedule: PeriodicSchedule, steps: int) -> dict[int, tuple[object, ...]]:
    plans = {step: schedule.plan(step) for step in range(1, steps + 1)}
    return {step: plan.actions for step, plan in plans.items() if plan.actions}


def test_plain_period() -> None:
    assert actions(PeriodicSchedule(3), 7) == {3: (Send(0), Merge(0)), 6: (Send(0), Merge(0))}


def test_warm_up_is_exact_and_then_counted_anew() -> None:
    schedule = PeriodicSchedule(2, warmup_steps=3)
    assert [schedule.plan(step).exact for step in range(1, 6)] == [True, True, True, False, False]
    assert actions(schedule, 7) == {5: (Send(0), Merge(0)), 7: (Send(0), Merge(0))}


def test_delayed_average_is_merged_later() -> None:
    found = actions(PeriodicSchedule(4, delay=3), 12)
    assert found == {4: (Send(0, 3),), 7: (Merge(0),), 8: (Send(0, 3),), 11: (Merge(0),), 12: (Send(0, 3),)}


def test_fragments_take_turns() -> None:
    found = actions(PeriodicSchedule(6, fragments=3, delay=1), 9)
    assert found == {
        2: (Send(0, 1),),
        3: (Merge(0),),
        4: (Send(1, 1),),
        5: (Merge(1),),
        6: (Send(2, 1),),
        7: (Merge(2),),
        8: (Send(0, 1),),
        9: (Merge(0),),
    }


def test_fragments_of_an_uneven_period_are_each_sent_once() -> None:
    found = actions(PeriodicSchedule(7, fragments=3), 14)
    sent = [action.fragment for step in found.values() for action in step if isinstance(action, Send)]
    assert sent == [0, 1, 2, 0, 1, 2]


def test_a_delay_of_a_whole_period() -> None:
    assert actions(PeriodicSchedule(2, delay=2), 4) == {2: (Send(0, 2),), 4: (Merge(0), Send(0, 2))}


def test_what_is_late_is_merged_after_the_next_sending() -> None:
    """The first time nothing has come: a period begins without it."""
    order = (Send(0, 1), Merge(0))
    assert actions(PeriodicSchedule(2, delay=None), 6) == {2: order, 4: order, 6: order}


def test_only_the_longest_nested_period_counts() -> None:
    found = actions(PeriodicSchedule(8, nested=(2, 4)), 8)
    assert found == {2: (GroupMean(0),), 4: (GroupMean(1),), 6: (GroupMean(0),), 8: (Send(0), Merge(0))}


def test_moments_are_averaged_less_often() -> None:
    found = actions(PeriodicSchedule(2, moments=(2, 3)), 12)
    moments = {s: [a for a in plan if isinstance(a, MomentMean)] for s, plan in found.items()}
    assert moments == {
        2: [],
        4: [MomentMean(1)],
        6: [MomentMean(2)],
        8: [MomentMean(1)],
        10: [],
        12: [MomentMean(1), MomentMean(2)],
    }


# Periods that change


def driven(schedule: PeriodicSchedule, lengths: list[int]) -> dict[int, tuple[object, ...]]:
    """The actions of periods of these lengths, one after the other."""
    found: dict[int, tuple[object, ...]] = {}
    step = schedule.warmup_steps
    for length in lengths:
        schedule = schedule.followed_by(length, step)
        for place in range(1, length + 1):
            plan = schedule.plan(step + place)
            assert plan == schedule.plan(step + place)
            assert plan.ends_period == (place == length)
            if plan.actions:
                found[step + place] = plan.actions
        step += length
    return found


LENGTHS = [4, 4, 2, 7, 3, 3, 2, 8]


@pytest.mark.parametrize(("delay", "fragments"), [(0, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("warmup", [0, 5])
def test_fragments_are_sent_within_their_period_and_merged_when_due(delay: int, fragments: int, warmup: int) -> None:
    expected: dict[int, list[object]] = {}
    start = warmup
    for length in LENGTHS:
        for fragment in range(fragments):
            sent = start + (fragment + 1) * length // fragments
            expected.setdefault(sent, []).append(Send(fragment, delay))
            expected.setdefault(sent + delay, []).append(Merge(fragment))
        start += length
    found = driven(PeriodicSchedule(4, fragments=fragments, delay=delay, warmup_steps=warmup), LENGTHS)
    assert {step: set(actions) for step, actions in found.items()} == {
        step: set(actions) for step, actions in expected.items() if step <= start
    }
    for actions in found.values():  # what is on its way is merged before the same fragment is sent again
        order = [type(action) for action in actions if getattr(action, "fragment", None) == 0]
        assert order in ([], [Merge], [Send], [Send, Merge] if delay == 0 else [Merge, Send])


def test_what_is_late_is_merged_at_the_end_of_the_next_period_whatever_its_length() -> None:
    found = driven(PeriodicSchedule(4, delay=None), [4, 2, 5])
    order = (Send(0, 1), Merge(0))
    assert found == {4: order, 6: order, 11: order}


def test_moments_count_periods_and_nested_groups_updates() -> None:
    found = driven(PeriodicSchedule(4, moments=(2, 3), nested=(2,)), [4, 8, 4, 4, 8, 4])
    moments = [
        (step, action.order) for step, actions in found.items() for action in actions if type(action) is MomentMean
    ]
    assert moments == [(12, 1), (16, 2), (20, 1), (32, 1), (32, 2)]
    nested = [step for step, actions in found.items() if GroupMean(0) in actions]
    assert nested == [2, 6, 8, 10, 14, 18, 22, 24, 26, 30]


def test_an_average_covers_the_updates_since_the_last_of_its_fragment() -> None:
    schedule = PeriodicSchedule(6, fragments=2)
    assert [schedule.plan(step).covers for step in (3, 6, 9, 12)] == [3, 6, 6, 6]
    schedule = schedule.followed_by(2, 12)
    assert [schedule.plan(step).covers for step in (13, 14, 15, 16)] == [4, 2, 2, 2]


@pytest.mark.parametrize(
    ("schedule", "length", "message"),
    [
        (PeriodicSchedule(4, delay=3), 2, "sync_every must be at least 3, with fragments=1 and delay=3, got 2"),
        (PeriodicSchedule(4, fragments=3), 2, "sync_every must be at least 3, with fragments=3 and delay=0, got 2"),
        (PeriodicSchedule(4, nested=(2,)), 5, r"grow and divide each other and sync_every, got \(2, 5\)"),
        (PeriodicSchedule(4, nested=(2,)), 2, r"grow and divide each other and sync_every, got \(2, 2\)"),
    ],
)
def test_periods_that_are_too_short(schedule: PeriodicSchedule, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule.followed_by(length, 4)


def test_merges_alone_need_no_meeting() -> None:
    assert not SyncPlan(actions=(Merge(0), ReplicaMean())).meets
    assert SyncPlan(actions=(Merge(0), Send(0))).meets


# Rules


def test_rules() -> None:
    center, now, sent = (torch.tensor([value], dtype=torch.float64) for value in (1.0, 5.0, 3.0))
    assert mix(center, now, 0.25).item() == 2.0
    assert mix(center, now, 0) is center
    assert keep_progress(center, now, sent).item() == 3.0
    # (2 * 2 * 5 + 8) / (2 * 2 + 3), and (5 + 8) / (1 + 3)
    assert weigh_stale(center * 8, now, 2, 3).item() == 4.0
    assert weigh_stale(center * 8, now, 0, 3).item() == 3.25


@pytest.mark.parametrize(
    ("sizes", "count", "fragments"),
    [
        ([4, 4, 4, 4], 2, [[0, 1], [2, 3]]),
        ([1, 1, 10], 3, [[0], [1], [2]]),
        ([10, 1, 1], 3, [[0], [1], [2]]),
        ([10, 1, 1, 1], 2, [[0], [1, 2, 3]]),
        ([0, 0, 0], 2, [[0], [1, 2]]),
        ([5], 1, [[0]]),
    ],
)
def test_fragments_are_even_and_none_is_empty(sizes: list[int], count: int, fragments: list[list[int]]) -> None:
    assert cut(sizes, count) == fragments


def test_moments_by_name() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([parameter], amsgrad=True)
    parameter.grad = torch.ones(2)
    adam.step()
    assert list(moments_of(adam.state[parameter], 1)) == ["exp_avg"]
    assert list(moments_of(adam.state[parameter], 2)) == ["exp_avg_sq", "max_exp_avg_sq"]


def test_packing_keeps_shapes_and_dtypes() -> None:
    tensors = [torch.randn(2, 3), torch.ones((), dtype=torch.float64), torch.empty(0, 3), torch.randn(5)]
    packed = Packed(tensors, 4)
    assert [chunk.numel() for chunk in packed.chunks] == [4, 4, 3, 1]
    for tensor, copy in zip(tensors, packed.unpack(), strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
    packed.chunks[0].zero_()
    assert torch.equal(packed.unpack()[0].flatten()[:4], torch.zeros(4))


# DASO's phases


def periods(**changed: int | float) -> DasoPeriods:
    default: dict[str, float] = {
        "total_epochs": 40,
        "warmup_epochs": 4,
        "cooldown_epochs": 4,
        "stability_level": 0.05,
        "max_global_skips": 8,
        "skip_reduction_factor": 2,
        "local_skip_factor": 4,
    }
    return DasoPeriods(**(default | changed))  # type: ignore[arg-type]


def trace(cycle: Cycle, epochs: int, loss: float = 1.0) -> list[tuple[int, int, int]]:
    """(B, local skip, S) of each epoch."""
    found = []
    for _ in range(epochs):
        found.append((cycle.global_skip, cycle.local_skip, cycle.batches_to_wait))
        cycle.finish_epoch(loss)
    return found


def test_trace_of_the_defaults_with_constant_loss() -> None:
    cycle = [(4, 1, 1)] * 3 + [(2, 1, 1)] * 3 + [(1, 1, 1)] * 3 + [(8, 2, 2)] * 3
    expected = [(0, 0, 0)] * 4 + cycle + cycle[:9] + [(8, 2, 2)] * 3 + cycle[:8]
    assert trace(Cycle(periods()), 40) == expected[:36] + [(0, 0, 0)] * 4


def test_a_falling_loss_changes_nothing() -> None:
    cycle = Cycle(periods())
    for epoch in range(20):
        cycle.finish_epoch(0.9**epoch)
    assert (cycle.global_skip, cycle.batches_to_wait) == (4, 1)


def test_phases() -> None:
    cycle = Cycle(periods(total_epochs=6, warmup_epochs=2, cooldown_epochs=1))
    phases = []
    for _ in range(6):
        phases.append(cycle.phase)
        cycle.finish_epoch(1.0)
    assert phases == [Phase.WARMUP] * 2 + [Phase.CYCLING] * 3 + [Phase.COOLDOWN]


def test_without_warm_up_it_begins_to_cycle() -> None:
    assert trace(Cycle(periods(warmup_epochs=0)), 1) == [(4, 1, 1)]


def test_first_skips_respect_the_largest() -> None:
    assert trace(Cycle(periods(warmup_epochs=0, max_global_skips=2)), 1) == [(2, 1, 1)]
    assert trace(Cycle(periods(warmup_epochs=0, max_global_skips=0)), 30) == [(0, 0, 0)] * 30


def test_no_number_falls_below_one() -> None:
    cycle = Cycle(periods(warmup_epochs=0, max_global_skips=3, local_skip_factor=8, skip_reduction_factor=5))
    assert {min(found) for found in trace(cycle, 36)} == {1}


@pytest.mark.parametrize("keeps_all", [True, False])
def test_what_keeps_all_is_merged_before_more_is_sent(keeps_all: bool) -> None:
    cycle = Cycle(periods(warmup_epochs=0, skip_reduction_factor=4, local_skip_factor=2), keeps_all)
    falling = [(8, 4, 4), (2, 1, 2), (1, 1, 1)] if keeps_all else [(8, 4, 4), (2, 1, 3), (1, 1, 2)]
    assert trace(cycle, 24)[7:23:3] == [*falling, *falling]


def test_cycle_goes_on_from_its_state() -> None:
    first, second = Cycle(periods()), Cycle(periods())
    trace(first, 9)
    second.load_state_dict(first.state_dict())
    assert trace(second, 31) == trace(first, 31)


def daso_actions(
    skip: int, wait: int, batches: int, last: int | None, local: int = 1, keeps_all: bool = False
) -> list[tuple[object, ...]]:
    cycle = Cycle(periods(), keeps_all)
    cycle.global_skip, cycle.local_skip, cycle.batches_to_wait = skip, local, wait
    assert all(cycle.plan(batch, last).alone == (local > 1) for batch in range(batches))
    return [cycle.plan(batch, last).actions for batch in range(batches)]


BLOCKING = (Send(0), Merge(0))
LAST = (Send(0, full=True), Merge(0))


def test_daso_averages_after_each_batch_of_the_warm_up() -> None:
    assert daso_actions(0, 0, 3, 2) == [BLOCKING] * 3


def test_daso_sends_every_fourth_batch_and_merges_one_later() -> None:
    assert daso_actions(4, 1, 7, 6) == [(Send(0, 1),), (Merge(0),), (), (), (Send(0, 1),), (Merge(0),), LAST]


def test_daso_merges_before_it_sends_again() -> None:
    assert daso_actions(1, 1, 3, 2) == [(Send(0, 1),), (Merge(0), Send(0, 1)), (Merge(0), *LAST)]
    assert daso_actions(1, 2, 4, 3) == [
        (Send(0, 2),),
        (Send(0, 2),),
        (Merge(0), Send(0, 1)),
        (Merge(0), Merge(0), *LAST),
    ]


def test_daso_merges_within_the_epoch() -> None:
    assert daso_actions(8, 2, 10, 9)[8:] == [(Send(0, 1),), (Merge(0), *LAST)]
    assert daso_actions(2, 1, 3, None) == [(Send(0, 1),), (Merge(0),), (Send(0, 1),)]


def test_daso_averages_within_nodes_every_second_batch_and_before_it_sends() -> None:
    own = ReplicaMean()
    assert daso_actions(8, 2, 10, 9, local=2) == [
        (own, Send(0, 2)),
        (),
        (Merge(0), own),
        (),
        (own,),
        (),
        (own,),
        (),
        (own, Send(0, 1)),
        (Merge(0), own, *LAST),
    ]
    assert daso_actions(3, 1, 5, None, local=2) == [
        (own, Send(0, 1)),
        (Merge(0),),
        (own,),
        (own, Send(0, 1)),
        (Merge(0), own),
    ]


def test_daso_sends_nothing_that_the_end_of_the_epoch_makes_up_for() -> None:
    actions = partial(daso_actions, keeps_all=True)
    send, merge = (Send(0, 1),), (Merge(0),)
    assert actions(4, 1, 6, 5) == [send, merge, (), (), (), BLOCKING]
    assert actions(4, 1, 7, 6) == [send, merge, (), (), send, merge, BLOCKING]
    assert actions(1, 2, 5, 4) == [(Send(0, 2),), (Send(0, 2),), merge, merge, BLOCKING]
    assert actions(8, 2, 10, 9, local=2)[8:] == [(ReplicaMean(),), (ReplicaMean(), *BLOCKING)]
    assert actions(2, 1, 3, None) == [send, merge, send]


# DetectMetricPlateau


def test_plateau_needs_more_epochs_than_the_patience() -> None:
    plateau = heatopt.DetectMetricPlateau(patience=2, threshold=0.05)
    assert [plateau.test_if_improving(1.0) for _ in range(7)] == [False, False, False, True, False, False, True]


def test_plateau_has_a_threshold() -> None:
    plateau = heatopt.DetectMetricPlateau(patience=0, threshold=0.1)
    assert [plateau.has_plateaued(loss) for loss in (1.0, 0.95, 0.89, 0.9)] == [False, True, False, True]
    rising = heatopt.DetectMetricPlateau("max", 0, threshold=0.1, threshold_mode="abs")
    assert [rising.has_plateaued(loss) for loss in (1.0, 1.05, 1.2)] == [False, True, False]
    negative = heatopt.DetectMetricPlateau(patience=0, threshold=0.1)
    assert [negative.has_plateaued(loss) for loss in (-1.0, -1.05, -1.2)] == [False, True, False]


def test_plateau_ignores_nan_and_what_comes_in_the_cooldown() -> None:
    plateau = heatopt.DetectMetricPlateau(patience=0)
    assert [plateau.has_plateaued(loss) for loss in (1.0, math.nan, math.nan)] == [False] * 3
    resting = heatopt.DetectMetricPlateau(patience=0, cooldown=2)
    assert [resting.has_plateaued(1.0) for _ in range(6)] == [False, True, False, False, True, False]


def test_plateau_goes_on_from_its_state() -> None:
    first, second = heatopt.DetectMetricPlateau(patience=1), heatopt.DetectMetricPlateau("max", 7)
    first.has_plateaued(torch.tensor(1.0))
    first.has_plateaued(1.0)
    second.set_state(first.get_state())
    assert second.get_state() == first.get_state()
    assert second.has_plateaued(1.0)
    second.reset()
    assert (second.best, second.num_bad_epochs) == (math.inf, 0)


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"mode": "least"}, ValueError),
        ({"threshold_mode": "relative"}, ValueError),
        ({"threshold": -0.1}, ValueError),
        ({"threshold": math.nan}, ValueError),
        ({"patience": -1}, ValueError),
        ({"cooldown": -1}, ValueError),
        ({"patience": 1.5}, TypeError),
        ({"cooldown": True}, TypeError),
    ],
)
def test_plateau_refuses_what_makes_no_sense(keywords: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{next(iter(keywords))} must be"):
        heatopt.DetectMetricPlateau(**keywords)
