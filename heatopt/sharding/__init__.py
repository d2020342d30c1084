"""Who owns which piece of the optimizer state, and how the pieces become whole again."""

from __future__ import annotations

from heatopt.sharding._declaration import check_shardable
from heatopt.sharding._division import GradientDivision
from heatopt.sharding._gather import Part
from heatopt.sharding._inner_step import HookedStep
from heatopt.sharding._sharded import ShardedStates
from heatopt.sharding._states import States, Wanted, WholeStates
from heatopt.sharding._whole_problem import sharded_states

__all__ = [
    "GradientDivision",
    "HookedStep",
    "Part",
    "ShardedStates",
    "States",
    "Wanted",
    "WholeStates",
    "check_shardable",
    "sharded_states",
]
