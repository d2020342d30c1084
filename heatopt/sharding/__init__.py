"""Who owns which piece of the optimizer state, and how the pieces become whole again."""

from __future__ import annotations

from heatopt.sharding._declaration import check_shardable, check_takes_masters
from heatopt.sharding._division import GradientDivision
from heatopt.sharding._gather import Part
from heatopt.sharding._inner_step import HookedStep
from heatopt.sharding._master_states import MASTERS, MasterStates
from heatopt.sharding._masters import MASTER, Masters
from heatopt.sharding._member_update import MemberStepper
from heatopt.sharding._node_parameters import NodeParameters
from heatopt.sharding._parameter_memory import OwnParameters, ParameterMemory
from heatopt.sharding._residual_states import RESIDUALS, ResidualStates
from heatopt.sharding._sharded import ShardedStates
from heatopt.sharding._states import Carried, States, Wanted, WholeStates, uncast
from heatopt.sharding._whole_problem import sharded_states

__all__ = [
    "MASTER",
    "MASTERS",
    "RESIDUALS",
    "Carried",
    "GradientDivision",
    "HookedStep",
    "MasterStates",
    "Masters",
    "MemberStepper",
    "NodeParameters",
    "OwnParameters",
    "ParameterMemory",
    "Part",
    "ResidualStates",
    "ShardedStates",
    "States",
    "Wanted",
    "WholeStates",
    "check_shardable",
    "check_takes_masters",
    "sharded_states",
    "uncast",
]
