#!/usr/bin/env python
"""Time the sum of one buffer over all ranks: heatopt's buckets, MPI's Allreduce, gloo's, and a copy of the memory.

    mpirun -n 2 python scripts/bench_collectives.py --json out.json --png out.png

The copy is the bound within a node: of a sum of S bytes over P ranks each rank reads P segments and writes P segments
of S / P bytes, which is what copying S bytes reads and writes. All ranks copy at the same time. (Beyond the caches a
sum may take a little less: the processor also reads the lines that a copy is about to overwrite, and a sum in place has
read them anyway.) The ways take turns within each round; a ratio is the median of the rounds' ratios. Every way's
result is compared with the exact sum.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _measuring import interleave, median_ratio, open_gloo, write_json
from mpi4py import MPI
from rich.console import Console
from rich.table import Table

import heatopt
from heatopt.comm import Communicator, ReduceOptions

HEATOPT, ALLREDUCE, GLOO, COPY = "heatopt bucket", "MPI Allreduce", "gloo allreduce", "copy"


def contenders_for(comm: Communicator, numel: int) -> dict[str, tuple[torch.Tensor, Callable[[], object]]]:
    """The buffer of each way, and what sums it over all ranks."""
    memory = comm.allocate(numel, torch.float32, torch.device("cpu"))
    options = ReduceOptions(divisor=1, blocking=True)
    whole, plain, source = torch.zeros(numel), torch.zeros(numel), torch.ones(numel)
    target = torch.zeros(numel)
    array = whole.numpy()
    return {
        HEATOPT: (memory.own, lambda: comm.reduce_bucket(memory, options, "the benchmark")),
        ALLREDUCE: (whole, lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array)),
        GLOO: (plain, lambda: dist.all_reduce(plain)),
        COPY: (target, lambda: target.copy_(source)),
    }


def require_sums(comm: Communicator, contenders: dict[str, tuple[torch.Tensor, Callable[[], object]]]) -> None:
    """Raise unless every way gives the sum of what the ranks have, in every element."""
    for name, (buffer, call) in contenders.items():
        if name == COPY:
            continue
        # Whole numbers, so that the sum is exact in any order.
        pattern = torch.arange(buffer.numel(), dtype=torch.float32).remainder_(1009)
        buffer.copy_(pattern).add_(comm.rank)
        call()
        expected = pattern.mul_(comm.size).add_(comm.size * (comm.size - 1) // 2)
        if not torch.equal(buffer, expected):
            raise SystemExit(f"{name} gives a wrong sum of {buffer.numel()} elements on rank {comm.rank}")


def measure(comm: Communicator, nbytes: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Times of all ways for one size."""
    contenders = contenders_for(comm, nbytes // 4)
    require_sums(comm, contenders)
    for buffer, _ in contenders.values():
        buffer.zero_()  # repeated sums must not grow
    calls = {name: call for name, (_, call) in contenders.items()}
    probe = interleave(comm, calls, 1, 2)
    longest = sum(sum(values) for values in probe.values()) / 1e3
    repeats = max(1, min(200, round(seconds / rounds / max(longest, 1e-6))))
    return {"bytes": nbytes, "milliseconds": interleave(comm, calls, rounds, repeats)}


def human(nbytes: int) -> str:
    """A size in KiB or MiB."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def show(results: list[dict[str, Any]], ranks: int) -> None:
    """Print the table."""
    table = Table(title=f"Sum over {ranks} ranks, fp32: milliseconds (median), and how many times as long as the copy")
    table.add_column("size", justify="right")
    names = list(results[0]["milliseconds"])
    for name in names:
        table.add_column(name, justify="right")
        if name != COPY:
            table.add_column("/ copy", justify="right")
    for name in (ALLREDUCE, GLOO):
        table.add_column(f"{name} / {HEATOPT}", justify="right")
    for result in results:
        times = result["milliseconds"]
        row = [human(result["bytes"])]
        for name in names:
            row.append(f"{statistics.median(times[name]):.3f}")
            if name != COPY:
                row.append(f"{median_ratio(times, name, COPY):.2f}")
        row += [f"{median_ratio(times, name, HEATOPT):.2f}" for name in (ALLREDUCE, GLOO)]
        table.add_row(*row)
    Console(width=150).print(table)


def plot(results: list[dict[str, Any]], ranks: int, path: Path) -> None:
    """Draw time against size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    sizes = [result["bytes"] for result in results]
    for name in results[0]["milliseconds"]:
        times = [statistics.median(result["milliseconds"][name]) for result in results]
        axes.plot(sizes, times, "k--" if name == COPY else "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [human(size) for size in sizes], rotation=45)
    axes.set(yscale="log", xlabel="size", ylabel="time / ms", title=f"Sum over {ranks} ranks of a node, fp32")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", type=int, default=4, help="KiB (default %(default)s)")
    parser.add_argument("--largest", type=int, default=256 * 1024, help="KiB (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each size, about (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write all times to this file")
    parser.add_argument("--png", type=Path, help="draw time against size")
    options = parser.parse_args()
    comm = heatopt.world()
    if comm.size == 1 or comm.size != MPI.COMM_WORLD.size:
        raise SystemExit(
            "this benchmark needs two or more ranks of MPI: mpirun -n 2 python scripts/bench_collectives.py"
        )
    open_gloo(comm)
    sizes = []
    size = options.smallest << 10
    while size <= options.largest << 10:
        sizes.append(size)
        size *= 4
    results = [measure(comm, size, options.rounds, options.seconds) for size in sizes]
    write_json(options.json, comm, results)
    if comm.rank == 0:
        show(results, comm.size)
        if options.png:
            plot(results, comm.size, options.png)
    comm.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
