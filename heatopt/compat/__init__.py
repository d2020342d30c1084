"""Optimizers by the names and arguments that other systems have for them: Hetu, SINGA, torch_npu.

Each is a :class:`heatopt.DataParallelOptimizer` with schedules of :mod:`heatopt.lr_scheduler`, and no other engine.
"""

from __future__ import annotations

from heatopt.compat import hetu, npu, singa

__all__ = ["hetu", "npu", "singa"]


def __dir__() -> list[str]:
    return list(__all__)
