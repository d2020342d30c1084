"""Which combinations of values a test is run with, where each of them takes long on several processes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from tests.support.launch import LAUNCH


def combinations(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """One value of each of ``factors``: all combinations on threads, a :func:`diagonal` of them under a launcher.

    Each number of ranks has a diagonal of its own, so that several launches have more combinations than one.
    """
    return diagonal(LAUNCH.size or 1, *factors) if LAUNCH.launched else list(product(*factors))


def diagonal(shift: int, *factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """As few combinations as have each value of each of ``factors``; other combinations for another ``shift``."""
    values = [list(factor) for factor in factors]
    longest = max(map(len, values))
    return [tuple(own[(row + place * shift) % len(own)] for place, own in enumerate(values)) for row in range(longest)]
