"""The optimizers, short because their parts are in the layers below."""

from __future__ import annotations

from heatopt.optim._data_parallel import DataParallelOptimizer
from heatopt.optim._grad_scaler import GradScaler
from heatopt.optim._helpers import broadcast_optimizer_state, broadcast_parameters, reduce_metric, sync_buffers

__all__ = [
    "DataParallelOptimizer",
    "GradScaler",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "reduce_metric",
    "sync_buffers",
]
