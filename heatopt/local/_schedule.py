"""What happens after which update: a pure function of its number, without tensors and without ranks.

[Note: Periods that change]
A schedule has one period. Where another one begins, at the end of a period, another schedule follows it: a value too,
which knows how long the period before was, so that what had been sent is merged in time. Which update it begins after
is all that a run has to remember, and its plans are pure functions of the number again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

__all__ = ["Action", "GroupMean", "Merge", "MomentMean", "PeriodicSchedule", "ReplicaMean", "Send", "SyncPlan"]


@dataclass(frozen=True)
class Send:
    """Begin the average of a fragment over all replicas."""

    fragment: int
    delay: int = 0
    """Updates until it may be merged; 0: at once, so it is waited for."""
    full: bool = False
    """Send the values themselves, not rounded differences."""


@dataclass(frozen=True)
class Merge:
    """Merge the oldest average of a fragment that is on its way, if it may be."""

    fragment: int


@dataclass(frozen=True)
class GroupMean:
    """Average all parameters over a nested group."""

    level: int


@dataclass(frozen=True)
class ReplicaMean:
    """Average all parameters over the ranks of each replica, which have trained alone; these agree among themselves."""


@dataclass(frozen=True)
class MomentMean:
    """Average the first (1) or second (2) moments of the optimizer over all ranks."""

    order: int


Action = Send | Merge | GroupMean | ReplicaMean | MomentMean


@dataclass(frozen=True)
class SyncPlan:
    """What happens in and after one update."""

    exact: bool = False
    """The update uses gradients averaged over all ranks."""
    alone: bool = False
    """The update uses each rank's own gradients, in replicas of several ranks too."""
    actions: tuple[Action, ...] = ()
    """In this order, after the update."""
    covers: int = 0
    """Updates that are averaged: those since what is sent was sent before."""
    ends_period: bool = False
    """It is the last update of a period: the next one may have another length."""

    @property
    def meets(self) -> bool:
        """True if all ranks begin something together, so that they must agree first."""
        return any(not isinstance(action, Merge | ReplicaMean) for action in self.actions)


@dataclass(frozen=True)
class PeriodicSchedule:
    """Periods of one length. Updates are counted from 1, those of the warm-up first."""

    sync_every: int
    """Updates between two averages of the same fragment."""
    fragments: int = 1
    """Parts of the model; each is sent once per period, at even distances."""
    delay: int | None = 0
    """Updates between sending and merging, at most ``sync_every``; None: what is sent is merged when its fragment is
    sent next, but after that."""
    warmup_steps: int = 0
    """Updates with averaged gradients before the first period."""
    nested: tuple[int, ...] = ()
    """Periods of the nested groups, ascending; only the longest that is due is kept."""
    moments: tuple[int, int] | None = None
    """Periods of the first and second moments, in units of ``sync_every``."""
    begin: int = 0
    """Number of updates before the first period of this length, those of the warm-up left out."""
    ended: int = 0
    """Number of periods before it."""
    before: int = 0
    """Length of the last of these; 0: there was none."""

    def __post_init__(self) -> None:
        """Raise ValueError unless a period is long enough for what happens in it."""
        shortest = max(1, self.fragments, self.delay or 0)
        if self.sync_every < shortest:
            raise ValueError(
                f"sync_every must be at least {shortest}, with fragments={self.fragments} and delay={self.delay}, "
                f"got {self.sync_every}"
            )
        for short, long in pairwise((*self.nested, self.sync_every)):
            if long % short or long == short:
                raise ValueError(
                    "periods of nested groups must grow and divide each other and sync_every, "
                    f"got {(*self.nested, self.sync_every)}"
                )

    def followed_by(self, sync_every: int, updates: int) -> PeriodicSchedule:
        """What happens from update number ``updates`` on, the last of a period or of the warm-up.

        Raises:
            ValueError: ``sync_every`` is too small for delay, fragments or nested groups, or no multiple of theirs.
        """
        if sync_every == self.sync_every:
            return self
        begin = updates - self.warmup_steps
        periods = (begin - self.begin) // self.sync_every
        return replace(
            self,
            sync_every=sync_every,
            begin=begin,
            ended=self.ended + periods,
            before=self.sync_every if periods else self.before,
        )

    def plan(self, step: int) -> SyncPlan:
        """What happens in and after update number ``step``."""
        if step <= self.warmup_steps:
            return SyncPlan(exact=True)
        local = step - self.warmup_steps - self.begin
        merges: list[Action] = []
        sends: list[Action] = []
        covers = 0
        for fragment in range(self.fragments):
            if self.delay and self._arrives(fragment, local, self.delay):
                merges.append(Merge(fragment))
            if not self._is_due(fragment, local):
                continue
            covers = self._since_last(fragment, local)
            sends.append(Send(fragment, 1 if self.delay is None else self.delay))
            if not self.delay:
                sends.append(Merge(fragment))
        return SyncPlan(
            actions=(*self._group_means(local), *merges, *sends, *self._moment_means(local)),
            covers=covers,
            ends_period=local % self.sync_every == 0,
        )

    def _place(self, fragment: int, period: int) -> int:
        """After which update of a period a fragment is sent."""
        return (fragment + 1) * period // self.fragments

    def _is_due(self, fragment: int, local: int) -> bool:
        return local > 0 and (local - self._place(fragment, self.sync_every)) % self.sync_every == 0

    def _arrives(self, fragment: int, local: int, delay: int) -> bool:
        """Whether it was sent ``delay`` updates ago; that may have been before the first period of this length."""
        if local > delay:
            return self._is_due(fragment, local - delay)
        return self.before > 0 and local == self._place(fragment, self.before) + delay - self.before

    def _since_last(self, fragment: int, local: int) -> int:
        """Updates since the fragment was sent before, or since the warm-up."""
        place = self._place(fragment, self.sync_every)
        if local > place:
            return self.sync_every
        return place + (self.before - self._place(fragment, self.before) if self.before else 0)

    def _group_means(self, local: int) -> list[Action]:
        due = [level for level, period in enumerate(self.nested) if local % period == 0]
        return [GroupMean(due[-1])] if due and local % self.sync_every else []

    def _moment_means(self, local: int) -> list[Action]:
        if self.moments is None or local % self.sync_every:
            return []
        number = self.ended + local // self.sync_every
        return [MomentMean(order) for order, multiple in enumerate(self.moments, 1) if number % multiple == 0]
