#!/usr/bin/env python
"""Time a training step of heatopt against the same step without synchronisation and against other packages.

    python scripts/bench_step.py --ranks 2 --launches 3 --json out.json

Each contender has processes of its own, started by mpirun, with the same initial weights, data and inner optimizer.
They take turns on the same cores within each round; a ratio is the median of the ratios within the rounds, so that a
machine that slows down slows all of them. The parameters of the synchronised contenders are compared bit for bit after
five steps. Packages that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _contenders import CONTENDERS, DDP, FLOOR, MEETING, Contender
from _jobs import Job, JobError, serve
from _measuring import median_ratio, setting, write_results
from _workloads import WORKLOADS
from rich.console import Console
from rich.table import Table

import heatopt

# After so many steps the contenders' parameters are compared. heatopt goes on for a while: it tries out settings.
_COMPARED_STEPS = 5
_Times = dict[str, list[float]]


class Stage:
    """In a contender's processes: what it does when it is its turn."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._comm = heatopt.world()

    def serve(self) -> None:
        """Do what is wanted until nothing more is."""
        serve(self._comm, lambda command, *arguments: getattr(self, command)(*arguments))

    def prepare(self, workload: str, warm_up: int) -> str:
        """Make the model, and warm up; return what the parameters have become after the first steps."""
        self._workload = WORKLOADS[workload]
        self._batch = self._workload.make_batch(torch.Generator().manual_seed(self._comm.rank))
        torch.manual_seed(0)
        self._contender: Contender = CONTENDERS[self._name](self._comm, self._workload, self._workload.make_model())
        digest = ""
        for step in range(warm_up):
            self._contender.step(self._workload, self._batch)
            if step == _COMPARED_STEPS - 1:
                digest = self._contender.digest()
        return digest

    def time(self, steps: int) -> float:
        """Milliseconds per step of this rank."""
        self._comm.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            self._contender.step(self._workload, self._batch)
        return (time.perf_counter() - start) / steps * 1e3

    def describe(self) -> dict[str, Any]:
        """What a reader of the numbers must know."""
        optimizer = self._contender.optimizer
        report = optimizer.report() if isinstance(optimizer, heatopt.DataParallelOptimizer) else None
        return {"setting": setting(self._comm), "report": report}


def measure(workload: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step of the slowest rank, by contender and round, and what their parameters have become."""
    launches = [measure_once(workload, options) for _ in range(options.launches)]
    whole = launches[0]
    for other in launches[1:]:
        whole["missing"] |= other["missing"]
        for name in [name for name in whole["milliseconds"] if name in other["missing"]]:
            del whole["milliseconds"][name]
        for name, times in whole["milliseconds"].items():
            times += other["milliseconds"][name]
        for name, digest in whole["parameters after 5 steps"].items():
            if other["parameters after 5 steps"].get(name, digest) not in digest:
                whole["parameters after 5 steps"][name] += f" and {other['parameters after 5 steps'][name]}"
    return whole


def measure_once(workload: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same for one set of processes: how their memory happens to lie makes a tenth of the time of large models."""
    jobs: dict[str, Job] = {}
    digests: dict[str, str] = {}
    missing: dict[str, str] = {}
    try:
        for name in options.contenders:
            try:
                jobs[name] = Job(options.ranks, Path(__file__), ["--perform", name])
                steps = options.warm_up if name.startswith("heatopt") else _COMPARED_STEPS
                digest, *_ = set(jobs[name].call("prepare", workload, steps))
            except JobError as error:
                missing[name] = str(error)
                if name in jobs:
                    jobs.pop(name).close()
                continue
            digests |= {name: digest} if name not in (FLOOR, MEETING) else {}
        if not jobs:
            raise SystemExit(f"no contender could start: {missing}")
        times = take_turns(jobs, options.rounds, options.steps)
        descriptions = {name: job.call("describe")[0] for name, job in jobs.items()}
    finally:
        for job in jobs.values():
            job.close()
    return {
        "workload": workload,
        "milliseconds": times,
        "parameters after 5 steps": digests,
        "missing": missing,
        "reports": {name: found["report"] for name, found in descriptions.items() if found["report"]},
        "setting": next((found["setting"] for found in descriptions.values()), None),
    }


def take_turns(jobs: dict[str, Job], rounds: int, steps: int) -> _Times:
    """Time all jobs in each round, beginning with another one each time; the first round only warms up."""
    names = list(jobs)
    times: _Times = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            jobs[name].call("time", 1)  # its memory is in the caches again
            milliseconds = max(jobs[name].call("time", steps))
            if number:
                times[name].append(milliseconds)
    return times


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
    console = Console(width=100)
    console.print(table)
    for name, reason in {k: v for result in results for k, v in result["missing"].items()}.items():
        console.print(f"without {name}: {reason}", highlight=False)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of the times over that of the step without synchronisation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    shown = [name for name in results[0]["milliseconds"] if all(name in result["milliseconds"] for result in results)]
    names = [name for name in shown if name != FLOOR]
    for place, name in enumerate(names):
        positions = [group + (place + 0.5) / (len(names) + 1) for group in range(len(results))]
        ratios = [median_ratio(result["milliseconds"], name, FLOOR) for result in results]
        bars = axes.bar(positions, ratios, 0.9 / (len(names) + 1), label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([group + 0.4 for group in range(len(results))], [result["workload"] for result in results])
    axes.set_ylabel("time of a step / without synchronisation")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes of each contender (default %(default)s)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default %(default)s)")
    parser.add_argument(
        "--launches", type=int, default=1, help="processes are started anew so often, for as many rounds each"
    )
    parser.add_argument("--steps", type=int, default=4, help="steps per round and contender (default %(default)s)")
    parser.add_argument(
        "--warm-up", type=int, default=40, help="steps of heatopt before the first round (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write all times to this file")
    parser.add_argument("--png", type=Path, help="draw the ratios to the step without synchronisation")
    parser.add_argument("--read", nargs="+", type=Path, help="measure nothing: show what --json has written")
    parser.add_argument("--perform", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.ranks, options.rounds, options.steps, options.launches) < 1 or options.warm_up < _COMPARED_STEPS:
        least = f"--ranks, --rounds, --steps and --launches must be at least 1, --warm-up at least {_COMPARED_STEPS}"
        parser.error(least)
    return options


def main() -> None:
    options = parse()
    if options.perform:
        Stage(options.perform).serve()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.read:
        results = [result for path in options.read for result in json.loads(path.read_text())["results"]]
    else:
        results = [measure(name, options) for name in options.workloads]
    show(results)
    if options.png and FLOOR in options.contenders:
        draw(results, options.png)
    if options.json and not options.read:
        write_results(options.json, results[0].pop("setting"), results)


if __name__ == "__main__":
    main()
