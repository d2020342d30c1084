"""The command line: ``heatopt COMMAND`` or ``python -m heatopt COMMAND``, alone or under a launcher."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from heatopt.cli._doctor import doctor

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the command line by default.

    Returns:
        The exit code: 0 if all is well, 1 if a check failed. Wrong arguments exit with 2.
    """
    parser = argparse.ArgumentParser(prog="heatopt", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor",
        help="say what heatopt finds here, and check that the ranks can work together",
        description="Say what heatopt finds here, and check that the ranks can work together. "
        "Start it as the training is started: mpirun -n 4 python -m heatopt doctor",
    )
    parser.parse_args(arguments)
    return doctor()
