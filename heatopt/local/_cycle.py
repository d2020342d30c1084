"""DASO's phases: how often nodes meet, decided once per epoch from the loss. No tensors, no ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from heatopt.local._schedule import Action, Merge, ReplicaMean, Send, SyncPlan

__all__ = ["Cycle", "DasoPeriods", "DetectMetricPlateau", "Phase"]

_FIRST_SKIPS = 4


class DetectMetricPlateau:
    """Tells when a metric has stopped improving. With the names of Heat's class.

    Args:
        mode: "min": smaller is better; "max": larger is.
        patience: a plateau is reached with the (``patience`` + 1)-th epoch in a row that is no improvement.
        threshold: the least change that is an improvement, relative to the best value or absolute.
        threshold_mode: "rel" or "abs".
        cooldown: epochs after a plateau that are not counted.

    Raises:
        TypeError: a number of epochs that is not an integer.
        ValueError: an unknown mode, or a negative number.
    """

    def __init__(
        self,
        mode: str = "min",
        patience: int = 10,
        *,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        if threshold_mode not in ("rel", "abs"):
            raise ValueError(f"threshold_mode must be 'rel' or 'abs', got {threshold_mode!r}")
        for name, epochs in (("patience", patience), ("cooldown", cooldown)):
            if not isinstance(epochs, int) or isinstance(epochs, bool):
                raise TypeError(f"{name} must be an integer, at least 0, got {epochs!r}")
            if epochs < 0:
                raise ValueError(f"{name} must be at least 0, got {epochs}")
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        self.mode = mode
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cooldown = cooldown
        self.mode_worse = math.inf if mode == "min" else -math.inf
        self.last_epoch = 0
        self.reset()

    def reset(self) -> None:
        """Forget the best value, the epochs without improvement and the cool-down."""
        self.best = self.mode_worse
        self.cooldown_counter = 0
        self.num_bad_epochs = 0

    def get_state(self) -> dict[str, Any]:
        """All settings and counters, for a checkpoint."""
        return dict(vars(self))

    def set_state(self, dic: dict[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned."""
        for name in vars(self):
            setattr(self, name, dic[name])

    def has_plateaued(self, metrics: float | torch.Tensor) -> bool:
        """Take the metric of one more epoch; True if it has stopped improving, which starts the count anew.

        A NaN is neither an improvement nor counted.
        """
        current = float(metrics)
        self.last_epoch += 1
        if math.isnan(current):
            return False
        if self.is_better(current, self.best):
            self.best = current
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.in_cooldown:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs <= self.patience:
            return False
        self.cooldown_counter = self.cooldown
        self.num_bad_epochs = 0
        return True

    def test_if_improving(self, metrics: float | torch.Tensor) -> bool:
        """:meth:`has_plateaued`, by the name that it has in Heat, where too it is True once nothing improves."""
        return self.has_plateaued(metrics)

    @property
    def in_cooldown(self) -> bool:
        """True while epochs are not counted."""
        return self.cooldown_counter > 0

    def is_better(self, a: float, best: float) -> bool:
        """True if ``a`` improves on ``best`` by at least the threshold."""
        if math.isinf(best):
            return a < best if self.mode == "min" else a > best
        margin = self.threshold * abs(best) if self.threshold_mode == "rel" else self.threshold
        return a < best - margin if self.mode == "min" else a > best + margin


class Phase(str, Enum):
    """Where a training with DASO is; it only goes forward."""

    WARMUP = "warm-up"
    CYCLING = "cycling"
    COOLDOWN = "cool-down"


@dataclass(frozen=True)
class DasoPeriods:
    """What the cycle is made from; the names are those of DASO's arguments."""

    total_epochs: int
    warmup_epochs: int
    cooldown_epochs: int
    stability_level: float
    max_global_skips: int
    skip_reduction_factor: int
    local_skip_factor: int


