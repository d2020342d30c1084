"""What happens after which update: a pure function of its number, without tensors and without ranks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Action", "GroupMean", "Merge", "MomentMean", "PeriodicSchedule", "ReplicaMean", "Send", "SyncPlan"]


@dataclass(frozen=True)
class Send:
    """Begin the average of a fragment over all replicas."""

    fragment: int
    delay: int = 0
    """Updates until it is merged; 0: at once, so it is waited for."""
    full: bool = False
    """Send the values themselves, not rounded differences."""


@dataclass(frozen=True)
class Merge:
    """Merge the oldest average of a fragment that is on its way."""

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

    @property
    def meets(self) -> bool:
        """True if all ranks begin something together, so that they must agree first."""
        return any(not isinstance(action, Merge | ReplicaMean) for action in self.actions)


@dataclass(frozen=True)
class PeriodicSchedule:
    """Fixed periods. Updates are counted from 1, those of the warm-up first."""

    sync_every: int
    """Updates between two averages of the same fragment."""
    fragments: int = 1
    """Parts of the model; each is sent once per period, at even distances."""
    delay: int = 0
    """Updates between sending and merging, at most ``sync_every``."""
    warmup_steps: int = 0
    """Updates with averaged gradients before the first period."""
    nested: tuple[int, ...] = ()
    """Periods of the nested groups, ascending; only the longest that is due is kept."""
    moments: tuple[int, int] | None = None
    """Periods of the first and second moments, in units of ``sync_every``."""
    send_first: bool = False
    """With a delay of ``sync_every``: each rank sends what it has done, then merges what was sent a period ago."""

    def plan(self, step: int) -> SyncPlan:
        """What happens in and after update number ``step``."""
        if step <= self.warmup_steps:
            return SyncPlan(exact=True)
        local = step - self.warmup_steps
        merges: list[Action] = []
        sends: list[Action] = []
        for fragment in range(self.fragments):
            if self.delay and not self.send_first and self._is_due(fragment, local - self.delay):
                merges.append(Merge(fragment))
            if self._is_due(fragment, local):
                sends.append(Send(fragment, self.delay))
                if not self.delay or self.send_first:
                    sends.append(Merge(fragment))
        return SyncPlan(actions=(*self._group_means(local), *merges, *sends, *self._moment_means(local)))

    def _is_due(self, fragment: int, local: int) -> bool:
        place = (fragment + 1) * self.sync_every // self.fragments
        return local > 0 and (local - place) % self.sync_every == 0

    def _group_means(self, local: int) -> list[Action]:
        due = [level for level, period in enumerate(self.nested) if local % period == 0]
        return [GroupMean(due[-1])] if due and local % self.sync_every else []

    def _moment_means(self, local: int) -> list[Action]:
        if self.moments is None:
            return []
        return [
            MomentMean(order)
            for order, multiple in enumerate(self.moments, 1)
            if local % (self.sync_every * multiple) == 0
        ]
