"""The scheduler that drives options of parameter groups by schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from heatopt.lr_scheduler._drives import (
    Drive,
    Given,
    as_drive,
    check_fit,
    drive_settings,
    drive_value,
    restored_drive,
    write,
)
from heatopt.lr_scheduler._schedule import check_choice, check_whole

__all__ = ["ParamScheduler"]

_ON_LOAD = ("refuse", "restore", "keep")


class ParamScheduler(LRScheduler):
    """Drive options of an optimizer's parameter groups by schedules of one count.

    >>> rate = heatopt.lr_scheduler.WarmupDecay(3e-4, 3e-5, warmup_steps=100, decay_steps=1000, style="cosine")
    >>> scheduler = heatopt.lr_scheduler.ParamScheduler(
    ...     optimizer, lr=rate, weight_decay=0.1, groups={1: {"lr": 0.1 * rate, "weight_decay": 0.0}}
    ... )

    The options are set at construction, to the schedules' values at count 0, and by each :meth:`step`. It is a torch
    ``LRScheduler``, also where it drives other options than ``lr``, so frameworks take it as one; several drive one
    optimizer, torch's own among them, if each drives other options.

    An option that is a tensor is filled in place and stays that tensor. A learning rate that was set by hand lasts
    until the next step. Nothing is communicated: ranks that count alike have equal options, and those of a
    :class:`heatopt.DataParallelOptimizer` are compared at each of its steps.

    Args:
        optimizer: any torch optimizer, wrapped, sharded or plain.
        groups: by number of the group, what it has instead of ``schedules``; None for an option that is left alone.
        on_load: what :meth:`load_state_dict` does with a state whose schedules are other ones: "refuse" it with an
            error that names the difference, "restore" those of the state, or "keep" those given here and take the
            count alone.
        schedules: by name of the option (``lr``, ``weight_decay``, ``momentum``, or any other of the groups) its
            schedule, or a number that it always is. An option that is a tuple, such as ``betas``, takes a tuple of
            them, with None for an element that is left alone. They hold for all groups, those added later too.

    Raises:
        TypeError: ``optimizer`` is none, or a schedule is neither that nor a number.
        ValueError: nothing to drive; no such group or option; an option that is no number; a tuple of another length.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        groups: Mapping[int, Mapping[str, Given]] | None = None,
        on_load: str = "refuse",
        **schedules: Given,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if groups is not None and not isinstance(groups, Mapping):
            raise TypeError(f"groups must map numbers of groups to their schedules, got {groups!r}")
        check_choice("on_load", on_load, _ON_LOAD)
        if not schedules and not groups:
            raise ValueError("there is nothing to drive: give schedules by option, such as lr=..., or groups=")
        self.optimizer = optimizer
        self._on_load = on_load
        self._schedules = {option: as_drive(option, given) for option, given in schedules.items()}
        for option, drive in self._schedules.items():
            if drive is None:
                raise TypeError(f"{option} must be a schedule or a number, got None: leave it out, or use groups=")
        self._overrides: dict[int, dict[str, Drive | None]] = {}
        self._adopt({number: self._chosen(number, given) for number, given in (groups or {}).items()})
        super().__init__(optimizer)  # calls step(), which makes the count 0

    def override(self, group: int, **schedules: Given) -> None:
        """Give one group schedules of its own, at once: for a group that was added after construction.

        Args:
            group: its number.
            schedules: as at construction; None for an option that is left alone from now on.

        Raises:
            TypeError, ValueError: as at construction; nothing has changed then.
        """
        self._adopt({**self._overrides, group: self._chosen(group, schedules)})
        self._update_lr(self.last_epoch)

    def step(self, increment: int = 1) -> None:  # type: ignore[override]
        """Count on, and set the options to the schedules' values there. Call it after the optimizer's ``step()``.

        Args:
            increment: how far: 1 where steps are counted; where samples are, the size of the *global* batch, so that
                all ranks count alike. 0 sets the options again.

        Raises:
            TypeError: ``increment`` is no whole number.
            ValueError: it is negative, or a group that was added later lacks an option.
        """
        increment = check_whole("increment", increment, least=0)
        if increment == 0:
            self._update_lr(self.last_epoch)
            return
        # torch's own step counts by one, and warns where the optimizer has not been stepped before.
        before = self.last_epoch
        self.last_epoch += increment - 1
        try:
            super().step()
        except Exception:
            self.last_epoch = before
            raise

    def values(self, n: int) -> list[dict[str, Any]]:
        """What the driven options of each group are at count ``n``; None for elements that are left alone. Pure."""
        return [
            {option: drive_value(option, drive, n) for option, drive in self._drives(number).items()}
            for number in range(self._number())
        ]

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rates at the present count; of groups where it is not driven the one that they have."""
        found = self.values(self.last_epoch)
        return [values.get("lr", group["lr"]) for values, group in zip(found, self.optimizer.param_groups, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The count, and the settings of all schedules, in plain Python objects."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count, "settings": self._settings()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on at the count of :meth:`state_dict`, and set the options to their values there.

        Raises:
            ValueError: not such a state, or its schedules are other ones and ``on_load`` is "refuse".
        """
        missing = [key for key in ("last_epoch", "_step_count", "settings") if key not in state_dict]
        if missing:
            raise ValueError(f"this is no state of a ParamScheduler: {missing[0]!r} is missing in {list(state_dict)}")
        count = check_whole("last_epoch of the state", state_dict["last_epoch"], least=0)
        saved, own = state_dict["settings"], self._settings()
        if self._on_load != "keep" and len(saved) != len(own):
            raise ValueError(f"the state is for {len(saved)} parameter groups, but the optimizer has {len(own)}")
        if self._on_load == "refuse" and saved != own:
            raise ValueError(
                f"the state has other schedules: {_difference(saved, own)}; make the scheduler as it was, or with "
                "on_load='restore' to take the schedules of the state, or on_load='keep' to take its count alone"
            )
        if self._on_load == "restore":
            # The general schedules stay, for groups that are added later.
            general = dict.fromkeys(self._schedules)
            self._adopt(
                {
                    number: {**general, **{option: restored_drive(one) for option, one in settings.items()}}
                    for number, settings in enumerate(saved)
                }
            )
        self._step_count = state_dict["_step_count"]
        self._update_lr(count)

    def _chosen(self, number: int, given: Mapping[str, Given]) -> dict[str, Drive | None]:
        """What one group is to have of its own, with what it has already."""
        check_whole("number of a group", number, least=0)
        if number >= self._number():
            raise ValueError(f"there is no parameter group {number}; the optimizer has {self._number()}, from 0")
        if not isinstance(given, Mapping):
            raise TypeError(f"schedules of group {number} must be given by option, as {{'lr': ...}}, got {given!r}")
        drives = {option: as_drive(option, one) for option, one in given.items()}
        return {**self._overrides.get(number, {}), **drives}

    def _adopt(self, overrides: dict[int, dict[str, Drive | None]]) -> None:
        """Let groups have these schedules of their own, if all fit and can be saved."""
        before, self._overrides = self._overrides, overrides
        try:
            self._check()
            self._settings()
        except (TypeError, ValueError):
            self._overrides = before
            raise

    def _number(self) -> int:
        return len(self.optimizer.param_groups)

    def _drives(self, number: int) -> dict[str, Drive]:
        """What drives the options of one group."""
        found = {**self._schedules, **self._overrides.get(number, {})}
        return {option: drive for option, drive in found.items() if drive is not None}

    def _settings(self) -> list[dict[str, Any]]:
        return [
            {option: drive_settings(drive) for option, drive in self._drives(number).items()}
            for number in range(self._number())
        ]

    def _check(self) -> None:
        decided = getattr(self.optimizer, "decided_options", {})
        for number, group in enumerate(self.optimizer.param_groups):
            for option, drive in self._drives(number).items():
                if option in decided:
                    raise ValueError(f"{option!r} of {type(self.optimizer).__name__} {decided[option]}")
                check_fit(f"parameter group {number} of {type(self.optimizer).__name__}", group, option, drive)

    def _update_lr(self, epoch: int | None = None) -> None:
        """Set the options at a count, or at the next one: what torch's ``step`` and ``SequentialLR`` call."""
        count = self.last_epoch + 1 if epoch is None else epoch
        self._check()  # a group may have been added without one of the options
        found = self.values(count)
        self.last_epoch = count
        for group, values in zip(self.optimizer.param_groups, found, strict=True):
            for option, value in values.items():
                write(group, option, value)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._last_lr = [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]


def _difference(saved: Any, own: Any, where: str = "") -> str:
    """The first difference between two nested settings, which differ."""
    if isinstance(saved, dict) and isinstance(own, dict) and saved.get("kind") == own.get("kind"):
        for key in (*saved, *(key for key in own if key not in saved)):
            if saved.get(key) != own.get(key):
                return _difference(saved.get(key), own.get(key), f"{where}, {key}")
    if isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        for number, (one, other) in enumerate(zip(saved, own, strict=True)):
            if one != other:
                return _difference(one, other, f"{where}, element {number}" if where else f"parameter group {number}")
    return f"{where}: {saved!r} there, {own!r} here"
