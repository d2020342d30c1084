"""Tables and pictures of the comparison of methods."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["draw_comparison", "show_comparison", "show_seeds"]

Result = dict[str, Any]


def _ordered(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def show_comparison(results: list[Result], reference: str) -> None:
    """Print, for each rate and task, speed, bytes and final loss of each method, and how they compare."""
    for rate, task in _ordered((r["rate"], r["task"]) for r in results):
        here = [r for r in results if (r["rate"], r["task"]) == (rate, task)]
        size = here[0]["parameter_bytes"]
        table = Table(title=f"{task}, {rate}, {size / 1e6:.2f} MB of parameters, {here[0]['steps']} updates")
        columns = ("ms / update", "speed", "between phases", "MB sent", "/ formula", "final loss", "to exact")
        for column in ("method", *columns):
            table.add_column(column, justify="left" if column == "method" else "right")
        exact = [r for r in here if r["method"] == reference]
        for method in _ordered(r["method"] for r in here):
            runs = [r for r in here if r["method"] == method]
            seconds, sent, loss = (fmean(r[key] for r in runs) for key in ("total_seconds", "total_sent", "final_loss"))
            middle, expected = (fmean(r[key] for r in runs) for key in ("middle_seconds", "expected_sent"))
            base = fmean(r["total_seconds"] for r in exact) if exact else float("nan")
            base_middle = fmean(r["middle_seconds"] for r in exact) if exact else float("nan")
            exact_loss = fmean(r["final_loss"] for r in exact) if exact else float("nan")
            table.add_row(
                method,
                f"{seconds / here[0]['steps'] * 1e3:.2f}",
                f"{base / seconds:.2f}",
                f"{base_middle / middle:.2f}",
                f"{sent / 1e6:.2f}",
                f"{sent / expected:.3f}" if expected else "",  # too few updates for the method's period
                f"{loss:.4f}",
                f"{100 * (loss / exact_loss - 1):+.1f} %",
            )
        Console(width=110).print(table)


def show_seeds(results: list[Result], reference: str) -> None:
    """Print the final losses of each seed and how far their mean is from the reference's, if there are several."""
    seeds = _ordered(r["seed"] for r in results)
    rate = results[0]["rate"]  # the numbers are the same at each
    for task in _ordered(r["task"] for r in results) if len(seeds) > 1 else ():
        here = [r for r in results if (r["rate"], r["task"]) == (rate, task)]
        title = f"{task}, {here[0]['steps']} updates after {here[0]['pretrain']}: loss of training and of held-out data"
        table = Table(title=title)
        for column in ("method", *(f"seed {seed}" for seed in seeds), "to exact", "held out", "to exact"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for method in _ordered(r["method"] for r in here):
            losses = [r["final_loss"] for r in here if r["method"] == method]
            held_out = _mean(here, method, "held_out_loss")
            distances = [
                100 * (mean / _mean(here, reference, key) - 1)
                for mean, key in ((fmean(losses), "final_loss"), (held_out, "held_out_loss"))
            ]
            cells = [*(f"{loss:.4f}" for loss in losses), f"{distances[0]:+.1f} %", f"{held_out:.4f}"]
            table.add_row(method, *cells, f"{distances[1]:+.1f} %")
        Console(width=110).print(table)


def _mean(results: list[Result], method: str, key: str) -> float:
    values = [r[key] for r in results if r["method"] == method]
    return fmean(values) if values else float("nan")


def draw_comparison(results: list[Result], path: Path, title: str) -> None:
    """Draw loss against time and against bytes, a row for each rate, for the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = _ordered(r["rate"] for r in results)
    size = (11, 3.6 * len(rates) + 0.6)
    figure, axes = pyplot.subplots(len(rates), 2, figsize=size, layout="constrained", squeeze=False)
    seed = results[0]["seed"]
    for row, rate in zip(axes, rates, strict=True):
        for result in results:
            if (result["rate"], result["seed"]) != (rate, seed):
                continue
            style = {"linewidth": 1.2, "label": result["method"]}
            row[0].plot(result["seconds"], result["losses"], **style)
            row[1].plot([sent / 1e6 for sent in result["sent"]], result["losses"], **style)
        row[0].set(xlabel="seconds", ylabel="training loss", title=f"{title}, {rate}", xscale="log", yscale="log")
        row[1].set(xlabel="MB sent by a node", title=f"{title}, {rate}", xscale="log", yscale="log")
        row[1].set_xlim(left=0.1)
        for panel in row:
            panel.grid(alpha=0.3)
        row[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
