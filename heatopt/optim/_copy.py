"""Copies of optimizers: what travels, and what belongs to the process."""

from __future__ import annotations

from typing import Any

import torch

from heatopt.sharding import MASTER

__all__ = ["optimizer_contents", "optimizer_from_contents"]

# Hooks belong to the objects that registered them, and a scheduler's replacement of `step` to that scheduler.
_NOT_COPIED = ("step", "_zero_grad_profile_name")


def optimizer_contents(
    optimizer: torch.optim.Optimizer,
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and attributes of ``optimizer``; more than its own pickling keeps, which loses LBFGS's parameter list."""
    kept = {
        key: value
        for key, value in optimizer.__dict__.items()
        if key not in _NOT_COPIED and not key.startswith("_optimizer_")
    }
    return type(optimizer), kept


def optimizer_from_contents(kind: type[torch.optim.Optimizer], contents: dict[str, Any]) -> torch.optim.Optimizer:
    """The inverse of :func:`optimizer_contents`."""
    optimizer = kind.__new__(kind)
    # torch looks for its own numbers in every state that is not empty: one may have a master alone, set before a step.
    states = [entries for entries in contents["state"].values() if isinstance(entries, dict)]
    masters = [(entries, entries.pop(MASTER)) for entries in states if MASTER in entries]
    optimizer.__setstate__(contents)
    for entries, master in masters:
        entries[MASTER] = master
    return optimizer
