"""How much each rank counts in an average, by the samples that it has seen since the one before.

[Note: Samples]
Where users give the numbers of samples, an average is that of federated averaging (McMahan et al., AISTATS 2017, arXiv
1602.05629, algorithm 1): x = sum_r (n_r / n) x_r, with n_r the samples behind the updates that rank r has made since
what is averaged was averaged before. They are counted for each fragment, and once more for averages within a replica
whose ranks train alone. The number is one word of the header that precedes an average (see [Note: Headers]), so all
ranks know all of them before they send, and it belongs to what is sent, whenever that is merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from heatopt.errors import RankMismatchError
from heatopt.sync import NO_WEIGHT

__all__ = ["PLAIN", "Samples", "shares_of"]

PLAIN = -2.0
"""In place of a number: updates have been made, none of which had one."""
_BOTH = -3.0  # in place of a number: some updates had one, others had not


class Samples:
    """What one rank has seen since each of several averages.

    Args:
        count: number of averages.
    """

    def __init__(self, count: int) -> None:
        self.words = [NO_WEIGHT] * count
        """For each average a number of samples, at least 0, or what stands in its place."""

    def note(self, word: float) -> None:
        """An update has been made, with the gradients of so many samples; or ``PLAIN``, or ``NO_WEIGHT``: by none."""
        self.words = [_joined(before, word) for before in self.words]

    def take(self, place: int) -> float:
        """The word of one average, which begins now."""
        word, self.words[place] = self.words[place], NO_WEIGHT
        return word


def _joined(before: float, word: float) -> float:
    if NO_WEIGHT in (before, word):
        return word if before == NO_WEIGHT else before
    if before >= 0 and word >= 0:
        return before + word
    return before if before == word else _BOTH


def shares_of(words: Sequence[float], idle: Sequence[float]) -> tuple[float, ...] | None:
    """How much each rank counts in a mean, on average 1; None: all alike.

    Args:
        words: of :class:`Samples`, by rank. If nobody has seen samples, ranks count alike.
        idle: by rank; without samples those with 1 count for nothing, unless all have it.

    Raises:
        RankMismatchError: some updates have had a number of samples, others not.
    """
    for rank, word in enumerate(words):
        if word == _BOTH or (word == PLAIN and any(other >= 0 for other in words)):
            odd = "some updates with a weight and others without" if word == _BOTH else "updates without a weight"
            raise RankMismatchError(
                f"rank {rank} has made {odd} since the last average; use `with optimizer.weight(n):`, or "
                "step(weight=n), for all updates of all ranks or for none (n = 0 where there are no samples)"
            )
    weights = [max(word, 0.0) for word in words]
    if not any(weights):
        weights = [float(payload < 1) for payload in idle]
    if min(weights) == max(weights):
        return None
    total = math.fsum(weights)
    return tuple(weight * len(weights) / total for weight in weights)
