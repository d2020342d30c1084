"""Schedules against tables computed by other means and against torch's equivalents; limits of their arguments."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import pickle
import re
from dataclasses import dataclass
from decimal import Decimal, getcontext
from fractions import Fraction
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from heatopt import lr_scheduler as schedulers
from heatopt.comm import SingleCommunicator, ThreadWorld
from heatopt.lr_scheduler import (
    Constant,
    ExponentialDecay,
    LinearScaling,
    Milestones,
    Ramp,
    Rounded,
    Scaled,
    Schedule,
    WarmupDecay,
    goyal_lr,
    megatron_lr,
    megatron_weight_decay,
)

EXACT = 1e-15
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")

MAX, MIN, INIT, WARMUP, DECAY = 0.3, 0.07, 0.01, 7, 50
"""None of them, nor their differences and quotients, has few binary digits."""


# The formulas again, in 50 decimal digits and without floats, written from the publications


def cosine(x: Decimal) -> Decimal:
    """The cosine by its series."""
    term = total = Decimal(1)
    for k in range(1, 60):
        term *= -x * x / (2 * k * (2 * k - 1))
        total += term
    return total


def decimal_of(number: Fraction | float) -> Decimal:
    """In 50 digits; a float exactly."""
    exact = Fraction(number)
    return Decimal(exact.numerator) / Decimal(exact.denominator)


def falling(style: str, q: Fraction) -> Decimal:
    """From 1 at 0 to 0 at 1."""
    x = decimal_of(q)
    return {
        "linear": 1 - x,
        "cosine": (cosine(PI * x) + 1) / 2,
        "exponential": Decimal(2) ** (1 - x) - 1,
        "minus_sqrt": 1 - x.sqrt(),
    }[style]


def rate(n: int, style: str, *, warmup: int = WARMUP, wsd_style: str = "", wsd_decay_steps: int = 0) -> Decimal:
    """The learning rate of Megatron-LM."""
    high, low = decimal_of(MAX), decimal_of(MIN)
    if n <= warmup != 0:
        done = decimal_of(Fraction(n, warmup))
        return decimal_of(INIT) * (1 - done) + high * done
    if style == "constant":
        return high
    if n > DECAY:
        return low
    if style == "inverse-square-root":
        return max(low, high * decimal_of(Fraction(max(1, warmup), max(1, n))).sqrt())
    if style == "WSD":
        left = falling(wsd_style, max(Fraction(0), Fraction(n - DECAY, wsd_decay_steps) + 1))
    else:
        left = falling(style, Fraction(n - warmup, DECAY - warmup))
    return high * left + low * (1 - left)


@pytest.fixture(autouse=True)
def many_digits() -> Any:
    before = getcontext().prec
    getcontext().prec = 50
    yield
    getcontext().prec = before


def assert_table(schedule: Schedule, expected: list[Decimal]) -> None:
    found = [schedule.value(n) for n in range(len(expected))]
    errors = [abs(Decimal(one) - other) for one, other in zip(found, expected, strict=True)]
    assert max(errors) <= Decimal(EXACT), f"at count {errors.index(max(errors))}"


STYLES = [
    *((style, "", 0) for style in ("constant", "linear", "cosine", "inverse-square-root")),
    *(
        ("WSD", wsd_style, steps)
        for wsd_style in ("linear", "cosine", "exponential", "minus_sqrt")
        for steps in (13, 43)
    ),
]


@pytest.mark.parametrize("warmup", [0, 1, WARMUP, DECAY - 1])
@pytest.mark.parametrize(("style", "wsd_style", "steps"), STYLES)
def test_warmup_and_decay(style: str, wsd_style: str, steps: int, warmup: int) -> None:
    wsd: dict[str, Any] = {"wsd_style": wsd_style, "wsd_decay_steps": min(steps, DECAY - warmup)} if wsd_style else {}
    expected = [rate(n, style, warmup=warmup, **wsd) for n in range(2 * DECAY)]
    assert_table(
        WarmupDecay(MAX, MIN, init_value=INIT, warmup_steps=warmup, decay_steps=DECAY, style=style, **wsd), expected
    )
    if wsd:
        wsd["lr_wsd_decay_style"] = wsd.pop("wsd_style")
    assert_table(
        megatron_lr(MAX, MIN, init_lr=INIT, lr_warmup_steps=warmup, lr_decay_steps=DECAY, lr_decay_style=style, **wsd),
        expected,
    )


def test_warmup_and_decay_by_hand() -> None:
    """Numbers that need no computer, so that the table above cannot share a mistake with the code."""

    def at(style: str, *counts: int, **options: Any) -> list[float]:
        schedule = WarmupDecay(1.0, 0.2, warmup_steps=4, decay_steps=20, style=style, **options)
        return [schedule.value(n) for n in counts]

    start = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert at("constant", 0, 1, 2, 3, 4, 5, 20, 21, 1000) == [*start, 1.0, 1.0, 1.0, 1.0]
    assert at("linear", 0, 1, 2, 3, 4, 12, 20, 21, 1000) == pytest.approx([*start, 0.6, 0.2, 0.2, 0.2], abs=EXACT)
    assert at("cosine", 4, 12, 20, 21) == pytest.approx([1.0, 0.6, 0.2, 0.2], abs=EXACT)
    assert at("cosine", 8) == pytest.approx([0.2 + 0.8 * (0.5 + math.sqrt(2) / 4)], abs=EXACT)
    assert at("inverse-square-root", 4, 9, 16, 20, 21) == pytest.approx(
        [1.0, 2 / 3, 0.5, 1 / math.sqrt(5), 0.2], abs=EXACT
    )
    expected = {
        "linear": [1.0, 0.8, 0.6, 0.2, 0.2],
        "cosine": [1.0, 0.2 + 0.8 * (0.5 + math.sqrt(2) / 4), 0.6, 0.2, 0.2],
        "exponential": [1.0, 0.2 + 0.8 * (2 / 2**0.25 - 1), 0.2 + 0.8 * (math.sqrt(2) - 1), 0.2, 0.2],
        "minus_sqrt": [1.0, 0.6, 0.2 + 0.8 * (1 - 1 / math.sqrt(2)), 0.2, 0.2],
    }
    for wsd_style, numbers in expected.items():
        found = at("WSD", 12, 14, 16, 20, 21, wsd_style=wsd_style, wsd_decay_steps=8)
        assert found == pytest.approx(numbers, abs=EXACT)


@pytest.mark.parametrize("style", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.1), (0.033, 0.33), (0.95, 0.85), (0.1, 0.1)])
def test_ramp(style: str, start: float, end: float) -> None:
    expected = []
    for n in range(30):
        left = falling(style, 1 - min(Fraction(n, 17), Fraction(1)))
        expected.append(decimal_of(start) * (1 - left) + decimal_of(end) * left)
    assert_table(Ramp(start, end, steps=17, style=style), expected)
    if start <= end:
        assert_table(megatron_weight_decay(start, end, wd_incr_steps=17, wd_incr_style=style), expected)


def test_ends_are_exact() -> None:
    """Where ``low + (high - low)`` is not ``high`` in floats."""
    low, high = 0.03, 0.3
    assert low + (high - low) != high
    for style in ("constant", "linear", "cosine", "inverse-square-root"):
        schedule = WarmupDecay(high, low, init_value=low, warmup_steps=3, decay_steps=9, style=style)
        assert (schedule.value(0), schedule.value(3)) == (low, high)
        assert schedule.value(10) == (high if style == "constant" else low)
        assert WarmupDecay(high, low, decay_steps=9, style=style).value(0) == high
    for style in ("linear", "cosine"):
        assert [Ramp(low, high, steps=3, style=style).value(n) for n in (0, 3, 4)] == [low, high, high]
        assert [Ramp(low, low, steps=7, style=style).value(n) for n in range(9)] == [low] * 9


def test_ramp_by_hand() -> None:
    assert [Ramp(0.0, 1.0, steps=4).value(n) for n in (0, 1, 2, 3, 4, 5)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [megatron_weight_decay(0.5, 0.5).value(n) for n in (0, 1, 10**9)] == [0.5, 0.5, 0.5]
    assert megatron_weight_decay().value(3) == 0.0


@pytest.mark.parametrize("staircase", [False, True])
def test_exponential_decay(staircase: bool) -> None:
    expected = []
    for n in range(40):
        power = Fraction(n, 7)
        expected.append(decimal_of(0.3) * decimal_of(0.9) ** decimal_of(Fraction(n // 7) if staircase else power))
    assert_table(ExponentialDecay(0.3, 7, 0.9, staircase), expected)


def test_exponential_decay_by_hand() -> None:
    assert [ExponentialDecay(8.0, 2, 0.25).value(n) for n in range(5)] == [8.0, 4.0, 2.0, 1.0, 0.5]
    assert [ExponentialDecay(8.0, 2, 0.25, True).value(n) for n in range(5)] == [8.0, 8.0, 2.0, 2.0, 0.5]


@pytest.mark.parametrize(
    ("schedule", "count"),
    [
        (ExponentialDecay(0.1, 3, 1.5), 10**9),
        (ExponentialDecay(0.1, 1, 2, staircase=True), 10**12),  # whole numbers have no limit of their own
        (ExponentialDecay(1e308, 1, 9.0), 1),  # the product alone
        (Milestones(0.1, (1, 2), gamma=1e200), 2),
    ],
)
def test_growth_beyond_all_numbers(schedule: Schedule, count: int) -> None:
    assert schedule.value(0) > 0
    with pytest.raises(ValueError, match=re.escape(f"too large for a number at count {count:g}, because")):
        schedule.value(count)


def test_growth_from_nothing_and_decay_to_nothing() -> None:
    assert ExponentialDecay(0.0, 3, 1.5).value(10**9) == 0.0
    assert ExponentialDecay(0.1, 3, 0.5).value(10**9) == 0.0


@pytest.mark.parametrize("k", [1, 2, 8, 256])
def test_linear_scaling(k: int) -> None:
    """Horovod's form of it: base * k * ((n (k - 1) / W + 1) / k)."""
    base, warmup = 0.003, 9
    expected = [
        decimal_of(Fraction(base) * k * (1 if n > warmup else (Fraction(n * (k - 1), warmup) + 1) / k))
        for n in range(30)
    ]
    assert_table(LinearScaling(Constant(base), k, warmup_steps=warmup), expected)
    assert_table(LinearScaling(Constant(base), k, warmup_steps=0), [decimal_of(Fraction(base) * k)] * 3)


