"""Which settings are fastest here? Tried out in the first steps; pure.

[Note: Tuning]
What the user left open (``blocking=None``, ``bucket_mb=None``) changes the speed of a step and nothing else: results
are bit-identical. So the first steps try a few candidates in turn, twice, because machines drift. A candidate is
compared with the default of the same turn, and must win both times: an accident seldom happens twice. Each step counts
as long as the slowest rank says, and every rank sees what all say, so all ranks make the same choice at the same step.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["DEFAULT", "Choice", "Tuner", "candidates"]


class Choice(NamedTuple):
    """How buckets travel."""

    blocking: bool
    """Reduce a bucket before backward goes on."""
    bucket_mb: float
    """Size of a bucket in MiB."""


DEFAULT = Choice(blocking=True, bucket_mb=8.0)

_LARGE_BYTES = 512 * 2**20

# Steps before the first trial: caches, optimizer state and compilers warm up.
_WARM_UP = 3
_PASSES = 2
# Of the steps of a trial the first belongs to the change of the plan.
_STEPS = 4
# A candidate must be that much faster than the default, or noise would choose.
_WORTH_IT = 0.98


def candidates(blocking: bool | None, bucket_mb: float | None, overlaps: bool, gradient_bytes: int) -> list[Choice]:
    """What to try, the default first: of what the user left open (None), all that may pay.

    Args:
        blocking: the user's choice.
        bucket_mb: the user's choice.
        overlaps: True if non-blocking reductions are known to pay here: between nodes, and in shared memory.
        gradient_bytes: size of all buckets. Another bucket size means new buckets beside the old ones for a moment, so
            it is not tried where they are large; nor where all gradients are in one bucket with either size.
    """
    manners = [blocking] if blocking is not None else ([False, True] if overlaps else [True, False])
    sizes = [bucket_mb] if bucket_mb is not None else [DEFAULT.bucket_mb]
    if bucket_mb is None and gradient_bytes <= _LARGE_BYTES:
        sizes += [size for size in (2.0, 32.0) if min(size, DEFAULT.bucket_mb) * 2**20 < gradient_bytes]
    first = Choice(manners[0], sizes[0])
    return [first, *(Choice(m, sizes[0]) for m in manners[1:]), *(Choice(manners[0], s) for s in sizes[1:])]


class Tuner:
    """Goes through candidates and settles on the fastest.

    Args:
        options: the candidates; the first is the default.
    """

    def __init__(self, options: Sequence[Choice]) -> None:
        self._options = list(options)
        self._seconds: list[list[float]] = [[] for _ in options]
        self._recorded = -_WARM_UP
        self._last_step: float | None = None  # when it began
        self.choice = self._options[0]
        """What is to be used now."""
        self.settled = len(self._options) == 1
        """True once all has been tried."""

    def lap(self, now: float) -> float:
        """A step begins at ``now``: return the seconds since the last one did, 0 for the first."""
        seconds = 0.0 if self._last_step is None else now - self._last_step
        self._last_step = now
        return seconds

    def record(self, seconds: float) -> bool:
        """A step with :attr:`choice` took so long on the slowest rank; return True if the choice is another now."""
        if self.settled:
            return False
        before = self.choice
        if self._recorded >= 0:
            trial, step = divmod(self._recorded, _STEPS)
            if step:
                self._seconds[trial % len(self._options)].append(seconds)
        self._recorded += 1
        trial = max(self._recorded, 0) // _STEPS
        if trial < _PASSES * len(self._options):
            self.choice = self._options[trial % len(self._options)]
        else:
            self.settled = True
            self.choice = self._fastest()
        return self.choice != before

    def _fastest(self) -> Choice:
        count = _STEPS - 1  # of times in a turn
        starts = range(0, _PASSES * count, count)
        turns = [[statistics.median(times[k : k + count]) for k in starts] for times in self._seconds]
        ratios = [max(own / default for own, default in zip(times, turns[0], strict=True)) for times in turns]
        best = min(range(len(ratios)), key=ratios.__getitem__)
        return self._options[best if ratios[best] < _WORTH_IT else 0]

    def report(self) -> dict[str, Any]:
        """The choice, and the median seconds of a step with each candidate that has been tried."""
        pairs = zip(self._options, self._seconds, strict=True)
        return {
            **self.choice._asdict(),
            "tuned": self.settled,
            "trials": [{**option._asdict(), "seconds": statistics.median(times)} for option, times in pairs if times],
        }
