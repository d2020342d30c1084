"""What a data-parallel optimizer consists of, as its settings and the number of ranks ask for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from heatopt.comm import Communicator
from heatopt.optim._flat import FlatStepper
from heatopt.sharding import (
    Carried,
    GradientDivision,
    Masters,
    MasterStates,
    MemberStepper,
    NodeParameters,
    OwnParameters,
    ParameterMemory,
    ResidualStates,
    States,
    WholeStates,
    sharded_states,
)
from heatopt.sync import Gradients, GradientShards, GradientSync, LocalGradients, Residuals, SyncSettings

__all__ = ["Parts", "assemble"]


class Parts(NamedTuple):
    """The parts of one optimizer."""

    gradients: Gradients
    shards: GradientShards
    """What this rank keeps of the gradients; nothing where they are not sharded."""
    residuals: Residuals
    """What this rank has not sent of the gradients; nothing where they are not compressed."""
    states: States
    stepper: Any
    """Its ``step`` makes the update."""
    memory: ParameterMemory
    """Where the parameters live."""


def assemble(
    optimizer: torch.optim.Optimizer,
    comm: Communicator,
    names: dict[int, str],
    settings: SyncSettings,
    carried: Carried,
) -> Parts:
    """Make the parts for ``optimizer``, the wrapped one.

    Args:
        optimizer: the wrapped one.
        comm: the ranks.
        names: name of parameters by ``id``, for messages.
        settings: what the user chose.
        carried: what it has, as a copy, from another one.

    Raises:
        HeatoptError: what a copy has brought belongs to another rank.
    """
    layout = carried.layout
    if layout is not None:
        layout.check(comm)
    masters = Masters(settings.master_dtype) if settings.master_dtype is not None else None
    if comm.size == 1:
        gradients = LocalGradients(lambda: optimizer.param_groups)
        memory: ParameterMemory = OwnParameters(lambda: comm)
        return Parts(gradients, GradientShards(), Residuals(comm), *_unsharded(optimizer, settings, masters), memory)
    divides = settings.shard == "gradients"
    shards = (
        GradientShards(GradientDivision(optimizer), _in_flight(optimizer, comm, settings))
        if divides
        else GradientShards()
    )
    residuals = Residuals(comm, carried.unsent)
    residuals.roll_back_cleared([p for group in optimizer.param_groups for p in group["params"]])
    # The callback must not hold the wrapper, which is to die with its last user.
    sync = GradientSync(comm, lambda: optimizer.param_groups, names, settings, shards, residuals)
    if settings.shard == "none":
        memory = OwnParameters(sync.channel)
        states, stepper = _unsharded(optimizer, settings, masters)
    else:
        # With one rank on each node each has its own in any case.
        shares = settings.parameters_per_node == "shared" and comm.size > comm.num_nodes
        memory = NodeParameters(sync.channel, names) if shares else OwnParameters(sync.channel)
        hold_whole = sync.hold_whole if divides else None
        meet = sync.meet_for_states
        stepper = sharded_states(optimizer, memory, sync.channel, meet, layout, shards, hold_whole, masters)
        states = _with_masters(optimizer, stepper, masters)
    if settings.compression is not None:
        states = ResidualStates(optimizer, states, residuals, sync.compressed)
    return Parts(sync, shards, residuals, states, stepper, memory)


def _in_flight(optimizer: torch.optim.Optimizer, comm: Communicator, settings: SyncSettings) -> int:
    """How many buckets of sharded gradients have memory: a second one pays where something travels meanwhile."""
    on_cpu = all(p.is_cpu for group in optimizer.param_groups for p in group["params"])
    together = settings.blocking is None and comm.num_nodes == 1 and on_cpu
    return 1 if settings.blocking or together else 2


def _unsharded(optimizer: torch.optim.Optimizer, settings: SyncSettings, masters: Masters | None) -> tuple[States, Any]:
    """States, and what makes the update, of a rank that has everything."""
    stepper: Any = FlatStepper(optimizer) if settings.fuse else optimizer
    if masters is not None:
        stepper = MemberStepper(optimizer, masters)
    return _with_masters(optimizer, WholeStates(optimizer), masters), stepper


def _with_masters(optimizer: torch.optim.Optimizer, states: States, masters: Masters | None) -> States:
    return states if masters is None else MasterStates(optimizer, states, masters)
