"""``heatopt doctor`` alone and under launchers: what it says, and its exit code."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Literal

import pytest

import heatopt
from heatopt.cli import main
from tests.support.launch import LAUNCH, child_environment, launch_command

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="starts launchers itself")


def run(kind: Literal["none", "mpi", "torch"], size: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launch_command(kind, size), "-m", "heatopt", "doctor"],
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        timeout=100,
    )


def lines_of(output: str) -> dict[str, tuple[str, str]]:
    """Level and text by subject; each subject once, so only one rank has printed."""
    found = re.findall(r"^(.{4})  (\S+(?: \S+)*?) {2,}(.*)$", output, re.MULTILINE)
    assert len(found) == len({subject for _, subject, _ in found}), output
    return {subject: (level.strip(), text) for level, subject, text in found}


def test_one_process() -> None:
    job = run("none", 1)
    assert job.returncode == 0, job.stderr
    lines = lines_of(job.stdout)
    assert lines["launcher"] == ("", "single")
    assert lines["ranks"][1].startswith("1 on 1 node(s), SingleCommunicator")
    assert lines["sums"] == ("", "one process: nothing is exchanged")
    assert lines["heatopt"][1].startswith(heatopt.__version__)
    assert job.stdout.endswith("\nall checks passed\n")


@pytest.mark.parametrize(("kind", "backend"), [("mpi", "MPICommunicator"), ("torch", "TorchCommunicator")])
def test_several_ranks(kind: Literal["mpi", "torch"], backend: str) -> None:
    job = run(kind, 2, OMP_NUM_THREADS="1")
    assert job.returncode == 0, job.stderr
    lines = lines_of(job.stdout)
    assert lines["ranks"][1].startswith(f"2 on 1 node(s), {backend}")
    assert lines["sums"][1].startswith("right on all ranks; 8 MiB")
    assert lines["node memory"] == ("", "gradients meet in memory that the ranks of a node share")


def test_memory_that_is_not_shared_is_noted_with_its_reason() -> None:
    lines = lines_of(run("mpi", 3, HEATOPT_SHARED_MEMORY="0", HEATOPT_RANKS_PER_NODE="2").stdout)
    assert lines["ranks"][1].startswith("3 on 2 node(s)")
    level, text = lines["node memory"]
    assert level == "note"
    assert "HEATOPT_SHARED_MEMORY=0" in text
    assert "HEATOPT_RANKS_PER_NODE=2 HEATOPT_SHARED_MEMORY=0" in lines["settings"][1]
    lines = lines_of(run("mpi", 2, HEATOPT_RANKS_PER_NODE="1").stdout)
    assert lines["node memory"] == ("", "not shared: each node has one rank")


def test_too_many_threads_are_noted() -> None:
    level, text = lines_of(run("mpi", 2, OMP_NUM_THREADS="64").stdout)["cores"]
    assert level == "note"
    assert "set OMP_NUM_THREADS=" in text


def test_a_setting_that_is_wrong_is_a_fault() -> None:
    job = run("mpi", 2, HEATOPT_RANKS_PER_NODE="many")
    assert job.returncode == 1
    assert "FAIL  ranks" in job.stdout
    assert "HEATOPT_RANKS_PER_NODE must be an integer >= 1, got 'many'" in job.stdout


def test_sums_that_are_wrong_are_a_fault() -> None:
    import heatopt.cli._doctor as module

    def body(comm: heatopt.Communicator) -> list[module.Finding]:
        if comm.rank == 1:
            comm.reduce_bucket = lambda memory, options, what: memory.own.zero_()  # type: ignore[assignment,method-assign]
        else:
            comm.reduce_bucket = lambda memory, options, what: memory.own.fill_(3.0)  # type: ignore[assignment,method-assign]
        return list(module._exchange(comm))

    for findings in heatopt.comm.ThreadWorld(2).run(body):
        fault = next(finding for finding in findings if finding.subject == "sums")
        assert fault.level is module.Level.FAULT
        assert fault.text.startswith("wrong on ranks [1]")


def test_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["cure"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert "doctor" in capsys.readouterr().err or not arguments


def test_module_runs_as_a_command() -> None:
    job = subprocess.run([sys.executable, "-m", "heatopt", "--help"], capture_output=True, text=True, timeout=60)
    assert job.returncode == 0
    assert "doctor" in job.stdout
