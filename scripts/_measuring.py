"""What the benchmarks of communication share: timing in turns, the peer's process group, how results are kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import heatopt
from heatopt.comm import Communicator

__all__ = ["describe_machine", "interleave", "median_ratio", "open_gloo", "setting", "write_json", "write_results"]

_KNOWN = ("OMP_NUM_THREADS", "HEATOPT_", "OMPI_MCA_coll", "OMPI_MCA_btl_tcp", "OMPI_MCA_mpi_yield")


def open_gloo(comm: Communicator) -> None:
    """Make the default group of torch.distributed, which the peers use."""
    if comm.size > 1 and not dist.is_initialized():
        store = heatopt.comm.rendezvous_store(comm)
        dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)


def interleave(
    comm: Communicator, contenders: dict[str, Callable[[], object]], rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds per call of the slowest rank, for each contender and round; the first round only warms up.

    The contenders take turns, and another one begins each round, so what disturbs the machine meets all of them.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            comm.barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                contenders[name]()
            elapsed = torch.tensor((time.perf_counter() - start) / repeats * 1e3, dtype=torch.float64)
            comm.allreduce(elapsed, "max")
            if number:
                times[name].append(elapsed.item())
    return times


def median_ratio(times: dict[str, list[float]], name: str, other: str) -> float:
    """Median of the rounds' ratios, on which the machine's slower phases have no influence."""
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


def setting(comm: Communicator) -> dict[str, Any]:
    """What a reader of the numbers must know."""
    return {
        **describe_machine(),
        "ranks": comm.size,
        "nodes": comm.num_nodes,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_KNOWN)},
    }


def describe_machine() -> dict[str, Any]:
    """Hardware, versions and date."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "heatopt": heatopt.__version__,
    }


def _processor_name() -> str:
    """The processor as Linux names it, elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path | None, comm: Communicator, results: Any) -> None:
    """Write setting and results, on rank 0 and if there is a path."""
    if comm.rank == 0 and path is not None:
        write_results(path, setting(comm), results)


def write_results(path: Path, setting: dict[str, Any], results: Any) -> None:
    """Write them as all benchmarks do."""
    path.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")
