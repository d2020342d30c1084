"""Runs the tests ring by ring and ends with one summary.

    python -m scripts.testing.rings [ring ...] [-- pytest options]

A ring is one way to have several ranks: `threads` (plain pytest: the tests of one process, and ranks as threads),
`mpi-N` (N processes under mpiexec) and `torch-N` (N processes under torchrun, gloo). Sessions of pytest that leave
cores free run beside each other; what such a one prints comes when it has ended.
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
from typing import BinaryIO, Literal

from tests.support.launch import REPOSITORY, child_environment, launch_command

ALL_RINGS = ("threads", "mpi-1", "mpi-2", "mpi-3", "mpi-4", "torch-2")
LOGS = REPOSITORY / ".pytest-ranks"
_KINDS: dict[str, Literal["none", "mpi", "torch"]] = {"threads": "none", "mpi": "mpi", "torch": "torch"}
_COUNTS = ("tests", "failures", "errors", "skipped")
_STOP_SECONDS = 15.0
_LOOK_SECONDS = 0.05


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
class Part:
    """One session of pytest: a ring, or some of its files."""

    ring: Ring
    name: str
    options: tuple[str, ...]
    """pytest's."""
    cores: int
    """How many it keeps busy."""


@dataclass(frozen=True)
class Result:
    """How a part went; ``problem`` is what the counts do not tell, if anything."""

    part: Part
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""

    @property
    def failures(self) -> int:
        """Failed tests; a part that did not come to its end has at least one."""
        return max(self.failed, 1 if self.problem else 0)


def parts_of(ring: Ring, options: Sequence[str], cores: int) -> list[Part]:
    """The sessions that ``ring`` consists of on a machine of ``cores``.

    All tests of ``threads`` are two sessions, as threads use one core: those of ranks as threads, and beside them those
    of the pure parts and of whole programs. With ``options``, which may name files or end at the first failure, a ring
    is one session.
    """
    if ring.kind != "none":
        return [Part(ring, ring.name, tuple(options), ring.size)]
    if options or cores < 2:
        return [Part(ring, ring.name, tuple(options), cores)]
    return [
        Part(ring, f"{ring.name}-programs", ("tests", "--ignore=tests/ranks"), 1),
        Part(ring, f"{ring.name}-ranks", ("tests/ranks",), 1),
    ]


class Session:
    """One pytest at work. It owns its processes until :attr:`result` is there.

    Args:
        part: What to run.
        limit: Seconds, after which it is stopped.
        live: Print as it goes; else all at once, when it has ended.
    """

    def __init__(self, part: Part, limit: float, live: bool) -> None:
        self.part = part
        self.result: Result | None = None
        self._limit = limit
        self._started = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._output: BinaryIO | None = None
        LOGS.mkdir(exist_ok=True)
        self._report = LOGS / f"{part.name}.xml"
        self._report.unlink(missing_ok=True)
        shutil.rmtree(LOGS / part.name, ignore_errors=True)
        try:
            launcher = launch_command(part.ring.kind, part.ring.size)
        except FileNotFoundError as error:
            self.result = Result(part, problem=str(error))
            return
        # mpiexec gives each rank a terminal of its own, so pytest cannot tell whether there is one.
        color = f"--color={'yes' if sys.stdout.isatty() else 'no'}"
        command = [*launcher, "-m", "pytest", f"--junitxml={self._report}", color, *part.options]
        # More patience than at a desk: a rank that is late on a busy machine is not stuck. And of the hundreds of
        # processes that are started the first alone is to compile the package.
        environment = {"HEATOPT_TEST_GRACE": "20"} | child_environment(
            HEATOPT_TEST_LOGS=str(LOGS / part.name), PYTHONDONTWRITEBYTECODE=""
        )
        self._output = None if live else (LOGS / f"{part.name}.log").open("w+b")
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT if self._output else None,
            start_new_session=True,
        )

    def look(self) -> None:
        """Find out whether it has ended, and stop it where it has taken too long."""
        if self.result is not None or self._process is None:
            return
        seconds = time.monotonic() - self._started
        code = self._process.poll()
        if code is not None or seconds > self._limit:
            self.stop()
            self.result = read_result(self.part, self._report, code, self._limit, seconds)

    def stop(self) -> None:
        """End all processes, if there are any left, and print what has not been printed."""
        if self._process is not None and self._process.poll() is None:
            _stop(self._process)
        if self._output is not None:
            self._output.seek(0)
            print(f"\n##### {self.part.name} printed:", flush=True)
            shutil.copyfileobj(self._output, sys.stdout.buffer)
            sys.stdout.flush()
            self._output.close()
            self._output = None


def run_parts(parts: Sequence[Part], limit: float, total: float, cores: int) -> list[Result]:
    """Run ``parts`` in their order, beside each other as far as there are ``cores``, and return how they went.

    Args:
        limit: Seconds for one part.
        total: Seconds for all of them.
    """
    deadline = time.monotonic() + total
    waiting, working, results = list(parts), [], []
    try:
        while waiting or working:
            while waiting and _needs(waiting[0], cores) <= cores - sum(_needs(s.part, cores) for s in working):
                part = waiting.pop(0)
                alone = _needs(part, cores) == cores
                print(f"\n##### {part.name}" + ("" if alone else ": prints when it has ended"), flush=True)
                working.append(Session(part, max(min(limit, deadline - time.monotonic()), 0.0), live=alone))
            for session in list(working):
                session.look()
                if session.result is not None:
                    working.remove(session)
                    results.append(session.result)
            time.sleep(_LOOK_SECONDS)
    finally:
        for session in working:
            session.stop()
    return results


def _needs(part: Part, cores: int) -> int:
    return min(part.cores, cores)


def read_result(part: Part, report: Path, code: int | None, limit: float, seconds: float) -> Result:
    """Judge a part by its JUnit report and its exit ``code`` (None: it ran into the limit)."""
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
    return Result(part, passed, failed, counts["skipped"], seconds, problem)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """An interrupted pytest still sums up; a launcher that is asked to end takes its ranks along, a killed one not."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
            return


def print_summary(results: Sequence[Result]) -> None:
    """One line for each part, then the total."""
    print(f"\n{'ring':<18}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for result in results:
        verdict = result.problem or ("FAILED" if result.failed else "ok")
        print(
            f"{result.part.name:<18}{result.passed:>8}{result.failures:>8}{result.skipped:>9}{result.seconds:>9.1f}"
            f"  {verdict}"
        )
    print(f"{sum(result.passed for result in results)} passed, {sum(result.failures for result in results)} failed")


def main(arguments: Sequence[str]) -> int:
    """Run the rings named in ``arguments``; the exit code is 0 if all tests of all rings passed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, options = arguments[:end], arguments[end + 1 :]
    parser = argparse.ArgumentParser(prog="rings", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("ring", nargs="*", type=Ring.parse, help=f"default: {' '.join(ALL_RINGS)}")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for one session (default: %(default)g)")
    parser.add_argument("--total", type=float, default=4500.0, help="seconds for all (default: %(default)g)")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--cores", type=int, default=available, help="cores to keep busy (default: %(default)s)")
    chosen = parser.parse_args(own)
    # Each ends as by Ctrl-C: what is at work is stopped first. A shell starts what is in the background deaf to SIGINT.
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.default_int_handler)
    rings = chosen.ring or [Ring.parse(name) for name in ALL_RINGS]
    parts = [part for ring in rings for part in parts_of(ring, options, chosen.cores)]
    results = run_parts(parts, chosen.limit, chosen.total, chosen.cores)
    print_summary(results)
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
