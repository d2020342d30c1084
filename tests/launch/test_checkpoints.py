"""Checkpoints of real processes: one is killed while it saves; another launcher goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import heatopt
from heatopt.comm import SingleCommunicator
from tests.support.launch import LAUNCH
from tests.support.launcher import Kind, launch

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="starts launchers itself")


def step_of(path: Path) -> int:
    """The step at which the checkpoint was saved."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(), torch.nn.Linear(5, 2))
    return int(heatopt.load(path, model=model, comm=SingleCommunicator())["step"])


@pytest.mark.parametrize(
    ("size", "rank", "call", "number", "step"),
    [
        (3, 2, "open", 0, 2),
        (2, 1, "write", 1, 2),
        (2, 0, "rename", 1, 2),  # the old one has another name by then
        (2, 0, "unlink", 0, 3),  # of the old one
    ],
    ids=["open", "write", "rename", "unlink"],
)
def test_killed_while_it_saves(size: int, rank: int, call: str, number: int, step: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    job = launch("checkpoint.py", path, "save", rank, call, number, size=size)
    assert job.returncode != 0, job.text
    assert job.after_fault is not None, job.text
    assert "has finished" not in job.stdout
    assert len(list(tmp_path.iterdir())) == 3  # with the lock, which is nobody's any more
    assert step_of(path) == step
    heatopt.save(path, extra=1, comm=SingleCommunicator())
    assert heatopt.load(path, comm=SingleCommunicator()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_killed_at_each_call_of_the_writer(tmp_path: Path) -> None:
    """By SIGKILL, at every system call; the program itself loads what is there, the old or the new, and compares."""
    job = launch("checkpoint_kills.py", tmp_path, kind="none", size=1)
    assert job.returncode == 0, job.text
    kills = list(map(int, re.findall(r"(\d+) kills, found \[1, 2\]", job.stdout)))
    assert len(kills) == 4, job.text
    assert sum(kills) >= 200, job.text


@pytest.mark.parametrize(("kind", "size", "rank"), [("mpi", 2, 0), ("mpi", 3, 2), ("torch", 2, 1), ("none", 1, 0)])
def test_a_failure_that_nobody_waited_for_ends_the_job(kind: Kind, size: int, rank: int, tmp_path: Path) -> None:
    """The last thing that a program does is a save in the background, and it fails on one rank."""
    path = tmp_path / "checkpoint"
    job = launch("checkpoint.py", path, "background", rank, "fsync", 0, "fails", kind=kind, size=size)
    assert job.returncode != 0, job.text
    assert job.stdout.count("has finished with") == size
    assert "CheckpointError: the save in the background failed: " in job.stderr
    assert "OSError: [Errno 28] No space left on device" in job.stderr
    assert step_of(path) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_in_the_background(rank: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    job = launch("checkpoint.py", path, "background", rank, "fsync", 0, size=2)
    assert job.returncode != 0, job.text
    assert step_of(path) == 2


@pytest.mark.parametrize(("mode", "kind", "other"), [("save", "mpi", "torch"), ("background", "torch", "mpi")])
def test_another_launcher_goes_on(mode: str, kind: Kind, other: Kind, tmp_path: Path) -> None:
    """Bit for bit, dropout's masks included; and a program that ends completes its checkpoint first."""
    path = tmp_path / "checkpoint"
    straight = launch("checkpoint.py", path, "straight", kind=kind)
    assert launch("checkpoint.py", path, mode, kind=kind).returncode == 0
    assert step_of(path) == 3
    resumed = launch("checkpoint.py", path, "resume", kind=other)
    assert resumed.returncode == 0, resumed.text
    assert sorted(resumed.stdout.splitlines()) == sorted(straight.stdout.splitlines())
    assert resumed.stdout.count("has finished with") == 2
