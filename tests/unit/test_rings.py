"""The judgement over a ring of tests: no way to be green without tests that passed."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.testing import rings

_RING = rings.Ring.parse("threads")


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
    result = rings.read_result(_RING, report, code, limit=60, seconds=1)
    assert (result.failures, result.problem) == (failures, problem)


def test_ring_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rings, "LOGS", tmp_path / "logs")
    sleep = [sys.executable, "-c", "import time; time.sleep(99)"]
    monkeypatch.setattr(rings, "launch_command", lambda kind, size: sleep)
    result = rings.run_ring(_RING, [], limit=0.5)
    assert result.problem == "stopped after 0.5 s"
    assert result.seconds < 60


def test_stopped_pytest_still_sums_up(tmp_path: Path) -> None:
    tests = tmp_path / "test_it.py"
    tests.write_text("import time\ndef test_bad(): assert False\ndef test_slow(): print('slow'); time.sleep(99)\n")
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
    rings.print_summary([rings.Result(_RING, passed=3, skipped=1), rings.Result(_RING, passed=4, problem="no end")])
    assert capsys.readouterr().out.splitlines()[-1] == "7 passed, 1 failed"
