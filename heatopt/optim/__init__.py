"""The optimizers, short because their parts are in the layers below."""

from __future__ import annotations

from heatopt.local import DetectMetricPlateau
from heatopt.optim._daso import DASO
from heatopt.optim._data_parallel import DataParallelOptimizer
from heatopt.optim._fused_adam import FusedAdam
from heatopt.optim._grad_scaler import GradScaler
from heatopt.optim._helpers import broadcast_optimizer_state, broadcast_parameters, reduce_metric, sync_buffers
from heatopt.optim._local_methods import CO2, DiLoCo, LocalSGD, SlowMo

__all__ = [
    "CO2",
    "DASO",
    "DataParallelOptimizer",
    "DetectMetricPlateau",
    "DiLoCo",
    "FusedAdam",
    "GradScaler",
    "LocalSGD",
    "SlowMo",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "reduce_metric",
    "sync_buffers",
]
