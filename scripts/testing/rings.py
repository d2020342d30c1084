"""Runs the tests ring by ring and ends with one summary.

    python -m scripts.testing.rings [ring ...] [-- pytest options]

A ring is one way to have several ranks: `threads` (plain pytest: the tests of one process, and ranks as threads),
`mpi-N` (N processes under mpiexec) and `torch-N` (N processes under torchrun, gloo).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.support.launch import REPOSITORY, child_environment, launch_command

ALL_RINGS = ("threads", "mpi-1", "mpi-2", "mpi-3", "mpi-4", "torch-2")
LOGS = REPOSITORY / ".pytest-ranks"
_KINDS: dict[str, Literal["none", "mpi", "torch"]] = {"threads": "none", "mpi": "mpi", "torch": "torch"}
_COUNTS = ("tests", "failures", "errors", "skipped")
_STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Ring:
    """One way to run the tests."""

    name: str
    kind: Literal["none", "mpi", "torch"]
    size: int

    @classmethod
    def parse(cls, name: str) -> Ring:
        """Read ``threads``, ``mpi-3`` or ``torch-2``."""
        found = re.fullmatch(r"(threads)|(mpi|torch)-([1-9]\d*)", name)
        if found is None:
            raise argparse.ArgumentTypeError(f"{name!r} is none of threads, mpi-N, torch-N")
        return cls(name, _KINDS[found[1] or found[2]], int(found[3] or 1))


@dataclass(frozen=True)
class Result:
    """How a ring went; ``problem`` is what the counts do not tell, if anything."""

    ring: Ring
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""

    @property
    def failures(self) -> int:
        """Failed tests; a ring that did not come to its end has at least one."""
        return max(self.failed, 1 if self.problem else 0)


def run_ring(ring: Ring, options: Sequence[str], limit: float) -> Result:
    """Run pytest on the ranks of ``ring`` for at most ``limit`` seconds; it prints as it goes."""
    report = LOGS / f"{ring.name}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    shutil.rmtree(LOGS / ring.name, ignore_errors=True)
    try:
        launcher = launch_command(ring.kind, ring.size)
    except FileNotFoundError as error:
        return Result(ring, problem=str(error))
    # mpiexec gives each rank a terminal of its own, so pytest cannot tell whether there is one.
    color = f"--color={'yes' if sys.stdout.isatty() else 'no'}"
    command = [*launcher, "-m", "pytest", f"--junitxml={report}", color, *options]
    # More patience than at a desk: a rank that is late on a busy machine is not stuck.
    environment = {"HEATOPT_TEST_GRACE": "20"} | child_environment(HEATOPT_TEST_LOGS=str(LOGS / ring.name))
    started = time.monotonic()
    code = _run(command, environment, limit)
    return read_result(ring, report, code, limit, time.monotonic() - started)


def read_result(ring: Ring, report: Path, code: int | None, limit: float, seconds: float) -> Result:
    """Judge a ring by its JUnit report and its exit ``code`` (None: it ran into the limit)."""
    try:
        suite = ElementTree.parse(report).getroot().find("testsuite")
    except (FileNotFoundError, ElementTree.ParseError):
        suite = None
    counts = {name: int(suite.get(name, 0)) if suite is not None else 0 for name in _COUNTS}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    if code is None:
        problem = f"stopped after {limit:g} s"
    elif suite is None:
        problem = f"ended with exit code {code} before its summary"
    elif code != 0 and not failed:
        problem = f"no test failed, but the exit code is {code}"
    elif not passed and not failed:
        problem = "no test ran"
    else:
        problem = ""
    return Result(ring, passed, failed, counts["skipped"], seconds, problem)


def _run(command: Sequence[str], environment: dict[str, str], limit: float) -> int | None:
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """An interrupted pytest still sums up; a launcher that is asked to end takes its ranks along, a killed one not."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
            return


def print_summary(results: Sequence[Result]) -> None:
    """One line for each ring, then the total."""
    print(f"\n{'ring':<10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for result in results:
        verdict = result.problem or ("FAILED" if result.failed else "ok")
        print(
            f"{result.ring.name:<10}{result.passed:>8}{result.failures:>8}{result.skipped:>9}{result.seconds:>9.1f}"
            f"  {verdict}"
        )
    print(f"{sum(result.passed for result in results)} passed, {sum(result.failures for result in results)} failed")


def main(arguments: Sequence[str]) -> int:
    """Run the rings named in ``arguments``; the exit code is 0 if all tests of all rings passed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, options = arguments[:end], arguments[end + 1 :]
    parser = argparse.ArgumentParser(prog="rings", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("ring", nargs="*", type=Ring.parse, help=f"default: {' '.join(ALL_RINGS)}")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for one ring (default: %(default)g)")
    parser.add_argument("--total", type=float, default=4500.0, help="seconds for all rings (default: %(default)g)")
    chosen = parser.parse_args(own)
    for sign in (signal.SIGTERM, signal.SIGHUP):  # ends as by Ctrl-C: the ring at work is stopped first
        signal.signal(sign, signal.default_int_handler)
    results: list[Result] = []
    for ring in chosen.ring or map(Ring.parse, ALL_RINGS):
        print(f"\n##### ring {ring.name}", flush=True)
        left = chosen.total - sum(result.seconds for result in results)
        results.append(run_ring(ring, options, min(chosen.limit, max(left, 0.0))))
    print_summary(results)
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