def test_goyal_by_hand() -> None:
    """The whole recipe, with epochs of ten steps, on four ranks."""

    def body(comm: Any) -> list[float]:
        schedule = goyal_lr(Milestones(0.5, (300, 600, 800)), warmup_steps=50, comm=comm)
        return [schedule.value(n) for n in (0, 25, 50, 299, 300, 600, 800, 900)]

    expected = [0.5, 1.25, 2.0, 2.0, 0.2, 0.02, 0.002, 0.002]
    for found in ThreadWorld(4).run(body):
        assert found == pytest.approx(expected, rel=EXACT)
    assert goyal_lr(0.5, warmup_steps=50).value(10) == 0.5  # the world is one process
    assert goyal_lr(0.5, warmup_steps=50, comm=SingleCommunicator()) == LinearScaling(Constant(0.5), 1, warmup_steps=50)


def test_scaled_and_rounded() -> None:
    ramp = Ramp(1.0, 3.0, steps=4)
    assert [(0.5 * ramp).value(n) for n in range(5)] == [0.5, 0.75, 1.0, 1.25, 1.5]
    assert ramp * 2 == 2 * ramp == Scaled(ramp, 2)
    rounded = [Rounded(ramp).value(n) for n in range(5)]
    assert rounded == [1, 2, 2, 3, 3]
    assert all(type(value) is int for value in rounded)
    assert [Rounded(Ramp(3.0, -3.0, steps=3)).value(n) for n in range(4)] == [3, 1, 1, 1]
    assert [Rounded(Ramp(3.0, -3.0, steps=3), least=-9).value(n) for n in range(4)] == [3, 1, -1, -3]


