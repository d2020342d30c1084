"""Batches of unequal numbers of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import heatopt
from tests.ranks._training import Batch, batch, loss_of

SHARDS = ["none", "state", "gradients"]
COUNTS = (5, 2, 0, 3)
"""Samples of each rank; with three ranks 5, 2 and 0."""


def rows_of(step: int, rank: int) -> int:
    """Samples of a rank at a step: the counts go round, so that each rank has none at some step."""
    return COUNTS[(rank + step) % len(COUNTS)] if step else COUNTS[rank]


def own(step: int, rank: int) -> Batch:
    return batch(step, rank, rows_of(step, rank))


def together(batches: Sequence[Batch]) -> Batch:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def whole(step: int, size: int) -> Batch:
    return together([own(step, rank) for rank in range(size)])


def weighted_backward(optimizer: heatopt.DataParallelOptimizer, model: nn.Module, data: Batch) -> None:
    """Backward of the batch's loss, with the number of its rows as its weight."""
    with optimizer.weight(len(data[0])):
        loss_of(model, data).backward()
