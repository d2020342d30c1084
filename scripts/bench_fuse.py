"""Time of an update of many small tensors: torch's implementations, and heatopt with fuse=True, in one process.

    python scripts/bench_fuse.py [--optimizer AdamW] [--tensors 400] [--elements 64 1024 4096] [--json FILE]

Gradients lie apart, as autograd leaves them in one process ("fuse=True"), or one after the other, as they do in the
buckets when there are several ranks ("fuse=True, buckets"). With Adam, FusedAdam is measured too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _measuring import describe_machine
from rich.console import Console
from rich.table import Table

import heatopt

KINDS: dict[str, dict[str, bool]] = {
    "torch for-loop": {"foreach": False},
    "torch foreach": {"foreach": True},
    "torch fused=True": {"fused": True},
    "fuse=True": {},
    "fuse=True, buckets": {},
    "FusedAdam": {},
    "FusedAdam, buckets": {},
}


def make_optimizer(kind: str, algorithm: str, tensors: int, elements: int) -> torch.optim.Optimizer | None:
    """An optimizer whose parameters have gradients; None if there is no such implementation."""
    parameters = [torch.nn.Parameter(torch.randn(elements)) for _ in range(tensors)]
    gradients = [torch.randn(elements) for _ in parameters]
    if "buckets" in kind:
        # The layout of a bucket: in reverse order, each gradient on a multiple of 64 bytes.
        gap = -elements % 16
        together = torch.randn(tensors, elements + gap)
        gradients = [row[:elements] for row in together.flip(0).contiguous().unbind()][::-1]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if kind.startswith("FusedAdam"):
        return heatopt.FusedAdam(parameters, lr=1e-3) if algorithm == "Adam" else None
    try:
        plain = getattr(torch.optim, algorithm)(parameters, lr=1e-3, **KINDS[kind])
    except TypeError:
        return None
    return heatopt.DataParallelOptimizer(plain, fuse=True) if kind.startswith("fuse") else plain


def measure(options: argparse.Namespace, elements: int) -> dict[str, dict[str, float]]:
    """Median, smallest and largest milliseconds of a step; all kinds in turn, in a random order each round."""
    made = {kind: make_optimizer(kind, options.optimizer, options.tensors, elements) for kind in KINDS}
    optimizers = {kind: optimizer for kind, optimizer in made.items() if optimizer is not None}
    times: dict[str, list[float]] = {kind: [] for kind in optimizers}
    for number in range(options.rounds + 2):
        for kind in random.sample(list(optimizers), len(optimizers)):
            step = optimizers[kind].step
            block = []
            for _ in range(options.steps):
                start = time.perf_counter()
                step()
                block.append(1e3 * (time.perf_counter() - start))
            if number >= 2:
                times[kind].append(statistics.median(block))
    return {
        kind: {"median_ms": statistics.median(found), "min_ms": min(found), "max_ms": max(found)}
        for kind, found in times.items()
    }


def show(results: dict[str, dict[str, float]], title: str) -> None:
    """Print the table of one size of tensors."""
    table = Table(title=title)
    table.add_column("implementation")
    for heading in ("median", "min", "max", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    reference = results.get("torch fused=True", results["torch for-loop"])["median_ms"]
    for kind, found in results.items():
        numbers = [f"{found[key]:.3f} ms" for key in ("median_ms", "min_ms", "max_ms")]
        table.add_row(kind, *numbers, f"{reference / found['median_ms']:.2f}")
    Console().print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--optimizer", default="AdamW", help="an elementwise algorithm of torch.optim (default AdamW)")
    parser.add_argument("--tensors", type=int, default=400, help="number of parameters (default 400)")
    parser.add_argument(
        "--elements", type=int, nargs="+", default=[64, 1024, 4096], help="elements of each (default 64 1024 4096)"
    )
    parser.add_argument("--rounds", type=int, default=30, help="blocks of each implementation (default 30)")
    parser.add_argument("--steps", type=int, default=10, help="steps in a block (default 10)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    if min(options.tensors, *options.elements, options.rounds, options.steps, options.threads) <= 0:
        parser.error("--tensors, --elements, --rounds, --steps and --threads must be above 0")
    if not hasattr(torch.optim, options.optimizer):
        parser.error(f"--optimizer {options.optimizer}: not an algorithm of torch.optim")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)
    results = {}
    for elements in options.elements:
        results[elements] = measure(options, elements)
        show(results[elements], f"{options.optimizer}.step() on {options.tensors} tensors of {elements} elements")
    machine = describe_machine()
    Console().print("; ".join(f"{name}: {value}" for name, value in machine.items()), highlight=False)
    if options.json:
        setting = {key: getattr(options, key) for key in ("optimizer", "tensors", "rounds", "steps")}
        options.json.write_text(json.dumps({"machine": machine, **setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
