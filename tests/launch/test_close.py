"""What is left of communicators that have been closed, or that nobody has any more: nothing."""

from __future__ import annotations

import pytest

from tests.support.launch import LAUNCH
from tests.support.launcher import Kind, launch

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="starts launchers itself")


@pytest.mark.parametrize("kind", ["mpi", "env"], ids=["mpirun", "variables"])  # pytest-mpi takes "mpi" for its marker
def test_closed_worlds_leave_nothing(kind: Kind) -> None:
    job = launch("closed.py", kind=kind)
    assert set(job.returncodes) == {0}, job.text
    assert job.stdout.count("has finished") == 2
    assert job.stderr.strip() == "", job.text
