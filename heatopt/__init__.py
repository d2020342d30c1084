"""Data-parallel training with any PyTorch optimizer: MPI, NCCL and gloo, from a laptop to a cluster, in one line.

>>> optimizer = heatopt.DataParallelOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4), model=model)

Beside its own names the package has every public name of :mod:`torch.optim`, the very objects.
"""

from __future__ import annotations

import torch.optim as _torch_optim
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
    swa_utils,
)

from heatopt import comm, compat, errors, lr_scheduler
from heatopt._version import __version__
from heatopt.checkpoint import ResumableSampler, load, save
from heatopt.comm import Communicator, world
from heatopt.errors import (
    CheckpointError,
    CollectiveTimeoutError,
    HeatoptError,
    NoCheckpointError,
    RankFailedError,
    RankMismatchError,
)
from heatopt.optim import (
    CO2,
    DASO,
    DataParallelOptimizer,
    DetectMetricPlateau,
    DiLoCo,
    FusedAdam,
    GradScaler,
    LocalSGD,
    SlowMo,
    broadcast_optimizer_state,
    broadcast_parameters,
    reduce_metric,
    sync_buffers,
)
from heatopt.sync import Compression, Threshold, TopK

__all__ = [
    "ASGD",
    "CO2",
    "DASO",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "CheckpointError",
    "CollectiveTimeoutError",
    "Communicator",
    "Compression",
    "DataParallelOptimizer",
    "DetectMetricPlateau",
    "DiLoCo",
    "FusedAdam",
    "GradScaler",
    "HeatoptError",
    "LocalSGD",
    "Muon",
    "NAdam",
    "NoCheckpointError",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "RankFailedError",
    "RankMismatchError",
    "ResumableSampler",
    "Rprop",
    "SlowMo",
    "SparseAdam",
    "Threshold",
    "TopK",
    "__version__",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "comm",
    "compat",
    "errors",
    "load",
    "lr_scheduler",
    "reduce_metric",
    "save",
    "swa_utils",
    "sync_buffers",
    "world",
]

# What a newer torch has beside these; `lr_scheduler` is heatopt's own.
for _name in _torch_optim.__all__:
    if _name not in __all__:
        globals()[_name] = getattr(_torch_optim, _name)
        __all__ += [_name]
__all__.sort()


def __dir__() -> list[str]:
    return sorted(__all__)
