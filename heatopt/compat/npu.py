"""torch_npu's fused Adam."""

from __future__ import annotations

from heatopt.optim import FusedAdam as NpuFusedAdam

__all__ = ["NpuFusedAdam"]


def __dir__() -> list[str]:
    return list(__all__)
