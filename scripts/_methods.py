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
    share: Callable[[Any, int, int, bool], float]
    """What a node sends among two nodes, in units of the parameters' bytes in single precision, because of an update:
    a function of the optimizer, the numbers of the update (from 1) and of the batch in its epoch (from 0), and whether
    that is the last one."""
    period: int = 1
    """Updates after which its communication repeats."""


def _exact(inner: torch.optim.Optimizer, model: nn.Module, comm: Communicator, _: Epochs) -> Any:
    return heatopt.DataParallelOptimizer(inner, model=model, comm=comm)


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


def _every(period: int, share: float = 1.0) -> Callable[[Any, int, int, bool], float]:
    return lambda _, step, batch, last: share if step % period == 0 else 0.0


def _in_fragments(period: int, fragments: int, delay: int) -> Callable[[Any, int, int, bool], float]:
    places = {(number + 1) * period // fragments for number in range(fragments)}
    return lambda _, step, batch, last: (
        sum((step - delay - place) % period == 0 for place in places if step > delay) / fragments
    )


def _in_phases(cycling: float) -> Callable[[Any, int, int, bool], float]:
    """DASO: ``cycling`` of the bytes every B batches, all of them at the end of an epoch."""

    def share(optimizer: Any, step: int, batch: int, last: bool) -> float:
        skip = optimizer.global_skip
        if skip == 0:
            return 0.5
        return 1.0 if last else cycling * (batch % skip == 0)

    return share


METHODS = {
    EXACT: Method(_exact, _every(1)),
    "LocalSGD": Method(_local(heatopt.LocalSGD, sync_every=8), _every(8), 8),
    "SlowMo": Method(_local(heatopt.SlowMo, sync_every=16, slow_momentum=0.2), _every(16), 16),
    "CO2": Method(_local(heatopt.CO2, sync_every=16, outer_momentum=0.2), _every(16), 16),
    "DiLoCo": Method(_local(heatopt.DiLoCo, sync_every=50, outer_momentum=0.5), _every(50), 50),
    "Streaming DiLoCo": Method(
        _local(heatopt.DiLoCo, sync_every=50, outer_momentum=0.5, fragments=4, delay=5, mix="delta"),
        _in_fragments(50, 4, 5),
        50,
    ),
    "DASO": Method(_daso, _in_phases(0.5), 4),
    HEAT: Method(_heat, _in_phases(1.0), 4),
}
"""All replicas are nodes: their ranks average gradients in shared memory."""
