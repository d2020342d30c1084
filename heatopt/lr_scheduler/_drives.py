"""What drives one option of a parameter group: a schedule, or for an option that is a tuple one for each element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch

from heatopt.lr_scheduler._schedule import Schedule, as_schedule, check_number

__all__ = ["Drive", "Given", "as_drive", "check_fit", "drive_settings", "drive_value", "restored_drive", "write"]

Given: TypeAlias = Schedule | float | Sequence[Schedule | float | None] | None
"""What users give for an option."""

Drive: TypeAlias = Schedule | tuple[Schedule | None, ...]
"""The same, checked. None stands for an element that is left alone."""


def as_drive(option: str, given: Given) -> Drive | None:
    """What users give for an option, checked.

    Raises:
        TypeError: it is neither None nor a schedule nor a number, nor a tuple of these.
        ValueError: a number that is not finite.
    """
    if isinstance(given, (tuple, list)):
        names = [f"element {index} of {option}" for index in range(len(given))]
        return tuple(None if one is None else as_schedule(name, one) for name, one in zip(names, given, strict=True))
    return None if given is None else as_schedule(option, given)


def check_fit(owner: str, group: Mapping[str, Any], option: str, drive: Drive) -> None:
    """Raise ValueError unless the option is there, a number, and a tuple where the drive is one."""
    if option not in group or option in ("params", "param_names"):
        others = ", ".join(key for key in group if key not in ("params", "param_names"))
        raise ValueError(f"{owner} has no option {option!r}; it has {others}")
    present = group[option]
    if not isinstance(present, (tuple, list)):
        if isinstance(drive, tuple):
            raise ValueError(f"{option!r} of {owner} is {present!r}: give one schedule, not {len(drive)}")
        _check_number(f"{option!r} of {owner}", present)
        return
    if not isinstance(drive, tuple) or len(drive) != len(present):
        raise ValueError(
            f"{option!r} of {owner} is {present!r}: give {len(present)} schedules as a tuple, with None for an "
            "element that is left alone"
        )
    for index, element in enumerate(present):
        _check_number(f"element {index} of {option!r} of {owner}", element)


def _check_number(what: str, present: object) -> None:
    if isinstance(present, bool) or not isinstance(present, (Real, torch.Tensor)):
        raise ValueError(f"{what} is {present!r}, and a schedule can only drive a number")


def drive_value(option: str, drive: Drive, n: int) -> float | tuple[float | None, ...]:
    """The value at count ``n``; None for an element that is left alone."""
    if isinstance(drive, tuple):
        return tuple(None if one is None else check_number(option, one.value(n)) for one in drive)
    return check_number(option, drive.value(n))  # of a schedule of the user's it may be anything


def write(group: dict[str, Any], option: str, value: float | tuple[float | None, ...]) -> None:
    """Set an option; tensors are filled in place, as torch's schedulers do, so that who holds them sees it."""
    present = group[option]
    if isinstance(value, tuple):
        group[option] = type(present)(_written(old, new) for old, new in zip(present, value, strict=True))
    else:
        group[option] = _written(present, value)


def _written(present: Any, value: float | None) -> Any:
    if value is None:
        return present
    return present.fill_(value) if isinstance(present, torch.Tensor) else value


def drive_settings(drive: Drive) -> Any:
    """Plain Python objects, equal for equal drives."""
    if isinstance(drive, tuple):
        return [None if one is None else one.settings() for one in drive]
    return drive.settings()


def restored_drive(settings: Any) -> Drive:
    """The inverse of :func:`drive_settings`."""
    if isinstance(settings, list):
        return tuple(None if one is None else Schedule.from_settings(one) for one in settings)
    return Schedule.from_settings(settings)
