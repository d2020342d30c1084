#!/usr/bin/env python
"""Time a training step of heatopt against the same step without synchronisation and against other packages.

    mpirun -n 2 python scripts/bench_step.py --json out.json

All contenders run interleaved in the same processes, with the same initial weights, data and inner optimizer; a ratio
is the median of the ratios within each round, so that a machine that slows down slows all of them. The parameters of
the exact synchronous contenders are compared bit for bit at the end.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from _workloads import WORKLOADS, Workload
from rich.console import Console
from rich.table import Table
from torch import nn

import heatopt

FLOOR = "no synchronisation"


class Contender:
    """One way to make a step: a model of its own and what steps it."""

    def __init__(self, model: nn.Module, forward: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.forward = forward
        self.optimizer = optimizer

    def step(self, workload: Workload, batch: torch.Tensor) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        workload.loss(self.forward, batch).backward()
        self.optimizer.step()

    def warm_up(self, workload: Workload, batch: torch.Tensor, steps: int) -> None:
        """Steps until nothing changes any more; what heatopt tries out in its first steps is over then."""
        for _ in range(steps):
            self.step(workload, batch)

    def checksum(self) -> float:
        """Sum of all parameters, in double precision."""
        return sum(p.detach().double().sum().item() for p in self.model.parameters())


def plain(workload: Workload, model: nn.Module) -> Contender:
    return Contender(model, model, workload.make_optimizer(list(model.parameters())))


def with_heatopt(workload: Workload, model: nn.Module) -> Contender:
    optimizer = heatopt.DataParallelOptimizer(workload.make_optimizer(list(model.parameters())), model=model)
    return Contender(model, model, optimizer)


def with_ddp(workload: Workload, model: nn.Module) -> Contender:
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Contender(model, wrapped, workload.make_optimizer(list(model.parameters())))


def with_zero_redundancy(workload: Workload, model: nn.Module) -> Contender:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    inner = workload.make_optimizer(list(model.parameters()))
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    accepted = inspect.signature(type(inner)).parameters
    options = {key: value for key, value in inner.defaults.items() if key in accepted}
    return Contender(model, wrapped, ZeroRedundancyOptimizer(model.parameters(), type(inner), **options))


CONTENDERS: dict[str, Callable[[Workload, nn.Module], Contender]] = {
    FLOOR: plain,
    "heatopt": with_heatopt,
    "DDP gloo": with_ddp,
    "DDP + ZeroRedundancy": with_zero_redundancy,
}


def measure(workload: Workload, names: list[str], rounds: int, steps: int, warm_up: int) -> dict[str, object]:
    """Milliseconds per step of each contender and round, and the ratios to the floor and to DDP."""
    comm = heatopt.world()
    contenders: dict[str, Contender] = {}
    for name in names:
        torch.manual_seed(0)
        contenders[name] = CONTENDERS[name](workload, workload.make_model())
    batch = workload.make_batch(torch.Generator().manual_seed(comm.rank))
    for contender in contenders.values():
        contender.warm_up(workload, batch, warm_up)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            comm.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                contenders[name].step(workload, batch)
            elapsed = torch.tensor((time.perf_counter() - start) / steps * 1e3)
            times[name].append(comm.allreduce(elapsed, "max").item())
    synchronised = [name for name in names if name != FLOOR]
    return {
        "workload": workload.name,
        "parameters": sum(p.numel() for p in contenders[names[0]].model.parameters()),
        "milliseconds": times,
        "checksums": {name: contenders[name].checksum() for name in synchronised},
    }


def ratio(times: dict[str, list[float]], name: str, other: str) -> float | None:
    """Median of the rounds' ratios."""
    if name not in times or other not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


def show(results: list[dict[str, object]]) -> None:
    """Print one table."""
    table = Table(title="Milliseconds per step (median), ratio to the step without synchronisation and to DDP")
    for column in ("workload", "contender", "ms", "/ floor", "/ DDP", "checksum"):
        table.add_column(column, justify="left" if column in ("workload", "contender") else "right")
    for result in results:
        times = result["milliseconds"]
        for name in times:
            floor, ddp = ratio(times, name, FLOOR), ratio(times, name, "DDP gloo")
            checksum = result["checksums"].get(name)
            table.add_row(
                str(result["workload"]),
                name,
                f"{statistics.median(times[name]):.1f}",
                "" if floor is None else f"{floor:.3f}",
                "" if ddp is None else f"{ddp:.3f}",
                "" if checksum is None else f"{checksum:.12g}",
            )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps per round and contender (default %(default)s)")
    parser.add_argument("--warm-up", type=int, default=36, help="steps before, of each contender (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write all times to this file")
    options = parser.parse_args()
    comm = heatopt.world()
    if comm.size > 1 and not dist.is_initialized():
        store = heatopt.comm.rendezvous_store(comm)
        dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    results = [
        measure(WORKLOADS[name], options.contenders, options.rounds, options.steps, options.warm_up)
        for name in options.workloads
    ]
    if comm.rank == 0:
        show(results)
        if options.json:
            setting = {
                "date": datetime.date.today().isoformat(),
                "ranks": comm.size,
                "cores": os.cpu_count(),
                "processor": platform.processor() or platform.machine(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "heatopt": heatopt.__version__,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            }
            options.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")
    comm.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
