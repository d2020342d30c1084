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


def _rounded_changes(optimizer: Any, step: int, batch: int, last: bool) -> float:
    """DASO: every B batches, unless that came with the end of an epoch."""
    skip, end = optimizer.global_skip, optimizer.last_batch
    if skip == 0 or last:
        return 0.5
    return 0.5 * (batch % skip == 0 and (end is None or batch + optimizer.batches_to_wait < end))


def _as_published(optimizer: Any, step: int, batch: int, last: bool) -> float:
    """Heat's DASO: rounded in warm-up and cool-down, and single precision every B batches and at the end of epochs."""
    skip = optimizer.global_skip
    return 0.5 if skip == 0 else 1.0 * (last or batch % skip == 0)


METHODS = {
    EXACT: Method(_exact, _every(1)),
    "LocalSGD": Method(_local(heatopt.LocalSGD, sync_every=8), _every(8), 8),
    "SlowMo": Method(_local(heatopt.SlowMo, sync_every=16, slow_momentum=0.2), _every(16), 16),
    "CO2": Method(_local(heatopt.CO2, sync_every=16, outer_momentum=0.2), _every(16), 16),
    "DiLoCo": Method(_local(heatopt.DiLoCo, sync_every=50), _every(50), 50),
    "Streaming DiLoCo": Method(
        _local(heatopt.DiLoCo, sync_every=50, fragments=4, delay=5, mix="delta"),
        _in_fragments(50, 4, 5),
        50,
    ),
    "DASO": Method(_daso, _rounded_changes, 4),
    HEAT: Method(_heat, _as_published, 4),
}
"""All replicas are nodes: their ranks average gradients in shared memory."""
