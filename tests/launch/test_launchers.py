"""The same program under every launcher, from no launcher at all to MPI and torch.distributed at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.launch import LAUNCH
from tests.support.launcher import Finished, Kind, blocked_module, launch

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="starts launchers itself")


def assert_healthy(job: Finished, size: int) -> None:
    """All ranks have come to their end, and nothing was complained about."""
    assert set(job.returncodes) == {0}, job.text
    assert sorted(re.findall(r"^rank (\d+)", job.stdout, re.MULTILINE)) == [str(rank) for rank in range(size)], job.text
    assert job.stderr.strip() == "", job.text


def test_no_launcher() -> None:
    job = launch("healthy.py", 1, size=1, kind="none")
    assert_healthy(job, 1)
    assert job.stdout == "rank 0 of 1 | SingleCommunicator | (0, 0, 1, 1)\n"


@pytest.mark.parametrize(
    ("size", "late", "per_node", "places"),
    [
        (2, 1, "", ["(0, 0, 2, 1)", "(0, 1, 2, 1)"]),
        (3, 0, "2", ["(0, 0, 2, 2)", "(0, 1, 2, 2)", "(1, 0, 1, 2)"]),
    ],
)
def test_mpirun(size: int, late: int, per_node: str, places: list[str]) -> None:
    job = launch("healthy.py", late, size=size, env={"HEATOPT_RANKS_PER_NODE": per_node} if per_node else None)
    assert_healthy(job, size)
    wanted = [f"rank {rank} of {size} | MPICommunicator | {place}" for rank, place in enumerate(places)]
    assert sorted(job.stdout.splitlines()) == wanted


@pytest.mark.parametrize(("late", "arguments"), [(0, ()), (1, ("default-group",))], ids=["own", "default-group"])
def test_torchrun_without_mpi4py(late: int, arguments: tuple[str, ...], tmp_path: Path) -> None:
    env = {"HEATOPT_RANKS_PER_NODE": "1", "PYTHONPATH": blocked_module(tmp_path, "mpi4py")}
    job = launch("healthy.py", late, *arguments, kind="torch", env=env)
    assert_healthy(job, 2)
    wanted = [f"rank {rank} of 2 | TorchCommunicator | ({rank}, 0, 1, 2)" for rank in range(2)]
    assert sorted(job.stdout.splitlines()) == wanted


def test_variables_without_a_launcher() -> None:
    """Rank 0 holds the store of torch.distributed, and ends before rank 1 does."""
    assert_healthy(launch("healthy.py", 1, kind="env"), 2)


def test_torch_distributed_from_mpi() -> None:
    assert_healthy(launch("bootstrap.py", 2, size=3), 3)


@pytest.mark.parametrize("kind", ["mpi", "torch"], ids=["mpirun", "torchrun"])  # pytest-mpi takes "mpi" for its marker
def test_one_rank_under_a_launcher(kind: Kind) -> None:
    job = launch("where.py", size=1, kind=kind)
    assert_healthy(job, 1)
    assert job.stdout == "rank 0 of 1 | SingleCommunicator | mpi4py not imported | 600 s\n"


def test_mpirun_without_mpi4py(tmp_path: Path) -> None:
    job = launch("where.py", env={"PYTHONPATH": blocked_module(tmp_path, "mpi4py")})
    assert job.returncode != 0
    assert job.stdout == ""
    assert re.search(r"2 processes were started .*mpi4py.*pip install 'heatopt\[mpi\]'", job.stderr)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("HEATOPT_RANKS_PER_NODE", "0", "mpi"),
        ("HEATOPT_TIMEOUT", "soon", "torch"),
        ("HEATOPT_TIMEOUT", "-1", "none"),
    ],
)
def test_wrong_setting_in_the_environment(name: str, value: str, kind: Kind) -> None:
    job = launch("where.py", size=1 if kind == "none" else 2, kind=kind, env={name: value})
    assert job.returncode != 0
    assert job.stdout == ""
    # Without the error's type: what two ranks write at once is mixed, piece by piece.
    assert re.search(rf"environment variable {name} must be .*got '?{value}", job.stderr), job.text


def test_program_is_run_by_this_python() -> None:
    """A guard of the tests themselves: no launcher of another installation."""
    from tests.support.launch import find_mpiexec

    mpiexec = find_mpiexec()
    assert mpiexec is not None
    beside = Path(sys.executable).parent / "mpiexec"
    assert not beside.exists() or Path(mpiexec) == beside
