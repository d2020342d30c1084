"""torch's learning-rate schedulers, under heatopt's name. Each drives a :class:`heatopt.DataParallelOptimizer`."""

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

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
]

# What a newer torch has beside these.
for _name in _torch_lr_scheduler.__all__:
    if _name not in __all__:
        globals()[_name] = getattr(_torch_lr_scheduler, _name)
        __all__ += [_name]
__all__.sort()


def __dir__() -> list[str]:
    return list(__all__)
