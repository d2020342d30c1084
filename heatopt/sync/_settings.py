"""The choices of a user that the synchronisation needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from heatopt.comm import ReduceOptions
from heatopt.sync._compression import Compression

__all__ = ["SyncSettings"]


@dataclass(frozen=True)
class SyncSettings:
    """Settings of one optimizer's synchronisation; all but ``timeout`` must be equal on all ranks."""

    algorithm: str
    """Class name of the torch optimizer."""
    bucket_mb: float | None
    """Size of a bucket in MiB; None: to be found out."""
    accumulation_steps: int
    """Only every so many-th backward synchronises."""
    blocking: bool | None
    """Reduce a bucket before backward goes on; None: to be found out."""
    timeout: float | None
    """Seconds; None: the communicator's."""
    wire_dtype: torch.dtype | None = None
    """What gradients are rounded to on the network."""
    reproducible: bool = False
    """Sum in rank order across nodes too."""
    sparse: tuple[int, ...] = ()
    """Indices of the parameters known to get sparse gradients."""
    fuse: bool = False
    """Update many parameters as one: the results' last bits may depend on it."""
    shard: str = "none"
    """What each rank keeps only a part of."""
    parameters_per_node: str = "own"
    """Whether each rank has parameters of its own, or those of a node have them in common: "own" or "shared"."""
    master_dtype: torch.dtype | None = None
    """Of the wider copies that updates of narrow parameters change; None: there are none."""
    compression: Compression | None = None
    """Which elements of gradients travel; None: all."""

    def reduction(self, blocking: bool, divisor: float) -> ReduceOptions:
        """How a bucket is reduced."""
        return ReduceOptions(divisor, blocking, self.wire_dtype, self.reproducible)

    def printable(self) -> tuple[tuple[str, str], ...]:
        """What all ranks must agree on."""
        return (
            ("algorithm", self.algorithm),
            ("bucket_mb", repr(self.bucket_mb)),
            ("accumulation_steps", repr(self.accumulation_steps)),
            ("blocking", repr(self.blocking)),
            ("wire_dtype", repr(self.wire_dtype)),
            ("reproducible", repr(self.reproducible)),
            ("fuse", repr(self.fuse)),
            ("shard", repr(self.shard)),
            ("parameters_per_node", repr(self.parameters_per_node)),
            ("master_dtype", repr(self.master_dtype)),
            ("compression", repr(self.compression)),
        )