# torch's own


def of_torch(make: Any, base: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def warm(after: Any) -> Any:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        first = schedulers.LinearLR(optimizer, start_factor=INIT / MAX, total_iters=WARMUP)
        return schedulers.SequentialLR(optimizer, [first, after(optimizer)], milestones=[WARMUP])

    return make


@pytest.mark.parametrize(
    ("schedule", "make", "steps"),
    [
        (
            WarmupDecay(MAX, MIN, init_value=INIT, warmup_steps=WARMUP, decay_steps=DECAY, style="linear"),
            warm(lambda o: schedulers.LinearLR(o, 1.0, MIN / MAX, total_iters=DECAY - WARMUP)),
            DECAY + 9,
        ),
        (
            WarmupDecay(MAX, MIN, init_value=INIT, warmup_steps=WARMUP, decay_steps=DECAY, style="cosine"),
            warm(lambda o: schedulers.CosineAnnealingLR(o, DECAY - WARMUP, MIN)),
            DECAY,  # then torch's goes up again
        ),
        (
            WarmupDecay(MAX, init_value=INIT, warmup_steps=WARMUP, decay_steps=DECAY, style="constant"),
            warm(lambda o: schedulers.ConstantLR(o, 1.0)),
            DECAY + 9,
        ),
        (ExponentialDecay(MAX, 6, 0.7, staircase=True), lambda o: schedulers.StepLR(o, 6, 0.7), 40),
        (ExponentialDecay(MAX, 6, 0.7), lambda o: schedulers.ExponentialLR(o, 0.7 ** (1 / 6)), 40),
        (Milestones(MAX, (2, 3, 11), gamma=0.3), lambda o: schedulers.MultiStepLR(o, [2, 3, 11], 0.3), 20),
    ],
    ids=["linear", "cosine", "constant", "staircase", "exponential", "milestones"],
)
def test_as_torch(schedule: Schedule, make: Any, steps: int) -> None:
    """torch multiplies one rate by the next, and so collects a rounding error at each step."""
    found = [schedule.value(n) for n in range(steps)]
    assert found == pytest.approx(of_torch(make, MAX, steps), abs=EXACT)


# What holds for all of them

EXAMPLES = [
    Constant(0.1),
    WarmupDecay(1.0, 0.1, init_value=0.05, warmup_steps=3, decay_steps=30, style="cosine"),
    WarmupDecay(1.0, warmup_steps=3, decay_steps=30, style="WSD", wsd_decay_steps=9, wsd_style="minus_sqrt"),
    Ramp(0.1, 0.9, steps=12, style="cosine"),
    ExponentialDecay(0.1, 5, 0.5, staircase=True),
    Milestones(0.1, (3, 7)),
    LinearScaling(Milestones(0.1, (3, 7)), 4, warmup_steps=2),
    0.3 * Ramp(0.1, 0.9, steps=12),
    Rounded(8 * Ramp(0.1, 0.9, steps=12), least=2),
]


def test_there_is_an_example_of_each() -> None:
    public = {getattr(schedulers, name) for name in schedulers.__all__}
    kinds = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Schedule)}
    assert {type(example) for example in EXAMPLES} == kinds - {Schedule}


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: type(s).__name__)
def test_a_schedule_is_a_value(schedule: Schedule) -> None:
    table = [schedule.value(n) for n in range(40)]
    assert [schedule.value(n) for n in reversed(range(40))] == table[::-1]
    for other in (
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        Schedule.from_settings(json.loads(json.dumps(schedule.settings()))),
    ):
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert [other.value(n) for n in range(40)] == table
    assert schedule.value(np.int64(7)) == table[7]
    assert "Ramp(start=0.1" in repr(Ramp(0.1, 0.9, steps=12))
    field = dataclasses.fields(schedule)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, 2.0)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (-1, ValueError, "the count n must be >= 0, got -1"),
        (math.nan, ValueError, "the count n must be finite, got nan"),
        ("3", TypeError, "the count n must be a number, got '3' of type str"),
        (True, TypeError, "the count n must be a number, got True of type bool"),
    ],
)
def test_wrong_counts(schedule: Schedule, n: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        schedule.value(n)


@hypothesis.given(st.data())
def test_rates_stay_between_their_ends(data: st.DataObject) -> None:
    number = st.floats(0, 1e3, allow_subnormal=False)
    low, high = sorted([data.draw(number), data.draw(number)])
    start = data.draw(st.floats(0, high, allow_subnormal=False))
    end = data.draw(st.integers(1, 10**6))
    warmup = data.draw(st.integers(0, end - 1))
    style = data.draw(st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]))
    wsd: dict[str, Any] = {}
    if style == "WSD":
        wsd["wsd_decay_steps"] = data.draw(st.integers(1, end - warmup))
        wsd["wsd_style"] = data.draw(st.sampled_from(["linear", "cosine", "exponential", "minus_sqrt"]))
    schedule = WarmupDecay(high, low, init_value=start, warmup_steps=warmup, decay_steps=end, style=style, **wsd)
    slack = 1e-15 * high
    counts = sorted(data.draw(st.lists(st.integers(0, 2 * end), min_size=2, max_size=9)))
    table = [schedule.value(n) for n in counts]
    assert all(min(low, start) - slack <= value <= high + slack for value in table)
    decaying = [value for n, value in zip(counts, table, strict=True) if n >= warmup]
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(decaying))
    assert schedule.value(warmup) == high
    assert schedule.value(end + 1) == (high if style == "constant" else low)
    if warmup:
        assert schedule.value(0) == start


