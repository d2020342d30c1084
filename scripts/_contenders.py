"""The ways to make a training step that the step benchmark compares."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _measuring import open_gloo
from _workloads import Workload
from torch import nn

import heatopt
from heatopt.comm import Communicator

__all__ = ["CONTENDERS", "DDP", "FLOOR", "MEETING", "Contender"]

FLOOR, MEETING, DDP = "no synchronisation", "meeting only", "DDP gloo"
# FSDP2 gathers and reduces layers of at least this size by themselves, and the smaller ones together.
_FSDP_UNIT_BYTES = 2**20


class Contender:
    """One way to make a step: a model of its own and what steps it."""

    def __init__(self, model: nn.Module, forward: nn.Module, optimizer: Any) -> None:
        self.model = model
        self.forward = forward
        self.optimizer = optimizer

    def step(self, workload: Workload, batch: torch.Tensor) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        workload.loss(self.forward, batch).backward()
        self.optimizer.step()

    def digest(self) -> str:
        """What the parameters are, bit for bit."""
        parameters: list[Any] = [p.detach() for p in self.model.parameters()]
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
        return hashlib.sha256(b"".join(p.contiguous().numpy().tobytes() for p in whole)).hexdigest()[:12]


class _MeetingContender(Contender):
    """Ranks wait for each other in every step, and exchange nothing: no synchronous method can be faster."""

    def __init__(self, model: nn.Module, optimizer: Any, comm: Communicator) -> None:
        super().__init__(model, model, optimizer)
        self._comm = comm

    def step(self, workload: Workload, batch: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        workload.loss(self.forward, batch).backward()
        self._comm.barrier()
        self.optimizer.step()


class _EngineContender(Contender):
    """DeepSpeed's engine makes the whole step."""

    def step(self, workload: Workload, batch: torch.Tensor) -> None:
        self.forward.backward(workload.loss(self.forward, batch))
        self.forward.step()


def _plain(comm: Communicator, workload: Workload, model: nn.Module) -> Contender:
    return Contender(model, model, workload.make_optimizer(list(model.parameters())))


def _meeting(comm: Communicator, workload: Workload, model: nn.Module) -> Contender:
    return _MeetingContender(model, workload.make_optimizer(list(model.parameters())), comm)


def _heatopt(comm: Communicator, workload: Workload, model: nn.Module, **options: Any) -> Contender:
    inner = workload.make_optimizer(list(model.parameters()))
    return Contender(model, model, heatopt.DataParallelOptimizer(inner, model=model, **options))


def _ddp(comm: Communicator, workload: Workload, model: nn.Module) -> Contender:
    open_gloo(comm)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Contender(model, wrapped, workload.make_optimizer(list(model.parameters())))


def _zero_redundancy(comm: Communicator, workload: Workload, model: nn.Module) -> Contender:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    open_gloo(comm)
    inner = workload.make_optimizer(list(model.parameters()))
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    accepted = inspect.signature(type(inner)).parameters
    options = {key: value for key, value in inner.defaults.items() if key in accepted}
    return Contender(model, wrapped, ZeroRedundancyOptimizer(model.parameters(), type(inner), **options))


def _fsdp(comm: Communicator, workload: Workload, model: nn.Module) -> Contender:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    open_gloo(comm)
    mesh = init_device_mesh("cpu", (comm.size,))
    for child in model.children():
        if sum(p.nbytes for p in child.parameters()) >= _FSDP_UNIT_BYTES:
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Contender(model, model, workload.make_optimizer(list(model.parameters())))


def _heat(comm: Communicator, workload: Workload, model: nn.Module) -> Contender:
    import heat  # type: ignore[import-not-found]

    initial = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = heat.optim.DataParallelOptimizer(workload.make_optimizer(list(model.parameters())), blocking=True)
    wrapped = heat.nn.DataParallel(model, heat.MPI_WORLD, optimizer, blocking_parameter_updates=True)
    model.load_state_dict(initial)  # it has drawn new ones, with a seed of its own
    return Contender(model, wrapped, optimizer)


def _horovod(comm: Communicator, workload: Workload, model: nn.Module) -> Contender:
    import horovod.torch as hvd  # type: ignore[import-not-found]

    hvd.init()
    inner = workload.make_optimizer(list(model.parameters()))
    return Contender(model, model, hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters()))


def _deepspeed(comm: Communicator, workload: Workload, model: nn.Module) -> Contender:
    import deepspeed  # type: ignore[import-not-found]

    open_gloo(comm)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = workload.make_optimizer(list(model.parameters()))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return _EngineContender(model, engine, engine)


CONTENDERS: dict[str, Callable[[Communicator, Workload, nn.Module], Contender]] = {
    FLOOR: _plain,
    MEETING: _meeting,
    "heatopt": _heatopt,
    "heatopt fuse=True": partial(_heatopt, fuse=True),
    'heatopt shard="state"': partial(_heatopt, shard="state"),
    'heatopt shard="gradients"': partial(_heatopt, shard="gradients"),
    'heatopt shard="state", shared parameters': partial(_heatopt, shard="state", parameters_per_node="shared"),
    DDP: _ddp,
    "DDP + ZeroRedundancy": _zero_redundancy,
    "FSDP2 gloo": _fsdp,
    "Heat blocking": _heat,
    "Horovod": _horovod,
    "DeepSpeed ZeRO-1": _deepspeed,
}
"""The functions raise ImportError where a package is not installed."""
