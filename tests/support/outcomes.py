"""One outcome of a test out of the outcomes on its ranks."""

from __future__ import annotations

import io
import pickle
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from _pytest._io import TerminalWriter  # no public name, but what pytest hands to toterminal

Kind = Literal["passed", "failed", "skipped", "xfailed", "xpassed"]

_MOST_CHARACTERS = 40_000
_RANK_OF_ERROR = "_heatopt_rank"
_STRICT_XPASS = "[XPASS(strict)]"


@dataclass(frozen=True)
class Outcome:
    """What one rank reports of one phase (setup, call or teardown) of one test."""

    kind: Kind
    message: str = ""
    """One line: the error, or why the test was skipped."""
    path: str = ""
    lineno: int = 0
    text: str = ""
    """The whole failure as pytest would print it."""
    output: tuple[tuple[str, str], ...] = ()
    """What the test printed, under its titles."""

    @classmethod
    def of(cls, report: pytest.TestReport) -> Outcome:
        """Read what the other ranks need to know out of this rank's own ``report``."""
        expected = getattr(report, "wasxfail", None)
        if expected is not None:
            return cls("xfailed" if report.skipped else "xpassed", message=expected)
        if report.passed:
            return cls("passed")
        if report.skipped:
            where = report.longrepr
            reason = str(where[2]) if isinstance(where, tuple) else str(where)
            return cls("skipped", message=reason.removeprefix("Skipped: "))
        text = _text(report.longrepr)
        if text.startswith(_STRICT_XPASS):
            return cls("xpassed", message=text)
        crash = getattr(report.longrepr, "reprcrash", None)
        path, line, _ = report.location
        return cls(
            "failed",
            message=crash.message if crash else text.strip().rpartition("\n")[2],
            path=crash.path if crash else path,
            lineno=crash.lineno if crash else (line or 0) + 1,
            text=text[-_MOST_CHARACTERS:],
            output=tuple((title, content[-_MOST_CHARACTERS:]) for title, content in report.sections),
        )


@dataclass(frozen=True)
class BodyResult(Outcome):
    """What one rank's part of a test returned or raised."""

    value: Any = None
    raised: bytes = b""

    @classmethod
    def failed(cls, error: BaseException) -> BodyResult:
        """Keep ``error`` for the other ranks."""
        message = "".join(traceback.format_exception_only(error)).strip()
        try:
            raised = pickle.dumps(error)
            pickle.loads(raised)
        except Exception:  # an error of any make, which cannot travel
            raised = pickle.dumps(RuntimeError(message))
        kind: Kind = "skipped" if isinstance(error, pytest.skip.Exception) else "failed"
        return cls(kind, message, text="".join(traceback.format_exception(error)), raised=raised)

    def error(self, rank: int) -> BaseException:
        """The error that ``rank`` has raised, to be raised here too."""
        error: BaseException = pickle.loads(self.raised)
        error.__dict__[_RANK_OF_ERROR] = rank
        return error


def is_of_another_rank(error: BaseException) -> bool:
    """Whether ``error`` was raised here only because another rank has raised it."""
    return _RANK_OF_ERROR in error.__dict__


@dataclass(frozen=True)
class Crash:
    """The error in one line, for pytest's short summary."""

    message: str
    path: str = ""
    lineno: int = 0


class RanksRepr:
    """What pytest prints for a test that failed on some ranks: each failure once, under its ranks.

    Args:
        summary: First line, which tells the ranks apart.
        failed: The failed outcomes, by rank.
        rank: This rank.
        own: This rank's own failure, which is printed in its colours, or None.
    """

    def __init__(self, summary: str, failed: dict[int, Outcome], rank: int, own: Any) -> None:
        self.summary = summary
        self.failed = failed
        self.rank = rank
        self.own = own
        first = failed[min(failed)] if failed else Outcome("failed")
        message = f"{rank_names(failed)}: {first.message}" if failed else summary
        self.reprcrash = Crash(message, first.path, first.lineno)

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"{names}\n{failure.text}" for names, failure in self._distinct())])

    def toterminal(self, tw: TerminalWriter) -> None:
        """Write to pytest's terminal writer ``tw``."""
        tw.line(self.summary, bold=True)
        for names, failure in self._distinct():
            tw.sep("_ ", names, bold=True)
            if self.own is not None and failure.text == self.failed[self.rank].text:
                self.own.toterminal(tw)
            else:
                tw.line(failure.text)
        for rank, failure in sorted(self.failed.items()):
            for title, content in failure.output if rank != self.rank else ():  # pytest itself prints this rank's
                tw.sep("-", f"{title} on rank {rank}")
                tw.line(content.rstrip("\n"))

    def _distinct(self) -> list[tuple[str, Outcome]]:
        ranks: dict[str, list[int]] = {}
        for rank, failure in sorted(self.failed.items()):
            ranks.setdefault(failure.text, []).append(rank)
        return [(rank_names(group), self.failed[group[0]]) for group in ranks.values()]


def _text(longrepr: Any) -> str:
    """A failure as pytest prints it, without colours; ``report.longreprtext`` would lose the first indentation."""
    if not hasattr(longrepr, "toterminal"):
        return str(longrepr)
    file = io.StringIO()
    longrepr.toterminal(TerminalWriter(file))
    return file.getvalue().strip("\n")


def rank_names(ranks: Iterable[int]) -> str:
    """``rank 2`` or ``ranks 0, 3``."""
    ordered = sorted(ranks)
    return f"rank{'' if len(ordered) == 1 else 's'} {', '.join(map(str, ordered))}"


def agreed_kind(kinds: Sequence[Kind]) -> Kind | None:
    """The outcome of a test whose ranks ended with ``kinds``; None when some ran it and others skipped it."""
    found = set(kinds)
    if "failed" in found:
        return "failed"
    if len(found) == 1:
        return kinds[0]
    return "xfailed" if found == {"xfailed", "xpassed"} else None


def agree(report: pytest.TestReport, outcomes: Sequence[Outcome], rank: int) -> None:
    """Make this rank's ``report`` say what the ``outcomes`` of all ranks say together."""
    kind = agreed_kind([outcome.kind for outcome in outcomes])
    if kind == "xfailed" and outcomes[rank].kind == "xpassed":
        report.outcome = "skipped"
        report.wasxfail = next(outcome.message for outcome in outcomes if outcome.kind == "xfailed")
    if kind not in ("failed", None):
        return
    failed = {other: outcome for other, outcome in enumerate(outcomes) if outcome.kind == "failed"}
    own = report.longrepr if rank in failed and hasattr(report.longrepr, "toterminal") else None
    report.longrepr = RanksRepr(_summary(outcomes), failed, rank, own)  # type: ignore[assignment]
    report.outcome = "failed"
    if hasattr(report, "wasxfail"):
        del report.wasxfail


def _summary(outcomes: Sequence[Outcome]) -> str:
    """``failed on rank 1, passed on ranks 0, 2``, with the reason where a rank skipped."""
    by_kind: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    for rank, outcome in enumerate(outcomes):
        by_kind.setdefault(outcome.kind, []).append(rank)
        if outcome.kind == "skipped":
            reasons[outcome.kind] = f" ({outcome.message})"
    parts = [f"{kind} on {rank_names(ranks)}{reasons.get(kind, '')}" for kind, ranks in sorted(by_kind.items())]
    return ("" if "failed" in by_kind else "the ranks disagree: ") + ", ".join(parts)
