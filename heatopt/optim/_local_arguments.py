"""Checks of the arguments of local-update methods, with messages that say what was got and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from heatopt.comm import Communicator, check_timeout, world
from heatopt.local import PERIOD, LocalSettings
from heatopt.optim._arguments import check_arguments
from heatopt.optim._data_parallel import DataParallelOptimizer
from heatopt.optim._local import LocalOptimizer, Place

__all__ = ["check_choices", "check_integer", "check_number", "check_place", "check_wire"]

Nested = Sequence[tuple["Communicator | str", int]]


def check_integer(name: str, value: object, least: int) -> int:
    """``value``, an integer of at least ``least``.

    Raises:
        TypeError: not an integer.
        ValueError: a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)  # NumPy's would not be loaded from a checkpoint with weights_only=True


def check_number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """``value`` as a float between ``low`` and ``high``.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    allowed = f"a number {'>' if open_low else '>='} {low:g}" + ("" if math.isinf(high) else f" and <= {high:g}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    if not low <= value <= high or (open_low and value == low) or math.isinf(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return float(value)


def check_wire(wire_dtype: object, error_feedback: object) -> None:
    """Raise TypeError or ValueError unless differences may be rounded so."""
    if not isinstance(error_feedback, bool):
        raise TypeError(f"error_feedback must be True or False, got {error_feedback!r}")
    if wire_dtype is None:
        if error_feedback:
            raise ValueError("error_feedback returns what wire_dtype rounds away: give a wire_dtype too")
        return
    if not isinstance(wire_dtype, torch.dtype):
        raise TypeError(f"wire_dtype must be torch.bfloat16, torch.float16, torch.float32 or None, got {wire_dtype!r}")
    if wire_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"wire_dtype must be torch.bfloat16, torch.float16, torch.float32 or None, got {wire_dtype}")


def check_choices(
    torch_optimizer: object, *, model: object, comm: object, shard: object, timeout: object, within: object
) -> tuple[torch.optim.Optimizer, str, float | None]:
    """The optimizer, what is sharded, and the time-out: checks that all methods share.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or a wrapped wrapper.
    """
    checked = check_arguments(torch_optimizer, model=model, comm=comm, timeout=timeout, shard=shard)
    assert isinstance(torch_optimizer, torch.optim.Optimizer)
    if isinstance(torch_optimizer, (DataParallelOptimizer, LocalOptimizer)):
        raise ValueError(f"torch_optimizer is a {type(torch_optimizer).__name__} already; give the torch optimizer")
    if within is not None and within != "node" and not isinstance(within, Communicator):
        kind = TypeError if not isinstance(within, str) else ValueError
        raise kind(f"within must be None, 'node' or a heatopt.comm.Communicator, got {within!r}")
    return torch_optimizer, checked.shard, None if timeout is None else check_timeout(timeout)


def check_place(comm: Communicator | None, model: torch.nn.Module | None, within: Any, nested: Any = ()) -> Place:
    """The communicators. Collective if one of them is "node"."""
    comm = world() if comm is None else comm
    groups = [group for group, _ in nested]
    wants_node = comm.size > 1 and "node" in (within, *groups)
    node = comm.by_node().within if wants_node else comm
    return Place(
        comm,
        model,
        node if within == "node" else within,
        [node if group == "node" else group for group in groups],
    )


def check_nested(nested: object) -> tuple[int, ...]:
    """The periods of nested groups.

    Raises:
        TypeError: not pairs of a group and a period.
        ValueError: a period smaller than 1.
    """
    if isinstance(nested, str) or not isinstance(nested, Sequence):
        raise TypeError(f"nested must be pairs of a group and its period, got {nested!r}")
    periods = []
    for pair in nested:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"nested must be pairs of a group and its period, got {pair!r}")
        group, period = pair
        if group != "node" and not isinstance(group, Communicator):
            raise TypeError(f"a nested group must be 'node' or a heatopt.comm.Communicator, got {group!r}")
        periods.append(check_integer("the period of a nested group", period, 1))
    return tuple(periods)


def check_period(asked: Sequence[object]) -> int:
    """The period that the groups ask for.

    Raises:
        ValueError: none, not a whole number, one smaller than 1, or several.
    """
    for number, period in enumerate(asked):
        if isinstance(period, bool) or not isinstance(period, Integral) or period < 1:
            raise ValueError(
                f"{PERIOD} of parameter group {number} must be a whole number >= 1 when a period begins, got "
                f"{period!r}; drive it by a schedule of whole numbers, such as heatopt.lr_scheduler.Rounded(schedule)"
            )
        if period != asked[0]:
            raise ValueError(
                f"{PERIOD} must be the same in all parameter groups, which are averaged together: group 0 has "
                f"{asked[0]}, group {number} has {period}; leave it out of the scheduler's groups="
            )
    return int(asked[0])  # type: ignore[call-overload, no-any-return]


def check_moments(average_moments: object, shard: str) -> tuple[int, int] | None:
    """The periods of the moments, in units of ``sync_every``.

    Raises:
        TypeError: not two integers.
        ValueError: smaller than 1, or states of which each rank has a part only.
    """
    if average_moments is None:
        return None
    if not isinstance(average_moments, tuple) or len(average_moments) != 2:
        raise TypeError(f"average_moments must be two integers, such as (3, 6), or None, got {average_moments!r}")
    if shard != "none":
        raise ValueError(f"average_moments needs whole states on each rank; shard={shard!r} divides them")
    first, second = (check_integer("average_moments", value, 1) for value in average_moments)
    return first, second


def within_name(within: object) -> str:
    """What a replica is, for comparison between ranks."""
    return "rank" if within is None else "node" if within == "node" else "group"


def make_settings(method: object, optimizer: torch.optim.Optimizer, periods: Any, **choices: Any) -> LocalSettings:
    """The settings of a method."""
    return LocalSettings(type(method).__name__, type(optimizer).__name__, periods, **choices)
