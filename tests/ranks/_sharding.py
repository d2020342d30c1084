"""Training with each kind of sharding, and comparisons with none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from heatopt import DataParallelOptimizer, GradScaler
from tests.support import parity
from tests.support.problems import Net
from tests.support.training import SMALL_BUCKET_MB

if TYPE_CHECKING:
    from heatopt.comm import Communicator

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


def assert_alike(
    comm: Communicator,
    make: Callable[[Net], torch.optim.Optimizer],
    run: Callable[[Net, Any, Any], Any],
    tolerance: float = 0.0,
    **options: Any,
) -> None:
    """``run(net, optimizer, losses)`` leaves and returns the same with all of :data:`SHARDS`, and on all ranks."""
    results = []
    for shard in SHARDS:
        net = Net()
        settings = {"comm": comm, "shard": shard, "bucket_mb": SMALL_BUCKET_MB} | options
        optimizer = DataParallelOptimizer(make(net), **settings)
        returned = run(net, optimizer, net.losses(comm.size, comm.rank))
        results.append([parity.snapshot(net, optimizer), returned])
    parity.assert_ranks_equal(comm, results)
    if tolerance:
        assert_close(results, tolerance)
    else:
        assert_same_bits(results)


def train_scaled(net: Net, optimizer: Any, losses: Sequence[Any]) -> float:
    """Train with a GradScaler and one overflow; return its last scale."""
    scaler = GradScaler("cpu", init_scale=16.0)
    for number, loss in enumerate([*losses, *losses]):
        optimizer.zero_grad()
        scaler.scale(loss() * (float("inf") if number == 1 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale()
