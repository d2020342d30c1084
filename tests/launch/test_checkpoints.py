"""Checkpoints of real processes: one is killed while it saves; another launcher goes on."""

from __future__ import annotations

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
    ("size", "rank", "call", "step"),
    [
        (2, 1, 1, 2),  # in the first write of its file
        (3, 2, 0, 2),
        (2, 0, 9, 2),  # in the manifest
        (2, 0, -2, 3),  # while the old one is removed
    ],
    ids=["write", "open", "manifest", "removal"],
)
def test_killed_while_it_saves(size: int, rank: int, call: int, step: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    # Calls of rank 0: file, manifest, two directories, two renames; then unlink of each file, and rmdir.
    job = launch("checkpoint.py", path, "save", rank, call if call >= 0 else 200, size=size)
    if call < 0:
        assert job.returncode == 0, job.text
    else:
        assert job.returncode != 0, job.text
        assert "has finished" not in job.stdout
    assert step_of(path) == step
    assert launch("checkpoint.py", path, "save", size=2).returncode == 0
    assert step_of(path) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


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
