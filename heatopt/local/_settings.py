"""The choices of a user that the local-update engine needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LocalSettings"]

_NOT_COMPARED = ("periods", "timeout")


@dataclass(frozen=True)
class LocalSettings:
    """Settings of one optimizer's local updates; all but ``timeout`` must be equal on all ranks."""

    method: str
    """Name of the method."""
    algorithm: str
    """Class name of the torch optimizer."""
    periods: Any
    """What the method's schedule is made from, a frozen dataclass."""
    fragments: int = 1
    """Number of parts of the model that are averaged in turn."""
    merge: str = "mix"
    """How a delayed average meets what was done since: "mix", "delta" or "daso"; "restart": all of
    that has been sent, and parameters begin each period at the anchor, whether an average has come or not."""
    share: float = 0.0
    """With "mix": the share of the local parameters."""
    wire_dtype: torch.dtype | None = None
    """What differences are rounded to on the network."""
    error_feedback: bool = False
    """Add what rounding kept back to the next difference."""
    chunk: int = 2**62
    """Most elements of one message."""
    within: str = "rank"
    """What a replica is: "rank", "node" or "group"."""
    shard: str = "none"
    """What each rank of a replica keeps only a part of."""
    timeout: float | None = None
    """Seconds; None: the communicator's."""

    @property
    def overlaps(self) -> bool:
        """What is sent may be on its way together with what was sent before."""
        return self.merge in ("daso", "restart")

    def printable(self) -> tuple[tuple[str, str], ...]:
        """What all ranks must agree on."""
        own = [(f.name, repr(getattr(self, f.name))) for f in dataclasses.fields(self) if f.name not in _NOT_COMPARED]
        named = dict(own)
        periods = {f.name: repr(getattr(self.periods, f.name)) for f in dataclasses.fields(self.periods)}
        return tuple((named | periods).items())
