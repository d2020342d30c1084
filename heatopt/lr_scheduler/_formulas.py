"""The formulas of the schedules. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import KW_ONLY, dataclass

from heatopt.lr_scheduler._schedule import Schedule, check_choice, check_number, check_schedule, check_whole

__all__ = ["RAMP_STYLES", "ExponentialDecay", "LinearScaling", "Milestones", "Ramp", "WarmupDecay"]

_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
_WSD_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")
RAMP_STYLES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class WarmupDecay(Schedule):
    r"""Linear warm-up from ``init_value``, then decay from ``max_value`` to ``min_value``, which it keeps.

    With W warm-up counts and D ``decay_steps`` (of which the warm-up is a part), in this order:

    .. math:: n \le W,\ W > 0: \quad v_n = v_{init} + (v_{max} - v_{init}) \, n / W

    .. math:: \text{"constant"}: \quad v_n = v_{max}

    .. math:: n > D: \quad v_n = v_{min}

    .. math:: \text{"inverse-square-root"}: \quad v_n = \max(v_{min}, v_{max} \sqrt{\max(W, 1) / \max(n, 1)})

    .. math:: \text{otherwise}: \quad v_n = v_{min} + c \, (v_{max} - v_{min}), \quad r = (n - W) / (D - W)

    where "linear" has c = 1 - r, "cosine" has c = (1 + cos(pi r)) / 2, and "WSD" (warm-up, stable, decay) stays at
    c = 1 until the last ``wsd_decay_steps``; there, with q from 0 to 1, c is 1 - q ("linear"), (1 + cos(pi q)) / 2
    ("cosine"), 2 * 0.5 ** q - 1 ("exponential") or 1 - sqrt(q) ("minus_sqrt").

    Source: the ``OptimizerParamScheduler`` of Megatron-LM, of which Hetu's is a part. :func:`megatron_lr` makes it
    with their names.

    Args:
        max_value: reached at the end of the warm-up; at the start if there is none.
        min_value: the end, and what stays after it.
        init_value: where the warm-up starts; at most ``max_value``, may be 0.
        warmup_steps: W, less than ``decay_steps``; 0 for no warm-up.
        decay_steps: D, at least 1.
        style: "constant", "linear", "cosine", "inverse-square-root" or "WSD".
        wsd_decay_steps: for "WSD" alone: the length of its decay, from 1 to D - W.
        wsd_style: for "WSD" alone: "linear", "cosine", "exponential" or "minus_sqrt".

    Raises:
        TypeError: a field that is no number, or no whole one.
        ValueError: a number out of its range, or an unknown style.
    """

    max_value: float
    min_value: float = 0.0
    _: KW_ONLY
    decay_steps: int
    init_value: float = 0.0
    warmup_steps: int = 0
    style: str = "linear"
    wsd_decay_steps: int | None = None
    wsd_style: str = "exponential"

    def __post_init__(self) -> None:
        check_number("min_value", self.min_value, least=0)
        check_number("init_value", self.init_value, least=0)
        check_number("max_value", self.max_value, least=0)
        for name in ("min_value", "init_value"):
            if getattr(self, name) > self.max_value:
                raise ValueError(f"{name} must be at most max_value, {self.max_value!r}, got {getattr(self, name)!r}")
        check_whole("decay_steps", self.decay_steps, least=1)
        check_whole("warmup_steps", self.warmup_steps, least=0)
        if self.warmup_steps >= self.decay_steps:
            raise ValueError(
                f"warmup_steps must be less than decay_steps, {self.decay_steps}, of which they are a part, "
                f"got {self.warmup_steps}"
            )
        check_choice("style", self.style, _DECAY_STYLES)
        check_choice("wsd_style", self.wsd_style, _WSD_STYLES)
        if self.style == "WSD":
            most = self.decay_steps - self.warmup_steps
            if self.wsd_decay_steps is None:
                raise ValueError(f"style 'WSD' needs wsd_decay_steps, the length of its decay: from 1 to {most}")
            check_whole("wsd_decay_steps", self.wsd_decay_steps, least=1)
            if self.wsd_decay_steps > most:
                raise ValueError(
                    f"wsd_decay_steps must be at most decay_steps - warmup_steps, {most}, got {self.wsd_decay_steps}"
                )
        elif self.wsd_decay_steps is not None:
            raise ValueError(f"wsd_decay_steps is for style 'WSD' alone, and style is {self.style!r}: leave it out")

    def at(self, n: float) -> float:
        warmup, end = self.warmup_steps, self.decay_steps
        if warmup > 0 and n <= warmup:
            return _between(self.init_value, self.max_value, n / warmup)
        if self.style == "constant":
            return self.max_value
        if n > end:
            return self.min_value
        if self.style == "inverse-square-root":
            return max(self.min_value, self.max_value * math.sqrt(max(warmup, 1)) / math.sqrt(max(n, 1)))
        if self.wsd_decay_steps is not None:
            start = end - self.wsd_decay_steps
            left = 1.0 if n <= start else _left(self.wsd_style, (n - start) / self.wsd_decay_steps)
        else:
            left = _left(self.style, (n - warmup) / (end - warmup))
        return _between(self.min_value, self.max_value, left)


@dataclass(frozen=True)
class Ramp(Schedule):
    r"""From ``start`` to ``end`` in ``steps`` counts, and ``end`` from there on; up or down.

    .. math:: v_n = v_{start} + c \, (v_{end} - v_{start}), \quad r = \min(n / \text{steps}, 1)

    with c = r ("linear") or (1 + cos(pi (1 - r))) / 2 ("cosine"). "constant" is ``end``, which ``start`` must equal.

    Source: the weight decay of Megatron-LM's ``OptimizerParamScheduler`` and of Hetu's; :func:`megatron_weight_decay`
    makes it with their names and limits.

    Raises:
        TypeError: a field that is no number, or no whole one.
        ValueError: an unknown style, fewer steps than 1, or a constant whose ends differ.
    """

    start: float
    end: float
    _: KW_ONLY
    steps: int
    style: str = "linear"

    def __post_init__(self) -> None:
        check_number("start", self.start)
        check_number("end", self.end)
        check_choice("style", self.style, RAMP_STYLES)
        check_whole("steps", self.steps, least=1)
        if self.style == "constant" and self.start != self.end:
            raise ValueError(
                f"a ramp of style 'constant' has one value, got start={self.start!r} and end={self.end!r}; "
                "give the same twice, or choose 'linear' or 'cosine'"
            )

    def at(self, n: float) -> float:
        if n >= self.steps or self.style == "constant":
            return self.end
        done = n / self.steps
        return _between(self.start, self.end, done if self.style == "linear" else _cosine(1 - done))


@dataclass(frozen=True)
class ExponentialDecay(Schedule):
    r"""``init_value * decay_rate ** (n / decay_steps)``; with ``staircase`` the exponent is rounded down.

    With a rate above 1 it grows without limit, up to where no number is left: there ``value`` raises ValueError.

    Source: SINGA's ``opt.ExponentialDecay``, whose arguments these are.

    Raises:
        TypeError: a field that is no number, or no whole one.
        ValueError: ``decay_steps`` < 1, or ``decay_rate`` <= 0.
    """

    init_value: float
    decay_steps: int
    decay_rate: float
    staircase: bool = False

    def __post_init__(self) -> None:
        check_number("init_value", self.init_value)
        check_whole("decay_steps", self.decay_steps, least=1)
        if check_number("decay_rate", self.decay_rate) <= 0:
            raise ValueError(f"decay_rate must be > 0, got {self.decay_rate!r}")
        if not isinstance(self.staircase, bool):
            raise TypeError(f"staircase must be True or False, got {self.staircase!r}")

    def at(self, n: float) -> float:
        exponent = n // self.decay_steps if self.staircase else n / self.decay_steps
        return _power(self, self.init_value, self.decay_rate, exponent, n)


@dataclass(frozen=True)
class Milestones(Schedule):
    """``init_value * gamma ** k`` when ``k`` of the milestones have been reached, as torch's ``MultiStepLR``.

    Raises:
        TypeError: a field that is no number.
        ValueError: milestones that are negative or not in rising order.
    """

    init_value: float
    milestones: tuple[float, ...]
    _: KW_ONLY
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_number("init_value", self.init_value)
        check_number("gamma", self.gamma, least=0)
        if not isinstance(self.milestones, (tuple, list)):
            raise TypeError(f"milestones must be a tuple of counts, got {self.milestones!r}")
        for milestone in self.milestones:
            check_number("a milestone", milestone, least=0)
        if any(later <= earlier for earlier, later in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"milestones must rise, got {self.milestones!r}")
        object.__setattr__(self, "milestones", tuple(self.milestones))  # a list could be changed later

    def at(self, n: float) -> float:
        return _power(self, self.init_value, self.gamma, bisect_right(self.milestones, n), n)


@dataclass(frozen=True)
class LinearScaling(Schedule):
    r"""A schedule for one process, times the number of ranks k, which is reached gradually.

    .. math:: v_n = v^{one}_n \, (1 + (k - 1) \min(n / W, 1))

    Source: Goyal et al., *Accurate, Large Minibatch SGD*, arXiv 1706.02677, sections 2.1 and 2.2: k times the batch
    takes k times the learning rate, after a warm-up that starts from the rate of one process (there for 5 epochs).
    :func:`goyal_lr` takes k from a communicator.

    Args:
        schedule: the rate of one process with its own batch.
        ranks: k, at least 1: the global batch over the one that ``schedule`` is for.
        warmup_steps: W; 0 for no warm-up.

    Raises:
        TypeError: ``schedule`` is none, or a count is no whole number.
        ValueError: a count out of its range.
    """

    schedule: Schedule
    ranks: int
    _: KW_ONLY
    warmup_steps: int

    def __post_init__(self) -> None:
        check_schedule("schedule", self.schedule)
        check_whole("ranks", self.ranks, least=1)
        check_whole("warmup_steps", self.warmup_steps, least=0)

    def at(self, n: float) -> float:
        grown = n / self.warmup_steps if n < self.warmup_steps else 1.0
        return self.schedule.at(n) * (1 + (self.ranks - 1) * grown)


def _power(schedule: Schedule, start: float, rate: float, exponent: float, n: float) -> float:
    """``start * rate ** exponent``, the value of ``schedule`` at ``n``; 0 for a start of 0."""
    if start == 0:
        return 0.0
    try:
        value = start * math.pow(rate, exponent)
    except OverflowError:
        value = math.inf
    if math.isinf(value):
        raise ValueError(
            f"{schedule} is too large for a number at count {n:g}, because its rate is above 1; choose a rate of at "
            "most 1, or a schedule with an end, such as Ramp"
        )
    return value


def _left(style: str, q: float) -> float:
    """What is left of a decay: 1 at q = 0, 0 at q = 1."""
    if style == "cosine":
        return _cosine(q)
    if style == "exponential":
        return float(2 * 0.5**q - 1)
    if style == "minus_sqrt":
        return 1 - math.sqrt(q)
    return 1 - q


def _cosine(q: float) -> float:
    return (1 + math.cos(math.pi * q)) / 2


def _between(low: float, high: float, share: float) -> float:
    """``low`` at 0, ``high`` at 1, exactly; and exactly both if they are equal."""
    return high if share == 1 else low + share * (high - low)
