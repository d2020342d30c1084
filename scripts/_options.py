"""The command line of the training scripts: options, their checks, and errors that are printed once."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from _algorithms import check_optimizer_name, check_scheduler_name

if TYPE_CHECKING:
    from heatopt.comm import Communicator

EPILOG = """\
The batch size is that of all ranks together, and every number of ranks sees the same batches:
the loss curve does not depend on the number of ranks.

  python %(prog)s
  mpirun -n 4 python %(prog)s --optimizer SGD --lr 0.1 --optimizer-args momentum=0.9 nesterov=True
  torchrun --nproc-per-node 2 %(prog)s --scheduler CosineAnnealingLR --scheduler-args T_max=10
"""


class RankParser(argparse.ArgumentParser):
    """An argument parser that speaks on rank 0 only.

    All ranks read the same command line, so all find the same error: rank 0 prints it, and no rank leaves
    before it has, because a launcher kills the others as soon as one rank ends with an error.
    """

    def __init__(self, *args: Any, comm: Communicator, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.comm = comm

    def print_usage(self, file: IO[str] | None = None) -> None:
        if self.comm.rank == 0:
            super().print_usage(file)

    def print_help(self, file: IO[str] | None = None) -> None:
        if self.comm.rank == 0:
            super().print_help(file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message and self.comm.rank == 0:
            sys.stderr.write(message)
        sys.stdout.flush()
        sys.stderr.flush()
        self.comm.barrier()
        sys.exit(status)


def positive_int(text: str) -> int:
    """An integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return value


def positive_float(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def name_and_value(text: str) -> tuple[str, Any]:
    """Read ``name=value``: a Python literal, ``true``, ``false``, ``none``, ``inf``, or else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    words = {"true": True, "false": False, "none": None, "inf": float("inf")}
    if value.lower() in words:
        return name, words[value.lower()]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def make_parser(
    description: str,
    comm: Communicator,
    *,
    epochs: int,
    batch_size: int,
    learning_rates: dict[str, float],
    out: str,
) -> RankParser:
    """The parser with the options that all training scripts share.

    Args:
        description: what the script trains, on what.
        comm: the ranks that read this command line.
        epochs: default number of epochs.
        batch_size: default global batch size.
        learning_rates: default learning rate of the algorithms it is known for; the first one is the
            default algorithm.
        out: default directory of the results.
    """
    parser = RankParser(
        comm=comm,
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_algorithm_options(parser, learning_rates)
    run = parser.add_argument_group("run")
    length = run.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=positive_int,
        default=epochs,
        help=f"passes over the training data (default {epochs})",
    )
    length.add_argument("--steps", type=positive_int, help="optimizer steps, instead of --epochs")
    run.add_argument(
        "--batch-size",
        type=positive_int,
        default=batch_size,
        help=f"global batch size, shared by all ranks (default {batch_size})",
    )
    run.add_argument("--seed", type=int, default=0, help="seed of the weights and of the batches (default 0)")
    run.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="(default float32)")
    run.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default cpu)")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        metavar="DIR",
        help=f"for metrics.jsonl, training.png (default {out})",
    )
    results.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=True, help="draw training.png (default: yes)"
    )
    return parser


def _add_algorithm_options(parser: argparse.ArgumentParser, learning_rates: dict[str, float]) -> None:
    known = ", ".join(f"{rate:g} for {name}" for name, rate in learning_rates.items())
    default = next(iter(learning_rates))
    training = parser.add_argument_group("optimizer")
    training.add_argument(
        "--optimizer",
        type=check_optimizer_name,
        default=default,
        metavar="NAME",
        help=f"any algorithm of torch.optim (default {default})",
    )
    training.add_argument("--lr", type=positive_float, help=f"learning rate (default {known}, torch's own for others)")
    training.add_argument(
        "--optimizer-args",
        type=name_and_value,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of the algorithm, such as weight_decay=0.1 betas=(0.9,0.95); "
        "LBFGS gets line_search_fn=strong_wolfe if not told otherwise",
    )
    training.add_argument(
        "--scheduler",
        type=check_scheduler_name,
        metavar="NAME",
        help="any scheduler of torch (default: none)",
    )
    training.add_argument(
        "--scheduler-args",
        type=name_and_value,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="its arguments",
    )
    training.add_argument(
        "--scheduler-every",
        choices=["epoch", "step"],
        help="when the scheduler moves (default: step for CyclicLR and OneCycleLR, otherwise epoch)",
    )
    training.add_argument("--clip", type=positive_float, metavar="NORM", help="largest norm of the gradient")
    training.add_argument(
        "--accumulate",
        type=positive_int,
        default=1,
        metavar="K",
        help="compute each rank's part of a batch in K pieces: the same result with less memory (default 1)",
    )
    training.add_argument(
        "--blocking",
        action=argparse.BooleanOptionalAction,
        help="average gradients in blocking calls, or during backward (default: what suits the device)",
    )


def check_options(parser: RankParser, options: argparse.Namespace) -> None:
    """End with a clear error where options do not fit each other, the number of ranks or the machine."""
    size = parser.comm.size
    pieces = size * options.accumulate
    if options.batch_size % pieces:
        nearest = max(1, round(options.batch_size / pieces)) * pieces
        by = [f"{size} ranks"] * (size > 1) + [f"--accumulate {options.accumulate}"] * (options.accumulate > 1)
        parser.error(f"--batch-size {options.batch_size} cannot be divided by {' times '.join(by)}; {nearest} can")
    if options.clip is not None and options.optimizer == "LBFGS":
        parser.error("--clip cannot be used with LBFGS: its line search needs the true gradient")
    if options.scheduler is None and (options.scheduler_args or options.scheduler_every):
        parser.error("--scheduler-args and --scheduler-every need --scheduler")
    for option in ("optimizer_args", "scheduler_args"):
        pairs = getattr(options, option)
        if len(dict(pairs)) < len(pairs):
            parser.error(f"--{option.replace('_', '-')} holds a name twice")
        setattr(options, option, dict(pairs))
    if options.optimizer == "LBFGS":
        # Without a line search its full steps on small batches soon lead to NaN.
        options.optimizer_args.setdefault("line_search_fn", "strong_wolfe")
    if options.lr is not None and "lr" in options.optimizer_args:
        parser.error("the learning rate is given twice: by --lr and by --optimizer-args")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("the picture needs matplotlib: install it, or use --no-plot")
    if options.device == "cuda":
        check_cuda(parser)


def check_cuda(parser: RankParser) -> None:
    """End with a clear error on all ranks if one of them has no GPU."""
    import torch

    if not all(parser.comm.all_gather_object(torch.cuda.is_available())):
        parser.error("--device cuda: not every rank has a GPU that PyTorch can use")


def make_directory(parser: RankParser, directory: Path) -> None:
    """Create the directory on rank 0; all ranks end with the same error where that fails."""
    problem = None
    if parser.comm.rank == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / "metrics.jsonl").open("w"):
                pass
        except OSError as error:
            problem = f"--out {directory}: {error.strerror}"
    problem = parser.comm.broadcast_object(problem)
    if problem:
        parser.error(problem)
