#!/usr/bin/env python
"""Time a training step of heatopt against the same step without synchronisation and against other packages.

    mpirun -n 2 python scripts/bench_step.py --json out.json

All contenders run interleaved in the same processes, with the same initial weights, data and inner optimizer; a ratio
is the median of the ratios within each round, so that a machine that slows down slows all of them. The parameters of
the synchronised contenders are compared bit for bit after five steps.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measuring import interleave, median_ratio, open_gloo, write_json
from _workloads import WORKLOADS, Workload
from rich.console import Console
from rich.table import Table
from torch import nn

import heatopt
from heatopt.comm import Communicator

# FSDP2 gathers and reduces layers of at least this size by themselves, and the smaller ones together.
_FSDP_UNIT_BYTES = 2**20
# After so many steps the contenders' parameters are compared. heatopt goes on for a while: it tries out settings.
_COMPARED_STEPS = 5

FLOOR, DDP = "no synchronisation", "DDP gloo"


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

    def digest(self) -> str:
        """What the parameters are, bit for bit."""
        parameters: list[Any] = [p.detach() for p in self.model.parameters()]
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
        return hashlib.sha256(b"".join(p.contiguous().numpy().tobytes() for p in whole)).hexdigest()[:12]


def plain(workload: Workload, model: nn.Module) -> Contender:
    return Contender(model, model, workload.make_optimizer(list(model.parameters())))


def with_heatopt(workload: Workload, model: nn.Module) -> Contender:
    optimizer = heatopt.DataParallelOptimizer(workload.make_optimizer(list(model.parameters())), model=model)
    return Contender(model, model, optimizer)


def with_shards(workload: Workload, model: nn.Module) -> Contender:
    inner = workload.make_optimizer(list(model.parameters()))
    return Contender(model, model, heatopt.DataParallelOptimizer(inner, model=model, shard="state"))


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


def with_fsdp(workload: Workload, model: nn.Module) -> Contender:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for child in model.children():
        if sum(p.nbytes for p in child.parameters()) >= _FSDP_UNIT_BYTES:
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Contender(model, model, workload.make_optimizer(list(model.parameters())))


CONTENDERS: dict[str, Callable[[Workload, nn.Module], Contender]] = {
    FLOOR: plain,
    "heatopt": with_heatopt,
    'heatopt shard="state"': with_shards,
    DDP: with_ddp,
    "DDP + ZeroRedundancy": with_zero_redundancy,
    "FSDP2 gloo": with_fsdp,
}


def measure(comm: Communicator, workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step of each contender and round, and what their parameters have become."""
    batch = workload.make_batch(torch.Generator().manual_seed(comm.rank))
    contenders: dict[str, Contender] = {}
    digests: dict[str, str] = {}
    for name in options.contenders:
        torch.manual_seed(0)
        contenders[name] = CONTENDERS[name](workload, workload.make_model())
        for step in range(options.warm_up if name.startswith("heatopt") else _COMPARED_STEPS):
            contenders[name].step(workload, batch)
            if step == _COMPARED_STEPS - 1 and name != FLOOR:
                digests[name] = contenders[name].digest()
    steps = {name: partial(contender.step, workload, batch) for name, contender in contenders.items()}
    times = interleave(comm, steps, options.rounds, options.steps)
    optimizer = contenders["heatopt"].optimizer if "heatopt" in contenders else None
    return {
        "workload": workload.name,
        "milliseconds": times,
        "parameters after 5 steps": digests,
        "heatopt": optimizer.report() if isinstance(optimizer, heatopt.DataParallelOptimizer) else None,
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print one table."""
    table = Table(title="Milliseconds per step (median), ratio to the step without synchronisation and to DDP")
    for column in ("workload", "contender", "ms", "/ floor", "/ DDP", "parameters"):
        table.add_column(column, justify="left" if column in ("workload", "contender") else "right", no_wrap=True)
    for result in results:
        times = result["milliseconds"]
        for name in times:
            ratios = [f"{median_ratio(times, name, peer):.3f}" if peer in times else "" for peer in (FLOOR, DDP)]
            digest = result["parameters after 5 steps"].get(name, "")
            table.add_row(result["workload"], name, f"{statistics.median(times[name]):.1f}", *ratios, digest)
    Console(width=100).print(table)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of the times over that of the step without synchronisation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    names = [name for name in results[0]["milliseconds"] if name != FLOOR]
    for place, name in enumerate(names):
        positions = [group + (place + 0.5) / (len(names) + 1) for group in range(len(results))]
        bars = axes.bar(
            positions,
            [median_ratio(result["milliseconds"], name, FLOOR) for result in results],
            0.9 / (len(names) + 1),
            label=name,
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([group + 0.4 for group in range(len(results))], [result["workload"] for result in results])
    axes.set_ylabel("time of a step / without synchronisation")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps per round and contender (default %(default)s)")
    parser.add_argument("--warm-up", type=int, default=36, help="steps of heatopt before (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write all times to this file")
    parser.add_argument("--png", type=Path, help="draw the ratios to the step without synchronisation")
    options = parser.parse_args()
    comm = heatopt.world()
    open_gloo(comm)
    results = [measure(comm, WORKLOADS[name], options) for name in options.workloads]
    if comm.rank == 0:
        show(results)
        if options.png and FLOOR in options.contenders:
            draw(results, options.png)
    write_json(options.json, comm, results)
    comm.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
