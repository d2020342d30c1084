"""What is to be divided, in the words of the partition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heatopt.buckets import BucketPlan, Piece
from heatopt.sharding._declaration import Manner, cost_of, manner_of
from heatopt.sharding._partition import ShardSpec, divide_buckets

__all__ = ["GradientDivision", "shard_specs"]


def shard_specs(optimizer: torch.optim.Optimizer, cuts: bool, whole: frozenset[int] = frozenset()) -> list[ShardSpec]:
    """All parameters of ``optimizer``, to be cut if it ``cuts`` any, but for those with indices in ``whole``."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        ShardSpec(index, p.numel(), p.dtype, p.device, cuts and index not in whole, cost_of(optimizer, p))
        for index, p in enumerate(parameters)
    ]


class GradientDivision:
    """Says who owns which piece of each bucket of gradients; the partition of the states follows it.

    Args:
        optimizer: the wrapped one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def __call__(self, plans: Sequence[BucketPlan], ranks: int) -> list[tuple[tuple[Piece, ...], bool]]:
        cuts = manner_of(self._optimizer) is Manner.ELEMENTWISE
        return divide_buckets(plans, shard_specs(self._optimizer, cuts), ranks)
