#!/usr/bin/env python
"""Train on 1, 2 and 4 ranks with the same global batch, and draw the loss curves into one picture.

The curves lie on each other; the lower panel shows how far they are apart.
Arguments after -- go to the training script:

  python scripts/plot_ranks.py --out ranks.png -- --epochs 5
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from _report import Record, read_metrics
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator
from rich.console import Console

SCRIPTS = Path(__file__).resolve().parent


def launch(command: str, ranks: int, script: Path, arguments: Sequence[str], directory: Path) -> list[Record]:
    """Train on a number of ranks, and read the metrics.

    Raises:
        SystemExit: the training or its launcher failed; their output says why.
    """
    prefix = [] if ranks == 1 else shlex.split(command.format(ranks=ranks))
    python = [] if prefix and Path(prefix[0]).name == "torchrun" else [sys.executable]
    # The launcher may be installed beside this Python without being on the path.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    options = ["--no-plot", "--out", str(directory), *arguments]
    try:
        result = subprocess.run(
            [*prefix, *python, str(script), *options],
            env=os.environ | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except FileNotFoundError:
        sys.exit(f"cannot find {prefix[0]}: give a launcher with --launcher")
    if result.returncode:
        sys.exit(f"training on {ranks} ranks failed:\n{result.stdout}")
    return read_metrics(directory / "metrics.jsonl")


def largest_difference(a: list[Record], b: list[Record]) -> float:
    """How far two loss curves are apart at most."""
    return max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=True))


def draw(runs: dict[int, list[Record]], path: Path, title: str) -> None:
    """Draw the loss against the step, and the differences from the first run below."""
    figure, (curves, differences) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=[2, 1], layout="constrained"
    )
    first = next(iter(runs))
    # Wide and light below narrow and dark: all of the curves are seen although they are one line.
    for place, (ranks, records) in enumerate(runs.items()):
        steps = [record["step"] for record in records]
        name = f"{ranks} rank" + ("s" if ranks > 1 else "")
        color = f"C{place}"
        curves.plot(
            steps,
            [record["loss"] for record in records],
            color=color,
            linewidth=max(1.2, 7 - 2.9 * place),
            alpha=0.35 if ranks == first else 0.9,
            linestyle=("-", "-", "--", ":")[min(place, 3)],
            label=name,
        )
        if ranks != first:
            apart = [abs(a["loss"] - b["loss"]) for a, b in zip(records, runs[first], strict=True)]
            differences.plot(steps, apart, ".", color=color, markersize=3, label=f"{name}, from {first}")
    curves.set(ylabel="loss of the global batch", yscale="log", title=title)
    differences.set(xlabel="step", ylabel="difference (if not 0)")
    # A logarithmic axis leaves out differences of exactly zero; it cannot be drawn where there are no others.
    if any(any(line.get_ydata()) for line in differences.lines):
        differences.set_yscale("log")
    differences.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ranks.png"), metavar="FILE", help="the picture")
    parser.add_argument("--task", choices=["digits", "text"], default="digits", help="what to train (default digits)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(default 1 2 4)")
    parser.add_argument(
        "--launcher",
        default="mpirun --oversubscribe -n {ranks}",
        help="how to start more than one rank (default %(default)r)",
    )
    parser.add_argument("training", nargs="*", metavar="-- ARGUMENT", help="arguments for the training script")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 1:
        parser.error("--ranks must be 1 or more")
    if "{ranks}" not in options.launcher:
        parser.error("--launcher must hold {ranks}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script."""
    options = parse(arguments)
    console = Console()
    runs: dict[int, list[Record]] = {}
    for ranks in dict.fromkeys(options.ranks):
        with tempfile.TemporaryDirectory() as directory:
            script = SCRIPTS / f"train_{options.task}.py"
            runs[ranks] = launch(options.launcher, ranks, script, options.training, Path(directory))
        last = runs[ranks][-1]
        apart = largest_difference(runs[ranks], next(iter(runs.values())))
        console.print(
            f"ranks: {ranks}  steps: {last['step']}  last loss: {last['loss']:.4f}  "
            f"accuracy: {last['accuracy']:.2%}  largest difference: {apart:.1e}",
            highlight=False,
            soft_wrap=True,
        )
    draw(runs, options.out, f"{options.task}: the same global batch on {', '.join(map(str, runs))} ranks")
    console.print(f"wrote {options.out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
