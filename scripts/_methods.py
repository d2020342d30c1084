"""Exact synchronisation and the local-update methods, as the benchmarks compare them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _heat_daso import HeatDaso
from torch import nn

import heatopt
from heatopt.comm import Communicator

__all__ = ["EXACT", "HEAT", "METHODS", "Epochs", "Method"]

EXACT, HEAT = "exact", "Heat's DASO"
_STABILITY = 0.01


@dataclass(frozen=True)
class Epochs:
    """How a run is cut for the methods that have phases."""

    total: int
    warmup: int
    cooldown: int


@dataclass(frozen=True)
class Method:
    """One way to train a model."""

    make: Callable[[torch.optim.Optimizer, nn.Module, Communicator, Epochs], Any]
    share: float
    """Of the parameters' bytes in single precision, what a node sends per update among two nodes."""
    period: int = 1
    """Updates after which its communication repeats."""


def _exact(inner: torch.optim.Optimizer, model: nn.Module, comm: Communicator, _: Epochs) -> Any:
    return heatopt.DataParallelOptimizer(inner, False, model=model, comm=comm)


def _local(cls: Any, **settings: Any) -> Callable[..., Any]:
    def make(inner: torch.optim.Optimizer, model: nn.Module, comm: Communicator, _: Epochs) -> Any:
        return cls(inner, model=model, comm=comm, within="node", **settings)

    return make


def _daso(inner: torch.optim.Optimizer, model: nn.Module, comm: Communicator, epochs: Epochs) -> Any:
    return heatopt.DASO(
        inner,
        epochs.total,
        model=model,
        comm=comm,
        warmup_epochs=epochs.warmup,
        cooldown_epochs=epochs.cooldown,
        stability_level=_STABILITY,
    )


def _heat(inner: torch.optim.Optimizer, model: nn.Module, comm: Communicator, epochs: Epochs) -> Any:
    return HeatDaso(
        inner, epochs.total, comm=comm, warmup=epochs.warmup, cooldown=epochs.cooldown, stability=_STABILITY
    )


METHODS = {
    EXACT: Method(_exact, 1.0),
    "LocalSGD": Method(_local(heatopt.LocalSGD, sync_every=8), 1 / 8, 8),
    "SlowMo": Method(_local(heatopt.SlowMo, sync_every=16, slow_momentum=0.2), 1 / 16, 16),
    "CO2": Method(_local(heatopt.CO2, sync_every=16, outer_momentum=0.2), 1 / 16, 16),
    "DiLoCo": Method(_local(heatopt.DiLoCo, sync_every=50), 1 / 50, 50),
    "Streaming DiLoCo": Method(_local(heatopt.DiLoCo, sync_every=50, fragments=4, delay=5, mix="delta"), 1 / 50, 50),
    # B = 4, and what travels is rounded to bfloat16.
    "DASO": Method(_daso, 1 / 8, 4),
    HEAT: Method(_heat, 1 / 4, 4),
}
"""All replicas are nodes: their ranks average gradients in shared memory. Shares of the phases with B = 4."""
