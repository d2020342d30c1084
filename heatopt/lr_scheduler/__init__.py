"""torch's learning-rate schedulers, and schedules in closed form for any option of a parameter group.

Each scheduler drives a :class:`heatopt.DataParallelOptimizer` as it drives any optimizer.
"""

from __future__ import annotations

import torch.optim.lr_scheduler as _torch_lr_scheduler
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from heatopt.lr_scheduler._factories import goyal_lr, megatron_lr, megatron_weight_decay
from heatopt.lr_scheduler._formulas import ExponentialDecay, LinearScaling, Milestones, Ramp, WarmupDecay
from heatopt.lr_scheduler._param_scheduler import ParamScheduler
from heatopt.lr_scheduler._schedule import Constant, Rounded, Scaled, Schedule

__all__ = [
    "ChainedScheduler",
    "Constant",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialDecay",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "LinearScaling",
    "Milestones",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "ParamScheduler",
    "PolynomialLR",
    "Ramp",
    "ReduceLROnPlateau",
    "Rounded",
    "Scaled",
    "Schedule",
    "SequentialLR",
    "StepLR",
    "WarmupDecay",
    "goyal_lr",
    "megatron_lr",
    "megatron_weight_decay",
]

# What a newer torch has beside these.
for _name in _torch_lr_scheduler.__all__:
    if _name not in __all__:
        globals()[_name] = getattr(_torch_lr_scheduler, _name)
        __all__ += [_name]
__all__.sort()


def __dir__() -> list[str]:
    return list(__all__)
