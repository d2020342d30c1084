#!/usr/bin/env python
"""Time what is planned before the first step: 10,000 parameters, and one parameter of 1 GiB.

    mpirun -n 2 python scripts/bench_plan.py --json plan.json

*plan* is the pure part: which gradient lives in which bucket, and which rank owns which piece of which state.
*construction* is all of ``DataParallelOptimizer(...)``: hooks, comparison of the ranks' plans, memory for the buckets,
rank 0's values on all ranks. *partition* is what the first step takes longer than the third one: it makes the pieces,
and torch its states. Seconds of the slowest rank, the smallest of some repetitions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _measuring import write_json
from rich.console import Console
from rich.table import Table
from torch import nn

import heatopt
from heatopt.buckets import ParameterSpec, plan_buckets
from heatopt.comm import Communicator
from heatopt.sharding._division import shard_specs
from heatopt.sharding._partition import divide_buckets, plan_shards

MODELS: dict[str, Callable[[], list[nn.Parameter]]] = {
    "10,000 parameters of 100 elements": lambda: [nn.Parameter(torch.zeros(10, 10)) for _ in range(10_000)],
    "one parameter of 1 GiB": lambda: [nn.Parameter(torch.zeros(2**14, 2**14))],
}


def plan(parameters: list[nn.Parameter], ranks: int) -> None:
    """Make the plans of gradients and states."""
    cpu = torch.device("cpu")
    specs = [ParameterSpec(i, str(i), tuple(p.shape), p.dtype, cpu) for i, p in enumerate(parameters)]
    shards = shard_specs(torch.optim.SGD(parameters), cuts=True)
    divide_buckets(plan_buckets(specs, 8 * 2**20), shards, ranks)
    plan_shards(shards, ranks)


def measure(comm: Communicator, parameters: list[nn.Parameter], shard: str) -> dict[str, float]:
    """Seconds of this rank."""
    seconds = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        comm.barrier()
        start = time.perf_counter()
        action()
        seconds[name] = time.perf_counter() - start

    timed("plan", lambda: plan(parameters, comm.size))
    made: list[heatopt.DataParallelOptimizer] = []
    plain = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True)
    timed(
        "construction",
        lambda: made.append(heatopt.DataParallelOptimizer(plain, comm=comm, shard=shard, blocking=True, bucket_mb=8)),
    )
    for number in range(3):
        made[0].zero_grad()
        torch.autograd.backward(parameters, [torch.zeros_like(p) for p in parameters])
        timed(f"step {number}", made[0].step)
    seconds["partition"] = max(seconds.pop("step 0") - seconds.pop("step 2"), 0.0)
    del seconds["step 1"]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3, help="of which the fastest counts (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if options.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    comm = heatopt.world()
    table = Table("parameters", "shard", title=f"Seconds before the first step, {comm.size} ranks")
    results = []
    for name, make in MODELS.items():
        for shard in ("none", "state", "gradients"):
            runs = [measure(comm, make(), shard) for _ in range(options.repetitions)]
            slowest = {
                part: min(max(found) for found in zip(*comm.all_gather_object([r[part] for r in runs]), strict=True))
                for part in runs[0]
            }
            results.append({"parameters": name, "shard": shard, "seconds": slowest})
            if len(results) == 1:
                for part in slowest:
                    table.add_column(part, justify="right")
            table.add_row(name, shard, *(f"{value:.3f}" for value in slowest.values()))
    if comm.rank == 0:
        Console(width=100).print(table)
    write_json(options.json, comm, results)


if __name__ == "__main__":
    main()
