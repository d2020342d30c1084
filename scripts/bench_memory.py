#!/usr/bin/env python
"""Memory of a rank while it trains, with each kind of sharding, and with parameters that the ranks have in common.

    python scripts/bench_memory.py --ranks 2 --json out.json

Each kind runs in processes of its own. A column is in multiples of the parameters' size, for the rank that has most:
the optimizer's states and the gradients as tensors between backward and step, and the growth of the process's
proportional set size (PSS, in which memory that ranks share counts once) since before the model, at the same place.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch
from _jobs import Job, serve
from _measuring import setting, write_results
from rich.console import Console
from rich.table import Table
from torch import nn

import heatopt

PLAIN = "no synchronisation"
SHARED = ", shared parameters"
KINDS = (PLAIN, "none", "state", "gradients", f"state{SHARED}", f"gradients{SHARED}")
_STEPS = 3


def proportional_set_size() -> int:
    """Bytes of this process, its part of what it shares with others."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(kilobytes) for kilobytes in re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE))


class Stage:
    """In a rank of one kind."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._comm = heatopt.world()

    def serve(self) -> None:
        """Measure when asked to."""
        serve(self._comm, lambda _command, *arguments: self.measure(*arguments))

    def measure(self, layers: int, width: int, bucket_mb: float) -> dict[str, Any]:
        """Train for a few steps; return what there is between the last backward and its step, in bytes."""
        batch = torch.randn(4, width)
        before = proportional_set_size()
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if self._kind != PLAIN:
            optimizer = heatopt.DataParallelOptimizer(
                optimizer,
                model=model,
                shard=self._kind.removesuffix(SHARED),
                parameters_per_node="shared" if self._kind.endswith(SHARED) else "own",
                bucket_mb=bucket_mb,
            )
        for _ in range(_STEPS):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        self._comm.barrier()
        grown = proportional_set_size() - before
        self._comm.barrier()  # nobody ends while others still look
        states = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        parameters = sum(p.nbytes for p in model.parameters())
        report = {"parameters": parameters, "states": states, "p.grad": gradients, "pss": grown}
        return {**report, "setting": setting(self._comm)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes of each kind (default %(default)s)")
    parser.add_argument("--layers", type=int, default=16, help="Linear layers (default %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="of each (default %(default)s: 4 MiB)")
    parser.add_argument("--bucket-mb", type=float, default=8.0, help="size of a bucket (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        Stage(options.kind).serve()
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        job = Job(options.ranks, Path(__file__), ["--kind", kind])
        try:
            found = job.call("measure", options.layers, options.width, options.bucket_mb)
        finally:
            job.close()
        results[kind] = {key: max(row[key] for row in found) for key in ("parameters", "states", "p.grad", "pss")}
    table = Table(title=f"Bytes of a rank over those of the parameters, AdamW, {options.ranks} ranks")
    for column in ("shard", "states", "p.grad", "PSS"):
        table.add_column(column, justify="left" if column == "shard" else "right")
    for kind, row in results.items():
        table.add_row(kind, *(f"{row[key] / row['parameters']:.3f}" for key in ("states", "p.grad", "pss")))
    Console().print(table)
    if options.json:
        write_results(options.json, found[0]["setting"], results)


if __name__ == "__main__":
    main()
