"""What a schedule is: a number as a function of a count. Pure: no tensors, no optimizer, no state.

[Note: Closed form]
A schedule is the function alone. Who drives an optimizer with it keeps one integer, the count, so going on from a
checkpoint at any count gives the very numbers of a run that was never interrupted, and ranks that count alike have
equal numbers without communication. What is counted (steps, samples, epochs) is the user's choice.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any, cast

__all__ = [
    "Constant",
    "Rounded",
    "Scaled",
    "Schedule",
    "as_schedule",
    "check_choice",
    "check_number",
    "check_schedule",
    "check_whole",
]


class Schedule(ABC):
    """A number as a function of a count.

    ``2 * schedule`` is a schedule too. For one of your own, write a frozen dataclass that derives from this class and
    has :meth:`at`; its fields are numbers, texts, tuples of numbers or schedules, and go into state dictionaries.
    """

    def value(self, n: float) -> float:
        """The number at count ``n`` >= 0, of steps, samples or epochs. The same whenever and wherever it is called.

        Raises:
            TypeError: ``n`` is no number.
            ValueError: ``n`` is negative or not finite.
        """
        return self.at(check_number("the count n", n, least=0))

    @abstractmethod
    def at(self, n: float) -> float:
        """The number at a count that has been checked; what a schedule of your own defines."""

    def settings(self) -> dict[str, Any]:
        """Kind and fields, as plain Python objects: equal for equal schedules, and fit for a state dictionary.

        Raises:
            TypeError: a schedule of your own is no dataclass, or has a field that is none of those named above.
        """
        name, this = type(self).__name__, cast(Any, self)
        if not dataclasses.is_dataclass(this):
            raise TypeError(f"{name} must be a dataclass, so that its settings are known")
        return {"kind": name, **{field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(this)}}

    @staticmethod
    def from_settings(settings: Mapping[str, Any]) -> Schedule:
        """The inverse of :meth:`settings`.

        Raises:
            ValueError: there is no schedule of that kind, or it has no such fields.
        """
        kinds = {kind.__name__: kind for kind in _descendants(Schedule)}
        kind = kinds.get(settings.get("kind", ""))
        if kind is None:
            raise ValueError(f"unknown kind of schedule {settings.get('kind')!r}; known are {', '.join(sorted(kinds))}")
        fields = {name: _restored(value) for name, value in settings.items() if name != "kind"}
        try:
            schedule: Schedule = kind(**fields)
        except TypeError as error:
            raise ValueError(f"these are no settings of a {kind.__name__}: {dict(settings)!r} ({error})") from None
        return schedule

    def __mul__(self, factor: float) -> Schedule:
        return Scaled(self, factor)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Constant(Schedule):
    """Always the same number."""

    number: float

    def __post_init__(self) -> None:
        check_number("number", self.number)

    def at(self, n: float) -> float:
        return self.number


@dataclass(frozen=True)
class Scaled(Schedule):
    """A schedule times a number: what ``factor * schedule`` makes."""

    schedule: Schedule
    factor: float

    def __post_init__(self) -> None:
        check_schedule("schedule", self.schedule)
        check_number("factor", self.factor)

    def at(self, n: float) -> float:
        return self.factor * self.schedule.at(n)


@dataclass(frozen=True)
class Rounded(Schedule):
    """A schedule's nearest whole number, an ``int`` (halves go up): for options that count, such as periods."""

    schedule: Schedule
    _: KW_ONLY
    least: int = 1

    def __post_init__(self) -> None:
        check_schedule("schedule", self.schedule)
        check_whole("least", self.least)

    def at(self, n: float) -> int:
        return max(self.least, math.floor(self.schedule.at(n) + 0.5))


def as_schedule(name: str, given: object) -> Schedule:
    """A schedule as it is; a number as a constant.

    Raises:
        TypeError: something else.
        ValueError: a number that is not finite.
    """
    if isinstance(given, Schedule):
        return given
    if not isinstance(given, bool) and isinstance(given, Real):
        return Constant(check_number(name, given))
    raise TypeError(f"{name} must be a heatopt.lr_scheduler.Schedule or a number, got {_described(given)}")


def check_schedule(name: str, given: object) -> None:
    """Raise TypeError unless ``given`` is a schedule."""
    if not isinstance(given, Schedule):
        raise TypeError(f"{name} must be a heatopt.lr_scheduler.Schedule, got {_described(given)}")


def check_number(name: str, given: object, *, least: float | None = None) -> float:
    """The number, if it is one and finite, and at least ``least``."""
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{name} must be a number, got {given!r} of type {type(given).__name__}")
    number = int(given) if isinstance(given, Integral) else float(given)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {given!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be >= {least}, got {given!r}")
    return number


def check_whole(name: str, given: object, *, least: int | None = None) -> int:
    """The number, if it is a whole one, and at least ``least``."""
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise TypeError(f"{name} must be a whole number, got {given!r} of type {type(given).__name__}")
    return int(check_number(name, given, least=least))


def check_choice(name: str, given: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``given`` is one of the allowed texts."""
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {given!r}")


def _described(given: object) -> str:
    return f"{given!r}" + (" (the class: make an instance of it first)" if isinstance(given, type) else "")


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.settings()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    return check_number("a setting of a schedule", value)


def _restored(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Schedule.from_settings(value)
    return tuple(map(_restored, value)) if isinstance(value, list) else value


def _descendants(kind: Any) -> list[Any]:
    return [found for child in kind.__subclasses__() for found in (child, *_descendants(child))]
