"""What a training run shows and leaves behind: progress, metrics.jsonl, a table and training.png."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Record = dict[str, Any]


def ends_at_terminal() -> bool:
    """Whether a user looks at the standard output.

    Open MPI gives each rank a terminal of its own, wherever its output goes in the end; there, the standard
    output of the launcher tells.
    """
    if not sys.stdout.isatty() or "OMPI_COMM_WORLD_RANK" not in os.environ:
        return sys.stdout.isatty()
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


class Report:
    """Progress on the screen and metrics in a file, on rank 0; on other ranks nothing.

    Args:
        directory: where ``metrics.jsonl`` goes, one JSON object for each step.
        steps: number of steps in the run.
        rank: the rank that reports.
        console: where to write (default: standard output).
    """

    def __init__(self, directory: Path, steps: int, rank: int, console: Console | None = None) -> None:
        self.active = rank == 0
        self.records: list[Record] = []
        self.console = console or Console(force_terminal=ends_at_terminal())
        self._directory = directory
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (self.active and self.console.is_terminal),
        )
        self._bar = self._progress.add_task("training", total=steps, loss=float("nan"))
        self._file = (directory / "metrics.jsonl").open("w", buffering=1) if self.active else None

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()

    def say(self, text: str) -> None:
        """Write a line."""
        if self.active:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, record: Record) -> None:
        """Note one step; the last one of an epoch has the test values too."""
        self.records.append(record)
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._progress.update(self._bar, advance=1, loss=record["loss"])
        if "accuracy" in record:
            self.say(
                f"epoch {record['epoch']:3d}  step {record['step']:5d}  {record['time']:6.1f} s  "
                f"loss {record['loss']:.4f}  test loss {record['test_loss']:.4f}  "
                f"accuracy {record['accuracy']:.2%}"
            )

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Write a table of names and values."""
        if not self.active:
            return
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(justify="right", overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print(table)

    def picture(self, title: str) -> None:
        """Draw ``training.png``: loss and accuracy against time."""
        if self.active:
            plot_training(self.records, self._directory / "training.png", title)


def read_metrics(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_training(records: list[Record], path: Path, title: str) -> None:
    """Draw loss and accuracy against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, accuracies) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    tests = [record for record in records if "accuracy" in record]
    times = [record["time"] for record in tests]
    losses.plot([r["time"] for r in records], [r["loss"] for r in records], linewidth=1, label="training batch")
    losses.plot(times, [r["test_loss"] for r in tests], "o-", label="test data")
    losses.set(ylabel="loss", yscale="log", title=title)
    losses.legend()
    accuracies.plot(times, [100 * r["accuracy"] for r in tests], "o-", color="C2")
    accuracies.set(xlabel="time / s", ylabel="test accuracy / %")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
