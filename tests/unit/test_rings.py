"""The judgement over a ring of tests: no way to be green without tests that passed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.testing import rings

_RING = rings.Ring.parse("threads")
_PART = rings.Part(_RING, "threads", (), 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("threads", ("none", 1)), ("mpi-3", ("mpi", 3)), ("torch-2", ("torch", 2))],
)
def test_ring_names(name: str, expected: tuple[str, int]) -> None:
    ring = rings.Ring.parse(name)
    assert (ring.kind, ring.size) == expected


@pytest.mark.parametrize("name", ["mpi-", "mpi-0", "threads-2", "torch2"])
def test_unknown_ring(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=name):
        rings.Ring.parse(name)


@pytest.mark.parametrize(
    ("counts", "code", "failures", "problem"),
    [
        ((5, 0, 0, 1), 0, 0, ""),
        ((5, 1, 1, 1), 1, 2, ""),
        ((0, 0, 0, 0), 5, 1, "no test failed, but the exit code is 5"),
        ((3, 0, 0, 3), 0, 1, "no test ran"),
        ((5, 0, 0, 0), 3, 1, "no test failed, but the exit code is 3"),
        ((5, 0, 0, 0), None, 1, "stopped after 60 s"),
        (None, 124, 1, "ended with exit code 124 before its summary"),
        (None, 0, 1, "ended with exit code 0 before its summary"),
    ],
)
def test_result(
    tmp_path: Path, counts: tuple[int, int, int, int] | None, code: int | None, failures: int, problem: str
) -> None:
    report = tmp_path / "report.xml"
    if counts is not None:
        names = ("tests", "failures", "errors", "skipped")
        attributes = " ".join(f'{name}="{count}"' for name, count in zip(names, counts, strict=True))
        report.write_text(f"<testsuites><testsuite {attributes}/></testsuites>")
    result = rings.read_result(_PART, report, code, limit=60, seconds=1)
    assert (result.failures, result.problem) == (failures, problem)


def test_parts() -> None:
    """All tests of threads leave a core to each of two sessions; what somebody asks for by name is one session."""
    programs, ranks = rings.parts_of(_RING, [], cores=2)
    assert (programs.options, ranks.options) == (("tests", "--ignore=tests/ranks"), ("tests/ranks",))
    assert (programs.cores, ranks.cores) == (1, 1)
    assert rings.parts_of(_RING, ["-x"], cores=2) == [rings.Part(_RING, "threads", ("-x",), 2)]
    assert rings.parts_of(_RING, [], cores=1) == [rings.Part(_RING, "threads", (), 1)]
    (part,) = rings.parts_of(rings.Ring.parse("mpi-3"), ["-k", "adam"], cores=2)
    assert (part.name, part.options, part.cores) == ("mpi-3", ("-k", "adam"), 3)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], rings.Part]:
    """Parts that run the given Python in place of pytest."""
    monkeypatch.setattr(rings, "LOGS", tmp_path / "logs")
    sources: list[str] = []
    monkeypatch.setattr(rings, "launch_command", lambda kind, size: [sys.executable, "-c", sources[size]])

    def part(source: str, cores: int = 1) -> rings.Part:
        sources.append(source)
        number = len(sources) - 1
        return rings.Part(rings.Ring(f"part{number}", "none", number), f"part{number}", (), cores)

    return part


def test_part_that_hangs_is_stopped(programs: Callable[[str], rings.Part]) -> None:
    """And the one beside it comes to its end."""
    parts = [programs("import time; time.sleep(99)"), programs("pass")]
    ended, stopped = rings.run_parts(parts, limit=3, total=60, cores=2)
    assert (ended.part, ended.problem) == (parts[1], "ended with exit code 0 before its summary")
    assert (stopped.part, stopped.problem) == (parts[0], "stopped after 3 s")
    assert stopped.seconds < 60


def test_parts_run_beside_each_other_as_cores_allow(
    programs: Callable[..., rings.Part], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first two wait for each other; the third, which needs all cores, comes after both; no output is mixed."""
    meet = """if True:
        import pathlib, sys, time
        own, other = pathlib.Path({own!r}), pathlib.Path({other!r})
        own.touch()
        print("begin {name}", flush=True)
        while not other.exists():
            time.sleep(0.01)
        print("end {name}", flush=True)
    """
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    first = programs(meet.format(own=a, other=b, name="first"))
    second = programs(meet.format(own=b, other=a, name="second"))
    third = programs("print('third')", 4)
    results = rings.run_parts([first, second, third], limit=60, total=90, cores=2)
    assert {result.problem for result in results} == {"ended with exit code 0 before its summary"}
    lines = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("#") and line]
    assert sorted([lines[0:2], lines[2:4]]) == [["begin first", "end first"], ["begin second", "end second"]]
    assert lines[4:] == ["third"]


def test_no_time_is_left(programs: Callable[[str], rings.Part]) -> None:
    (result,) = rings.run_parts([programs("import time; time.sleep(99)")], limit=60, total=0, cores=1)
    assert result.problem == "stopped after 0 s"


def test_interrupted_run_stops_its_parts(
    programs: Callable[[str], rings.Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted, there = False, tmp_path / "there"

    def sleep(seconds: float) -> None:
        nonlocal interrupted
        if not interrupted and there.exists() and there.read_text():
            interrupted = True
            raise KeyboardInterrupt

    monkeypatch.setattr(rings.time, "sleep", sleep)
    source = f"import os, pathlib, time; pathlib.Path({str(there)!r}).write_text(str(os.getpid())); "
    parts = [programs(source + "time.sleep(99)"), programs("import time; time.sleep(99)")]
    with pytest.raises(KeyboardInterrupt):
        rings.run_parts(parts, limit=60, total=60, cores=2)
    process = int(there.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_stopped_pytest_still_sums_up(tmp_path: Path) -> None:
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import time\ndef test_bad(): assert False\ndef test_slow(): print('slow', flush=True); time.sleep(99)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-sq", "-p", "no:cacheprovider", "-c", "/dev/null", tests],
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        while "slow" not in process.stdout.readline():
            assert process.poll() is None
        rings._stop(process)
        assert "1 failed" in process.stdout.read()


def test_total_line_comes_last(capsys: pytest.CaptureFixture[str]) -> None:
    rings.print_summary([rings.Result(_PART, passed=3, skipped=1), rings.Result(_PART, passed=4, problem="no end")])
    assert capsys.readouterr().out.splitlines()[-1] == "7 passed, 1 failed"
