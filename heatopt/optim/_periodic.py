"""What all local-update methods with periods share, and the period itself, which may change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypedDict

import torch

from heatopt.comm import Communicator
from heatopt.local import PERIOD, LocalSettings, OuterFactory, PeriodicSchedule, SyncPlan
from heatopt.optim._local import LocalOptimizer, Place
from heatopt.optim._local_arguments import (
    Nested,
    check_choices,
    check_integer,
    check_moments,
    check_nested,
    check_number,
    check_period,
    check_place,
    check_wire,
    make_settings,
    within_name,
)
from heatopt.sync import Call

__all__ = ["LocalOptions", "PeriodicOptimizer"]


class LocalOptions(TypedDict, total=False):
    """The keyword arguments that all methods with periods take."""

    model: torch.nn.Module | None
    """The module that the parameters belong to. Its floating buffers are averaged with the parameters, others are taken
    from rank 0."""
    comm: Communicator | None
    """The ranks; default :func:`heatopt.world`."""
    within: Communicator | str | None
    """The ranks that average their gradients at each update and so count as one: None (the default): no others; "node";
    or a communicator."""
    average_moments: tuple[int, int] | None
    """Periods of first and second moments, in units of ``sync_every``, after which they are averaged; (3, 6) is
    recommended in DES-LOC, arXiv 2505.22549. Default: never."""
    wire_dtype: torch.dtype | None
    """What changes since the last average are rounded to on the network; sums are in single precision. Default: they
    are not rounded."""
    error_feedback: bool
    """Add what was rounded away to the next change. Default: no."""
    shard: str
    """As in :class:`DataParallelOptimizer`, among the ranks that average gradients. Default: "none"."""
    timeout: float | None
    """Seconds; as in :class:`DataParallelOptimizer`."""


class PeriodicOptimizer(LocalOptimizer):
    """Base of the methods with periods, with all their settings. Not made by users."""

    _schedule: PeriodicSchedule
    """What happens in the period that is under way, and after it unless it changes."""

    def __init__(
        self,
        torch_optimizer: torch.optim.Optimizer,
        *,
        sync_every: int,
        outer: OuterFactory | None,
        warmup_steps: int = 0,
        delay: int = 0,
        late: bool = False,
        fragments: int = 1,
        mix: float | str = 0.0,
        nested: Nested = (),
        model: torch.nn.Module | None = None,
        comm: Communicator | None = None,
        within: Communicator | str | None = None,
        average_moments: tuple[int, int] | None = None,
        wire_dtype: torch.dtype | None = None,
        error_feedback: bool = False,
        shard: str = "none",
        timeout: float | None = None,
    ) -> None:
        optimizer, shard, timeout = check_choices(
            torch_optimizer, model=model, comm=comm, shard=shard, timeout=timeout, within=within
        )
        _check_outer(outer)
        check_wire(wire_dtype, error_feedback)
        schedule = PeriodicSchedule(
            check_integer("sync_every", sync_every, 1),
            fragments=_check_fragments(fragments, sync_every, optimizer),
            delay=None if late else _check_delay(delay, sync_every),
            warmup_steps=check_integer("warmup_steps", warmup_steps, 0),
            nested=check_nested(nested),
            moments=check_moments(average_moments, shard),
        )
        merge, share = ("restart", 0.0) if late else _merging(mix)
        settings = make_settings(
            self,
            optimizer,
            schedule,
            fragments=schedule.fragments,
            merge=merge,
            share=share,
            wire_dtype=wire_dtype,
            error_feedback=error_feedback,
            within=within_name(within),
            shard=shard,
            timeout=timeout,
        )
        self._construct(optimizer, check_place(comm, model, within, nested), settings, outer)

    def _assemble(
        self,
        torch_optimizer: torch.optim.Optimizer,
        place: Place,
        settings: LocalSettings,
        outer: OuterFactory | None,
    ) -> None:
        self._schedule = settings.periods
        super()._assemble(torch_optimizer, place, settings, outer)

    # The period, an option of the groups

    @property
    def sync_every(self) -> int:
        """Updates of the period that is under way. What ``param_groups`` say holds from the next one on."""
        return self._schedule.sync_every

    def _set_options(self) -> None:
        for group in self.param_groups:
            group[PERIOD] = self._schedule.sync_every

    def _plan(self) -> SyncPlan:
        return self._schedule.plan(self._engine.updates + 1)

    def _prepare(self) -> SyncPlan:
        if self._engine.updates == self._settings.periods.warmup_steps:
            asked = self._subject.periods()
            if any(period != self._schedule.sync_every for period in asked):
                self._engine.meet(Call.PERIOD)  # construction has compared another one
                self._begin_period(asked)
        return super()._prepare()

    def _after_update(self, plan: SyncPlan) -> None:
        asked = self._subject.periods()  # which the ranks compare when they average
        super()._after_update(plan)
        if plan.ends_period:
            self._begin_period(asked)

    def _begin_period(self, asked: tuple[Any, ...]) -> None:
        """Raises ValueError, on all ranks because they have compared what they ask for, if it cannot be."""
        self._schedule = self._schedule.followed_by(check_period(asked), self._engine.updates)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        period = self.param_groups[0][PERIOD]
        if isinstance(param_group, dict):  # or torch says what is wrong
            param_group.setdefault(PERIOD, period)
        super().add_param_group(param_group)

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        period = self.param_groups[0][PERIOD]
        super()._take_state(state_dict)
        for group in self.param_groups:  # a plain optimizer's have none
            group.setdefault(PERIOD, period)

    def _more(self) -> dict[str, Any]:
        schedule = self._schedule
        return {
            "period": {
                PERIOD: schedule.sync_every,
                "begin": schedule.begin,
                "ended": schedule.ended,
                "before": schedule.before,
            }
        }

    def _take_more(self, more: dict[str, Any]) -> None:
        self._schedule = replace(self._settings.periods, **more.get("period", {}))


def _merging(mix: object) -> tuple[str, float]:
    if isinstance(mix, str):
        if mix != "delta":
            raise ValueError(f"mix must be 'delta' or a number from 0 to 1, got {mix!r}")
        return "delta", 0.0
    return "mix", check_number("mix", mix, 0, 1)


def _check_fragments(fragments: object, sync_every: int, optimizer: torch.optim.Optimizer) -> int:
    fragments = check_integer("fragments", fragments, 1)
    most = min(sync_every, max(1, sum(len(group["params"]) for group in optimizer.param_groups)))
    if fragments > most:
        raise ValueError(f"fragments must be at most sync_every and the number of parameters ({most} here)")
    return fragments


def _check_delay(delay: object, sync_every: int) -> int:
    delay = check_integer("delay", delay, 0)
    if delay > sync_every:
        raise ValueError(f"delay must be at most sync_every ({sync_every}), got {delay}")
    return delay


def _check_outer(outer: object) -> None:
    if outer is not None and (not callable(outer) or isinstance(outer, torch.optim.Optimizer)):
        raise TypeError(
            "outer must make an optimizer of the parameters that it is given, such as "
            f"lambda params: torch.optim.SGD(params, lr=0.7), got {outer!r}"
        )
