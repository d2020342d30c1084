"""Training with each kind of sharding, and comparisons with none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.support import parity

SHARDS = ("none", "state", "gradients")
"""All values of ``shard``, the one that the others are compared with first."""


def shards_of(algorithm: str) -> tuple[str, ...]:
    """The values that an algorithm can be trained with."""
    return SHARDS[:2] if algorithm == "LBFGS" else SHARDS


def assert_same_bits(results: Sequence[Any]) -> None:
    """The results of all of :data:`SHARDS` are those of the first, to the last bit."""
    for shard, result in zip(SHARDS, results, strict=True):
        parity.assert_same_bits(result, results[0], f"shard={shard!r}")


def assert_close(results: Sequence[Any], tolerance: float) -> None:
    """The results of all of :data:`SHARDS` are those of the first, nearly."""
    for shard, result in zip(SHARDS, results, strict=True):
        parity.assert_close(result, results[0], tolerance, f"shard={shard!r}")
