"""pytest on several ranks: one summary, the same outcome everywhere, and no hang.

Under mpiexec, srun or torchrun every rank runs pytest on the same tests. This plugin makes the ranks agree on what
they collected and, after setup, call and teardown of each test, on how it went: a test that failed on one rank
has failed on all, with that rank's failure in the one summary that rank 0 prints. Without a launcher only the time
limit of each test is left of it.

Environment:
    HEATOPT_TEST_TIMEOUT: Seconds for one test (default 120; 0: no limit). Then all stacks are printed and the job ends.
    HEATOPT_TEST_GRACE: Seconds (default 5) that a rank whose test failed or was skipped waits for the others, which may
        be stuck in a collective call without it, before the job is ended in the same way.
    HEATOPT_TEST_LOGS: Folder (default .pytest-ranks) for the reports of all ranks but the first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn, TextIO

import pytest

from tests.support.exchange import Exchange, MissingRanksError, open_exchange
from tests.support.launch import LAUNCH, Launch
from tests.support.outcomes import BodyResult, Outcome, agree, is_of_another_rank, rank_names
from tests.support.watchdog import Watchdog

_DISAGREED = 3
_FAILED = 1
_LEAVE_SECONDS = 10.0
_LEAST_PATIENCE_SECONDS = 60.0
_END = ("end",)

Step = tuple[str, ...]


@dataclass(frozen=True)
class Leaving:
    """What a rank says when its session ends, be it at the end or before."""

    exit_code: int
    reason: str


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise pytest.UsageError(f"{name} must be a number of seconds, not {text!r}") from None


class RankSession:
    """The session of one rank, in step with those of the others."""

    def __init__(self, config: pytest.Config, launch: Launch) -> None:
        debugging = config.getoption("usepdb")
        self.limit = 0.0 if debugging else _seconds("HEATOPT_TEST_TIMEOUT", 120.0)
        # Before and after the tests: imports and the launcher's own time, however short the limit of a test is.
        self._patience = self.limit and max(self.limit, _LEAST_PATIENCE_SECONDS)
        self.grace = None if debugging else _seconds("HEATOPT_TEST_GRACE", 5.0)
        self.folder = config.rootpath / os.environ.get("HEATOPT_TEST_LOGS", ".pytest-ranks")
        self.exchange: Exchange | None = None
        self._collect_failures: list[str] = []
        self._why_left = ""
        self._in_step = True
        self._failed = True
        self._stacks: Path | None = None
        self._temporary: Path | None = None
        # The terminal itself: pytest does not capture while it configures.
        self._stderr: TextIO = os.fdopen(os.dup(2), "w")
        self.watchdog = Watchdog(launch.rank, self._abort, self._stderr)
        self.watchdog.start("the connection of the ranks", self._patience)
        self.exchange = exchange = open_exchange(launch)
        if exchange.size > 1:
            self._prepare_folder(exchange)
            self._prepare_temporary_folder(config)
        self.watchdog.start("the collection of the tests", self._patience)

    def _prepare_folder(self, exchange: Exchange) -> None:
        processes = exchange.allgather((socket.gethostname(), os.getpid()))
        # A name of its own: other sessions may be at work in this checkout.
        self._stacks = self.folder / "stacks-{}-{}".format(*processes[0])
        self._stacks.mkdir(parents=True, exist_ok=True)
        exchange.allgather(None)
        self.watchdog.connect(processes, self._stacks)

    def _prepare_temporary_folder(self, config: pytest.Config) -> None:
        """A folder of this rank's own: pytest numbers the sessions in a common one, which ranks would do at once."""
        if config.option.basetemp is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="tmp-", dir=self.folder))
            config.option.basetemp = str(self._temporary / "tmp")

    def _abort(self, code: int) -> None:
        if self.exchange is not None:
            self.exchange.abort(code)

    @property
    def ranks(self) -> Exchange:
        """The connection to the other ranks."""
        assert self.exchange is not None
        return self.exchange

    def _send(self, step: Step, value: Any, grace: float | None) -> list[tuple[Step, Any]]:
        try:
            return self.ranks.allgather((step, value), grace)
        except MissingRanksError as missing:
            self._end_stuck_job(step, missing)

    def _swap(self, step: Step, value: Any, grace: float | None = None) -> list[Any]:
        """Give ``value`` to all ranks and return theirs; end the session where a rank is at another step."""
        messages = self._send(step, value, grace)
        if all(other == step for other, _ in messages):
            return [value for _, value in messages]
        self._in_step = False
        for rank, (_, other) in enumerate(messages):
            if isinstance(other, Leaving):
                pytest.exit(f"rank {rank} has left the session: {other.reason}", other.exit_code or _FAILED)
        where = "; ".join(f"rank {rank} at {' '.join(step)}" for rank, (step, _) in enumerate(messages))
        pytest.exit(f"the ranks have lost each other: {where}", _DISAGREED)

    def gather(self, nodeid: str, result: BodyResult) -> list[BodyResult]:
        """Give all ranks what this rank's part of a test came to."""
        return self._swap((nodeid, "body"), result, None if result.kind == "passed" else self.grace)

    def _end_stuck_job(self, step: Step, error: MissingRanksError) -> NoReturn:
        waiting = rank_names(error.missing)
        lines = [f"=== {waiting} did not come to the end of {' '.join(step)} within {self.grace:g} s after others ==="]
        for rank, (_, other) in sorted(error.arrived.items()):
            if isinstance(other, Outcome) and other.kind != "passed":
                lines.append(f"--- rank {rank} {other.kind} ---\n{other.text or other.message}")
                lines += [f"--- {title} on rank {rank} ---\n{content}" for title, content in other.output]
            if isinstance(other, Leaving):
                lines.append(f"--- rank {rank} has left the session: {other.reason} ---")
        self.watchdog.end_job("\n".join(lines), _FAILED)
        raise AssertionError("unreachable: the job has ended")

    def pytest_report_header(self) -> str | None:
        if not LAUNCH.launched:
            return None
        logs = f"; those of the others report in {self.folder}" if self.ranks.size > 1 else ""
        return f"ranks: {self.ranks.size} ({self.ranks.name}){logs}"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._collect_failures.append(report.longreprtext)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if self.ranks.size > 1:
            names = [item.nodeid for item in session.items]
            found = self._swap(("collection",), (names, self._collect_failures))
            problem = _collection_problem([names for names, _ in found], [failures for _, failures in found])
            if problem:
                self._in_step = False  # all ranks see the same and leave together
                pytest.exit(problem, _DISAGREED)
        self.watchdog.end()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.watchdog.start(item.nodeid, self.limit)
        try:
            return (yield)
        finally:
            self.watchdog.end()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if self.ranks.size > 1:
            second_hand = call.excinfo is not None and is_of_another_rank(call.excinfo.value)
            own = Outcome("passed") if second_hand else Outcome.of(report)
            # A rank that went another way may have left the others waiting inside the test.
            grace = None if own.kind == "passed" else self.grace
            agree(report, self._swap((item.nodeid, call.when), own, grace), self.ranks.rank)
        return report

    def pytest_internalerror(self, excrepr: object) -> None:
        self._why_left = f"internal error: {excrepr}"

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self._why_left = excinfo.exconly()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.ranks.size == 1 or not self._in_step:
            return
        self.watchdog.start("the end of the session", self._patience)
        leaving = Leaving(int(exitstatus), self._why_left or f"exit code {int(exitstatus)}")
        messages = self._send(_END, leaving, self.grace if self._why_left else None)
        if all(step == _END for step, _ in messages):
            session.exitstatus = max(leaving.exit_code for _, leaving in messages)
        else:  # this rank has left the others in the middle
            session.exitstatus = session.exitstatus or _FAILED
        self._failed = session.exitstatus != 0

    def close(self) -> None:
        """Leave together: a launcher kills the other ranks when one ends with an error, and rank 0 has to print."""
        sys.stdout.flush()
        with contextlib.suppress(MissingRanksError):
            self.ranks.allgather(None, _LEAVE_SECONDS)
        self.watchdog.close()
        if self._temporary is not None and not self._failed:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if self._stacks is not None:  # no session that ended badly comes here: its stacks are kept
            shutil.rmtree(self._stacks, ignore_errors=True)
        self.ranks.close()
        self._stderr.close()


def _collection_problem(names: list[list[str]], failures: list[list[str]]) -> str:
    """Why the ranks cannot run what they collected, or an empty text; the same on all ranks."""
    if any(failures) and not all(failures):
        texts = [f"--- rank {rank} ---\n{text}" for rank, found in enumerate(failures) for text in found]
        return "\n".join(["the collection failed on some ranks only", *texts])
    for rank, other in enumerate(names):
        for place, (ours, theirs) in enumerate(zip_longest(names[0], other, fillvalue="nothing")):
            if ours != theirs:
                return f"the ranks collected different tests: {place} is {ours} on rank 0, {theirs} on rank {rank}"
    return ""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    try:
        session = RankSession(config, LAUNCH)
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error
    config.pluginmanager.register(session, RankSession.__name__)
    if session.ranks.rank > 0:
        # What plugins take for the sign of a process that leaves the cache, the JUnit file and the like to another.
        config.workerinput = {"workerid": f"rank{session.ranks.rank}"}  # type: ignore[attr-defined]


def pytest_unconfigure(config: pytest.Config) -> None:
    session = config.pluginmanager.unregister(name=RankSession.__name__)
    if session is not None:
        session.close()
