"""``scripts/bench_step.py`` starts its contenders, compares what they compute, and says which are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import LAUNCH, REPOSITORY, child_environment

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="starts launchers itself")

SCRIPT = REPOSITORY / "scripts" / "bench_step.py"
CONTENDERS = ["no synchronisation", "meeting only", "heatopt", "DDP gloo"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def missing_package(tmp_path: Path) -> str:
    """A folder in which a package that cannot be imported stands before any real one."""
    (tmp_path / "heat.py").write_text("raise ImportError('no heat here')\n")
    return os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_contenders_take_turns_in_jobs_of_their_own(tmp_path: Path, missing_package: str) -> None:
    out = tmp_path / "out.json"
    job = run(
        *("--workloads", "many-small", "--contenders", *CONTENDERS, "Heat blocking"),
        *("--rounds", "2", "--launches", "2", "--steps", "1", "--warm-up", "5", "--json", str(out)),
        PYTHONPATH=missing_package,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    found = json.loads(out.read_text())
    [result] = found["results"]
    assert list(result["milliseconds"]) == CONTENDERS
    assert all(len(times) == 4 and min(times) > 0 for times in result["milliseconds"].values())
    digests = result["parameters after 5 steps"]
    assert list(digests) == ["heatopt", "DDP gloo"]
    assert len(set(digests.values())) == 1, digests
    assert result["missing"] == {"Heat blocking": "no heat here"}
    assert "without Heat blocking: no heat here" in job.stdout
    assert found["setting"]["ranks"] == 2
    assert result["reports"]["heatopt"]["ranks"] == 2
    again = run("--read", str(out), "--png", str(tmp_path / "out.png"))
    assert again.returncode == 0, again.stderr
    table = job.stdout[: job.stdout.index("without Heat")]
    assert again.stdout[: len(table)] == table
    assert (tmp_path / "out.png").stat().st_size > 0


def test_nothing_to_measure(missing_package: str) -> None:
    job = run("--workloads", "many-small", "--contenders", "Heat blocking", PYTHONPATH=missing_package)
    assert job.returncode == 1
    assert "no contender could start" in job.stderr


@pytest.mark.parametrize(
    "arguments", [["--ranks", "0"], ["--rounds", "0"], ["--steps", "0"], ["--launches", "0"], ["--warm-up", "4"]]
)
def test_wrong_numbers(arguments: list[str]) -> None:
    job = run(*arguments)
    assert job.returncode == 2
    assert "must be at least 1, --warm-up at least 5" in job.stderr
