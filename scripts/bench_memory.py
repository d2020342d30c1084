#!/usr/bin/env python
"""Memory of a rank while it trains, with each kind of sharding, and with parameters that the ranks have in common.

    python scripts/bench_memory.py --ranks 2 --workload gpt --json out.json

Each kind runs in processes of its own. A column is in multiples of the parameters' size, for the rank that has most:
the optimizer's states and the gradients (averages, and the memory in which they meet) as bytes of tensors between
backward and step, and the growth of the process's proportional set size (PSS, in which memory that ranks share counts
once) since before the model, at the end of a step that has cleared the gradients, and between backward and step.
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
from _workloads import WORKLOADS
from rich.console import Console
from rich.table import Table
from torch import nn

import heatopt

PLAIN = "no synchronisation"
SHARED = ", shared parameters"
KINDS = (PLAIN, "none", "state", "gradients", f"state{SHARED}", f"gradients{SHARED}")
_COLUMNS = {"states": "states", "gradients": "gradients", "resting": "PSS, gradients cleared", "pss": "PSS"}
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

    def measure(self, workload: str, bucket_mb: float) -> dict[str, Any]:
        """Train for a few steps; return what there is between the last backward and its step, in bytes."""
        task = WORKLOADS[workload]
        torch.manual_seed(0)
        _train_once(nn.Linear(8, 8), torch.randn(4, 8))  # what is loaded and allocated once for any model
        batch = task.make_batch(torch.Generator().manual_seed(self._comm.rank))
        before = proportional_set_size()
        model = task.make_model()
        optimizer = task.make_optimizer(list(model.parameters()))
        if self._kind != PLAIN:
            optimizer = heatopt.DataParallelOptimizer(
                optimizer,
                model=model,
                shard=self._kind.removesuffix(SHARED),
                parameters_per_node="shared" if self._kind.endswith(SHARED) else "own",
                bucket_mb=bucket_mb,
                blocking=True,
            )
        for _ in range(_STEPS):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        optimizer.zero_grad()
        resting = self._grown(before)
        task.loss(model, batch).backward()
        grown = self._grown(before)
        states = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        if isinstance(optimizer, heatopt.DataParallelOptimizer):
            gradients = optimizer.report().get("bucket_bytes", gradients)
        parameters = sum(p.nbytes for p in model.parameters())
        report = {"parameters": parameters, "states": states, "gradients": gradients, "resting": resting, "pss": grown}
        return {**report, "setting": setting(self._comm)}

    def _grown(self, before: int) -> int:
        """Growth of the PSS since ``before``, while no rank does anything."""
        self._comm.barrier()
        grown = proportional_set_size() - before
        self._comm.barrier()
        return grown


def _train_once(model: nn.Module, batch: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    model(batch).square().mean().backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes of each kind (default %(default)s)")
    parser.add_argument("--workload", choices=WORKLOADS, default="wide-mlp", help="model (default %(default)s)")
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
            found = job.call("measure", options.workload, options.bucket_mb)
        finally:
            job.close()
        results[kind] = {key: max(row[key] for row in found) for key in ("parameters", *_COLUMNS)}
    table = Table(title=f"Bytes of a rank over those of the parameters, {options.workload}, {options.ranks} ranks")
    for column in ("shard", *_COLUMNS.values()):
        table.add_column(column, justify="left" if column == "shard" else "right")
    for kind, row in results.items():
        table.add_row(kind, *(f"{row[key] / row['parameters']:.3f}" for key in _COLUMNS))
    Console().print(table)
    if options.json:
        write_results(options.json, found[0]["setting"], results)


if __name__ == "__main__":
    main()
