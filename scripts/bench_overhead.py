#!/usr/bin/env python
"""Measure what DataParallelOptimizer costs in one process, against the plain torch optimizer.

Plain and wrapped steps alternate in short blocks in one process, so that a change in the speed of the
machine meets both alike. Each pair of blocks gives one ratio of times; the overhead is the median of the
ratios. Each round builds all models anew, because where their memory happens to lie can make one copy faster
than another. The control is a second plain copy, measured in the same way: its overhead
is zero but for noise.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _measuring import describe_machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import heatopt

Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A model and its batch: ``width`` numbers in, ``depth`` hidden layers of as many, ten numbers out."""

    name: str
    width: int
    depth: int
    batch: int

    def model(self) -> nn.Module:
        hidden = [layer for _ in range(self.depth) for layer in (nn.Linear(self.width, self.width), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(self.width, 10))


CASES = [
    Case("small", 128, 6, 64),
    Case("medium", 512, 4, 64),
    Case("deep", 32, 100, 16),
]


@dataclass(frozen=True)
class Result:
    """Times and overheads of one case; overheads are fractions of the plain time."""

    case: str
    parameters: int
    tensors: int
    hidden_layers: int
    width: int
    batch: int
    rounds: int
    pairs: int
    plain_ms: float
    wrapped_ms: float
    overhead: float
    overhead_95: tuple[float, float]
    control: float
    control_95: tuple[float, float]


def make_step(case: Case, algorithm: str, *, wrapped: bool) -> Step:
    """A function that does one training step, with its own copy of the model."""
    torch.manual_seed(0)
    model = case.model()
    inputs, targets = torch.randn(case.batch, case.width), torch.randint(10, (case.batch,))
    optimizer = getattr(torch.optim, algorithm)(model.parameters(), lr=1e-3)
    if wrapped:
        optimizer = heatopt.DataParallelOptimizer(optimizer, model=model)
    loss_function = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss_function(model(inputs), targets).backward()
        optimizer.step()

    return step


def time_block(step: Step, repeats: int) -> float:
    """Seconds for one step: the median over a block, which an interruption does not move."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(case: Case, algorithm: str, *, rounds: int, pairs: int, block_ms: float) -> Result:
    """Measure one case.

    Args:
        case: the model.
        algorithm: name of the torch.optim algorithm.
        rounds: how often all copies are built anew.
        pairs: pairs of blocks in each round.
        block_ms: how long a block takes, about.
    """
    times = [measure_round(case, algorithm, pairs, block_ms) for _ in range(rounds)]
    overhead, overhead_95 = median_overhead([ratios(t["wrapped"], t["plain"]) for t in times])
    control, control_95 = median_overhead([ratios(t["control"], t["plain"]) for t in times])
    sizes = [parameter.numel() for parameter in case.model().parameters()]
    return Result(
        case=case.name,
        parameters=sum(sizes),
        tensors=len(sizes),
        hidden_layers=case.depth,
        width=case.width,
        batch=case.batch,
        rounds=rounds,
        pairs=rounds * pairs,
        plain_ms=1e3 * statistics.median(x for t in times for x in t["plain"]),
        wrapped_ms=1e3 * statistics.median(x for t in times for x in t["wrapped"]),
        overhead=overhead,
        overhead_95=overhead_95,
        control=control,
        control_95=control_95,
    )


def measure_round(case: Case, algorithm: str, pairs: int, block_ms: float) -> dict[str, list[float]]:
    """Build all copies, and time their blocks in turn, in a random order each time."""
    # Whichever copy is built first finds other memory, so the order of building is random too.
    kinds = random.sample(["plain", "wrapped", "control"], 3)
    steps = {kind: make_step(case, algorithm, wrapped=kind == "wrapped") for kind in kinds}
    for step in steps.values():
        time_block(step, 10)
    repeats = max(1, round(block_ms / 1e3 / time_block(steps["plain"], 10)))
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(pairs):
        for kind in random.sample(kinds, len(kinds)):
            times[kind].append(time_block(steps[kind], repeats))
    return times


def ratios(times: Sequence[float], plain: Sequence[float]) -> list[float]:
    """What each time is above its partner, as a fraction."""
    return [a / b - 1 for a, b in zip(times, plain, strict=True)]


def median_overhead(rounds: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float]]:
    """The median of all overheads, and its 95 % interval.

    The interval comes from resampling whole rounds: pairs of one round share their memory, and so are not
    independent of each other.
    """
    generator = random.Random(0)

    def median(chosen: Sequence[Sequence[float]]) -> float:
        return statistics.median(overhead for overheads in chosen for overhead in overheads)

    medians = sorted(median(generator.choices(rounds, k=len(rounds))) for _ in range(1000))
    return median(rounds), (medians[25], medians[974])


def show_interval(value: float, interval: tuple[float, float]) -> str:
    """A fraction in percent, and below it its interval."""
    return f"{value:+.2%}\n{interval[0]:+.2%} .. {interval[1]:+.2%}"


def show(results: list[Result], machine: dict[str, Any], algorithm: str, console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{algorithm}: DataParallelOptimizer in one process against plain torch")
    table.add_column("model")
    for heading in ("plain", "wrapped", "overhead", "control"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        table.add_row(
            r.case,
            f"{r.plain_ms:.3f} ms",
            f"{r.wrapped_ms:.3f} ms",
            show_interval(r.overhead, r.overhead_95),
            show_interval(r.control, r.control_95),
        )
    console.print(table)
    for r in results:
        console.print(f"{r.case}: {r.parameters:,} parameters in {r.tensors} tensors, batch {r.batch}", highlight=False)
    console.print("median of the paired ratios and its 95 % interval; control: plain against plain", highlight=False)
    console.print("; ".join(f"{name}: {value}" for name, value in machine.items()), highlight=False)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--optimizer", default="AdamW", help="algorithm of torch.optim (default AdamW)")
    names = [case.name for case in CASES]
    parser.add_argument(
        "--models",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"any of {', '.join(names)} (default all)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="how often models are built anew (default 20)")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of blocks in a round (default 40)")
    parser.add_argument("--block-ms", type=float, default=10, help="length of a block (default 10)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.pairs, options.block_ms, options.threads) <= 0:
        parser.error("--rounds, --pairs, --block-ms and --threads must be above 0")
    algorithm = getattr(torch.optim, options.optimizer, None)
    usable = isinstance(algorithm, type) and options.optimizer not in (
        "LBFGS",
        "Muon",
        "Optimizer",
        "SparseAdam",
    )
    if not usable:
        parser.error(f"--optimizer {options.optimizer}: not an algorithm of torch.optim that steps without more")
    if heatopt.world().size > 1:
        parser.error("this measures one process: start it with python alone")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    random.seed(0)
    console = Console()
    cases = [case for case in CASES if case.name in options.models]
    results = [
        measure(case, options.optimizer, rounds=options.rounds, pairs=options.pairs, block_ms=options.block_ms)
        for case in track(cases, "measuring", console=console, transient=True, disable=not sys.stdout.isatty())
    ]
    machine = describe_machine()
    show(results, machine, options.optimizer, console)
    if options.json:
        report = {"machine": machine, "optimizer": options.optimizer, "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