@dataclass(frozen=True)
class Sawtooth(Schedule):
    """A schedule of a user's own."""

    period: int
    inner: Schedule

    def at(self, n: float) -> float:
        return self.inner.at(n % self.period)


def test_a_schedule_of_ones_own() -> None:
    schedule = 2 * Sawtooth(3, Ramp(0.0, 1.0, steps=4))
    assert [schedule.value(n) for n in range(5)] == [0.0, 0.5, 1.0, 0.0, 0.5]
    assert Schedule.from_settings(schedule.settings()) == schedule


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_value": 2}, ValueError, r"min_value must be at most max_value, 1\.0, got 2"),
        ({"init_value": 1.5}, ValueError, r"init_value must be at most max_value, 1\.0, got 1\.5"),
        ({"init_value": -0.1}, ValueError, r"init_value must be >= 0, got -0\.1"),
        ({"min_value": "0"}, TypeError, "min_value must be a number, got '0' of type str"),
        ({"max_value": math.inf}, ValueError, "max_value must be finite, got inf"),
        ({"decay_steps": 0}, ValueError, "decay_steps must be >= 1, got 0"),
        ({"decay_steps": 9.0}, TypeError, r"decay_steps must be a whole number, got 9\.0 of type float"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be >= 0, got -1"),
        ({"warmup_steps": 9}, ValueError, "warmup_steps must be less than decay_steps, 9, of which they are a part"),
        ({"style": "cos"}, ValueError, "style must be one of 'constant', 'linear', .*'WSD', got 'cos'"),
        ({"style": "WSD"}, ValueError, "style 'WSD' needs wsd_decay_steps, .* from 1 to 7"),
        ({"style": "WSD", "wsd_decay_steps": 0}, ValueError, "wsd_decay_steps must be >= 1, got 0"),
        ({"style": "WSD", "wsd_decay_steps": 8}, ValueError, r"wsd_decay_steps must be at most .*, 7, got 8"),
        ({"style": "WSD", "wsd_decay_steps": 2, "wsd_style": "sqrt"}, ValueError, "wsd_style must be one of .* 'sqrt'"),
        ({"wsd_decay_steps": 2}, ValueError, "wsd_decay_steps is for style 'WSD' alone, and style is 'linear'"),
    ],
)
def test_wrong_decays(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        WarmupDecay(**{"max_value": 1.0, "decay_steps": 9, "warmup_steps": 2, **options})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant(True), TypeError, "number must be a number, got True"),
        (lambda: Constant(math.nan), ValueError, "number must be finite, got nan"),
        (lambda: Ramp(0, 1, steps=0), ValueError, "steps must be >= 1, got 0"),
        (lambda: Ramp(0, 1, steps=2, style="constant"), ValueError, "a ramp of style 'constant' has one value"),
        (lambda: Ramp(0, 1, steps=2, style="exp"), ValueError, "style must be one of 'constant', 'linear', 'cosine'"),
        (lambda: megatron_weight_decay(-1), ValueError, "start_wd must be >= 0, got -1"),
        (lambda: megatron_weight_decay(0.2, 0.1), ValueError, r"end_wd must be >= 0\.2, got 0\.1"),
        (lambda: megatron_weight_decay(0.1, 0.2), ValueError, "a ramp of style 'constant' has one value"),
        (lambda: megatron_weight_decay(0, 1, wd_incr_style="linear"), ValueError, "wd_incr_steps must be >= 1, got -1"),
        (lambda: megatron_weight_decay(0, 1, wd_incr_style="up"), ValueError, "wd_incr_style must be one of"),
        (lambda: ExponentialDecay(0.1, 0, 0.5), ValueError, "decay_steps must be >= 1, got 0"),
        (lambda: ExponentialDecay(0.1, 2, 0.0), ValueError, r"decay_rate must be > 0, got 0\.0"),
        (lambda: ExponentialDecay(0.1, 2, 0.5, 1), TypeError, "staircase must be True or False, got 1"),
        (lambda: Milestones(0.1, (3, 3)), ValueError, r"milestones must rise, got \(3, 3\)"),
        (lambda: Milestones(0.1, 3), TypeError, "milestones must be a tuple of counts, got 3"),
        (lambda: Milestones(0.1, (-1,)), ValueError, "a milestone must be >= 0, got -1"),
        (lambda: LinearScaling(0.1, 2, warmup_steps=1), TypeError, r"schedule must be a .*Schedule, got 0\.1"),
        (lambda: LinearScaling(Constant(1), 0, warmup_steps=1), ValueError, "ranks must be >= 1, got 0"),
        (lambda: goyal_lr("0.1", warmup_steps=1), TypeError, "base_lr must be a .*Schedule or a number, got '0.1'"),
        (lambda: goyal_lr(0.1, warmup_steps=1, comm=4), TypeError, "comm must be a heatopt.comm.Communicator or None"),
        (lambda: "2" * Constant(1), TypeError, "factor must be a number, got '2'"),
        (lambda: Rounded(Constant), TypeError, "schedule must be .* \\(the class: make an instance of it first"),
        (lambda: Rounded(Constant(1), least=0.5), TypeError, r"least must be a whole number, got 0\.5"),
        (
            lambda: Schedule.from_settings({"kind": "Sine"}),
            ValueError,
            "unknown kind of schedule 'Sine'; known are",
        ),
        (lambda: Schedule.from_settings({"kind": "Ramp", "up": 1}), ValueError, "these are no settings of a Ramp"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        make()