class Cycle:
    """The state of the cycle, and the plan of each batch.

    Args:
        periods: what the user chose.
        keeps_all: a merge adds what other nodes have done, and takes nothing away; so it leaves the mean of all nodes
            as it is, and one that comes right before the average at the end of an epoch is left out. An average is
            merged before the next one is sent.
    """

    def __init__(self, periods: DasoPeriods, keeps_all: bool = False) -> None:
        self._periods = periods
        self._keeps_all = keeps_all
        self.plateau = DetectMetricPlateau(patience=2, threshold=periods.stability_level)
        self.reset()

    def reset(self) -> None:
        """Back to the first epoch."""
        self.plateau.reset()
        self.plateau.last_epoch = 0
        self.epoch = 0
        """Number of epochs that have ended."""
        self.phase = Phase.WARMUP
        self.global_skip = self.local_skip = self.batches_to_wait = 0
        self._enter_phase()

    def _enter_phase(self) -> None:
        periods = self._periods
        if self.epoch >= periods.total_epochs - periods.cooldown_epochs:
            self.phase = Phase.COOLDOWN
            self.global_skip = self.local_skip = self.batches_to_wait = 0
        elif self.epoch == periods.warmup_epochs:
            self.phase = Phase.CYCLING
            self._set_skips(min(_FIRST_SKIPS, periods.max_global_skips), 1, 1)

    def _set_skips(self, skips: int, local: int, wait: int) -> None:
        """No number falls below 1 while nodes skip batches at all."""
        if self._keeps_all:
            wait = min(wait, skips)  # sent before the last one was merged, what divides nodes would be taken away twice
        self.global_skip = skips
        self.local_skip, self.batches_to_wait = (max(local, 1), max(wait, 1)) if skips else (0, 0)

    def finish_epoch(self, loss: float) -> None:
        """Decide on the next epoch from this one's loss, the same number on all ranks."""
        self.epoch += 1
        self._enter_phase()
        if self.phase is not Phase.CYCLING or not self.plateau.has_plateaued(loss):
            return
        periods = self._periods
        if self.global_skip > 1:
            factor = periods.skip_reduction_factor
            skips = max(self.global_skip // factor, 1)
            self._set_skips(skips, self.local_skip // factor, self.batches_to_wait - 1)
        elif self.global_skip == 1:
            pause = periods.max_global_skips // periods.local_skip_factor
            self._set_skips(periods.max_global_skips, pause, pause)

    def plan(self, batch: int, last_batch: int | None) -> SyncPlan:
        """What follows the update with batch number ``batch``, counted from 0 in each epoch."""
        if self.global_skip == 0:
            return SyncPlan(actions=(Send(0), Merge(0)))
        alone = self.local_skip > 1
        actions: list[Action] = [
            Merge(0)
            for earlier in range(max(batch - self.batches_to_wait, 0), batch)
            if (delay := self._delay(earlier, last_batch)) and earlier + delay == batch
        ]
        delay = self._delay(batch, last_batch)
        if alone and (delay or batch == last_batch or batch % self.local_skip == 0):
            actions.append(ReplicaMean())
        if batch == last_batch:
            actions += [Send(0, full=not self._keeps_all), Merge(0)]
        elif delay:
            actions.append(Send(0, delay))
        return SyncPlan(alone=alone, actions=tuple(actions))

    def _delay(self, batch: int, last_batch: int | None) -> int:
        """How long what is sent after ``batch`` is on its way; 0: nothing is sent. It arrives within the epoch."""
        if batch % self.global_skip:
            return 0
        if last_batch is None or batch > last_batch:
            return self.batches_to_wait
        if self._keeps_all and batch + self.batches_to_wait >= last_batch:
            return 0
        return min(self.batches_to_wait, last_batch - batch)

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as plain objects."""
        return {
            "epoch": self.epoch,
            "phase": self.phase.value,
            "skips": [self.global_skip, self.local_skip, self.batches_to_wait],
            "plateau": self.plateau.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.epoch = state["epoch"]
        self.phase = Phase(state["phase"])
        self.global_skip, self.local_skip, self.batches_to_wait = state["skips"]
        self.plateau.set_state(state["plateau"])
