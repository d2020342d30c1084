"""Hetu's optimizers as the tests make them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from heatopt.compat import hetu
from tests.ranks._training import TINY, loss_of, whole

if TYPE_CHECKING:
    from heatopt.comm import Communicator

RATE = {"init_lr": 0.001, "max_lr": 0.02, "min_lr": 0.002, "lr_warmup_steps": 2, "lr_decay_steps": 5}
DECAY = {"start_wd": 0.01, "end_wd": 0.1, "wd_incr_steps": 4, "wd_incr_style": "cosine"}
ADAM = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3}
CONSTANT = {
    "init_lr": 0.1,
    "max_lr": 0.1,
    "min_lr": 0.1,
    "lr_warmup_steps": 0,
    "lr_decay_steps": 9,
    "lr_decay_style": "constant",
}


def adam(comm: Communicator, style: str = "cosine", **options: Any) -> hetu.AdamOptimizer:
    arguments: dict[str, Any] = {**RATE, "lr_decay_style": style, **DECAY, **ADAM, "comm": comm, "bucket_mb": TINY}
    return hetu.AdamOptimizer(**arguments | options)


def sgd(comm: Communicator, **options: Any) -> hetu.SGDOptimizer:
    return hetu.SGDOptimizer(**{**CONSTANT, "comm": comm, "bucket_mb": TINY, **options})  # type: ignore[arg-type]


def gradient_of(model: nn.Module, step: int, size: int) -> list[torch.Tensor]:
    """Of the whole batch, in one process."""
    return list(torch.autograd.grad(loss_of(model, whole(step, size)), list(model.parameters())))
