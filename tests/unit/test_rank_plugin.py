"""What pytest does on several ranks, shown by sessions of their own that fail, hang and disagree."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import pytest

from tests.support import rank_options
from tests.support.launch import LAUNCH, REPOSITORY, Launch, child_environment, detect, find_mpiexec, launch_command
from tests.support.outcomes import Kind, Outcome, RanksRepr, agreed_kind

_MOST_SECONDS = 100  # below the limit of a test
_CONFTEST = 'pytest_plugins = ["tests.support.rank_plugin", "tests.support.rank_options", "tests.support.ranks"]\n'
_HEAD = """
import os, sys
import pytest
from tests.support.launch import LAUNCH
rank = LAUNCH.rank

def barrier():
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()
"""

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="starts launchers of its own")
needs_mpiexec = pytest.mark.skipif(find_mpiexec() is None, reason="there is no mpiexec")


class Session:
    """A pytest session on the ranks of a launcher, run to its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.code = 0
        self.output = ""
        (folder / "conftest.py").write_text(_CONFTEST)
        (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers --color=no -p no:cacheprovider\n")

    def run(
        self, source: str, size: int, *options: str, kind: Literal["none", "mpi", "torch"] = "mpi", limit: float = 30
    ) -> Session:
        """Run the tests in ``source``, each of which may take ``limit`` seconds."""
        (self.folder / "test_it.py").write_text(_HEAD + textwrap.dedent(source))
        environment = child_environment(
            PYTHONPATH=str(REPOSITORY),
            HEATOPT_TEST_TIMEOUT=str(limit),
            HEATOPT_TEST_GRACE="1",
            HEATOPT_TEST_LOGS="logs",
        )
        done = subprocess.run(
            [*launch_command(kind, size), "-m", "pytest", *options],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_MOST_SECONDS,
            check=False,
        )
        self.code = done.returncode
        self.output = done.stdout.decode(errors="replace").replace("\r\n", "\n")
        print(self.output)
        return self

    def counts(self) -> str:
        """The counts of pytest's last line, of which there must be one only: that of rank 0."""
        lines = re.findall(r"^=+ (\d+ \w+.*) in [\d.]+s", self.output, re.MULTILINE)
        assert len(lines) == 1
        return lines[0]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path)


@needs_mpiexec
def test_passing_session_prints_one_summary(session: Session) -> None:
    session.run("def test_a(): barrier()\n@pytest.mark.mpi\ndef test_b(): print('seen by nobody')", 2)
    assert (session.code, session.counts()) == (0, "2 passed")
    assert session.output.count("test session starts") == 1
    assert "2 passed" in (session.folder / "logs" / "rank1.log").read_text()
    assert "MPI Information" not in session.output


@needs_mpiexec
def test_failure_on_another_rank_is_shown_once_with_its_rank(session: Session) -> None:
    session.run(
        """
        def test_two(): print("told by", rank); assert rank != 2, "two is bad"
        def test_good(): barrier()
        """,
        3,
    )
    assert (session.code, session.counts()) == (1, "1 failed, 1 passed")
    assert session.output.count("AssertionError: two is bad") == 2  # the failure itself and the short summary
    assert "failed on rank 2, passed on ranks 0, 1" in session.output
    assert "FAILED test_it.py::test_two - rank 2: AssertionError: two is bad" in session.output
    assert "told by 2" in session.output


@needs_mpiexec
def test_all_phases_and_outcomes_agree(session: Session) -> None:
    session.run(
        """
        @pytest.fixture
        def bad_start():
            if rank == 1: raise OSError("no disk")
        @pytest.fixture
        def bad_end():
            yield
            if rank == 1: raise OSError("disk full")
        def test_start(bad_start): barrier(); raise AssertionError("never run")
        def test_end(bad_end): barrier()
        def test_skip(): pytest.skip("everywhere")
        def test_skip_one():
            if rank == 1: pytest.skip("alone")
        @pytest.mark.xfail(strict=True)
        def test_expected(): assert rank != 1
        """,
        2,
        "-rs",
    )
    # test_end is passed, then an error; test_start is an error; test_skip_one has failed.
    assert (session.code, session.counts()) == (1, "1 failed, 1 passed, 1 skipped, 1 xfailed, 2 errors")
    assert "the ranks disagree: passed on rank 0, skipped on rank 1 (alone)" in session.output
    assert "never run" not in session.output.replace('raise AssertionError("never run")', "")


@needs_mpiexec
def test_failure_before_a_collective_call_ends_the_job(session: Session) -> None:
    session.run(
        """
        def test_stuck():
            assert rank != 1, "one is bad"
            barrier()
        """,
        3,
    )
    assert session.code == 1
    assert "ranks 0, 2 did not come to the end of test_it.py::test_stuck" in session.output
    assert "AssertionError: one is bad" in session.output
    for other in (0, 2):
        assert re.search(rf"stacks of rank {other} ---\n(?!---).*\n.*in barrier\n.*in test_stuck\n", session.output)


@needs_mpiexec
def test_body_that_fails_on_one_rank_fails_the_test_alone(session: Session) -> None:
    session.run(
        """
        def test_one(ranks):
            def body(comm):
                if comm.rank == 1: raise LookupError("one is bad")
            ranks(body)
        def test_raises(ranks):
            def body(comm):
                if comm.rank == 1: raise LookupError("one is bad")
            with pytest.raises(LookupError, match="one is bad"):
                ranks(body)
        def test_good(ranks):
            assert ranks(lambda comm: comm.rank) == [0, 1]
        """,
        2,
    )
    assert (session.code, session.counts()) == (1, "1 failed, 2 passed")
    assert "failed on rank 1, passed on rank 0" in session.output
    assert session.output.count("E       LookupError: one is bad") == 1
    assert "tests/support/ranks.py" not in session.output


@needs_mpiexec
def test_body_that_fails_before_a_collective_call_ends_the_job(session: Session) -> None:
    session.run(
        """
        def test_stuck(ranks):
            def body(comm):
                assert comm.rank == 0, "never comes"
                comm.barrier()
            ranks(body)
        """,
        2,
    )
    assert session.code == 1
    assert "AssertionError: never comes" in session.output


@needs_mpiexec
def test_hang_ends_with_the_stacks_of_all_ranks(session: Session) -> None:
    session.run("def test_hang():\n    if rank == 0: barrier()", 2, limit=2)
    assert session.code == 124
    assert "more than 2 s in test_it.py::test_hang" in session.output
    assert re.search(r"stacks of rank 0 ---\n.*\n.*in barrier\n.*in test_hang\n", session.output)
    assert re.search(r"stacks of rank 1 ---\n.*\n.*waits for the others", session.output)


@needs_mpiexec
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("@pytest.mark.parametrize('n', range(2 + rank))\ndef test_n(n): pass", "2 is nothing on rank 0"),
        ("if rank == 1: raise RuntimeError('no import')\ndef test_a(): pass", "RuntimeError: no import"),
    ],
    ids=["tests", "import"],
)
def test_ranks_that_collect_differently_run_nothing(session: Session, source: str, message: str) -> None:
    session.run(source, 2)
    assert session.code == 3
    assert message in session.output
    assert "passed" not in session.output


@needs_mpiexec
def test_first_failure_stops_all_ranks(session: Session) -> None:
    session.run("def test_a(): assert rank != 1\ndef test_b(): barrier()", 3, "-x", "--junitxml=report.xml")
    assert (session.code, session.counts()) == (1, "1 failed")
    assert 'failures="1" skipped="0" tests="1"' in (session.folder / "report.xml").read_text()
    assert "report.xml" not in (session.folder / "logs" / "rank1.log").read_text()


@needs_mpiexec
@pytest.mark.parametrize(
    ("end", "code", "message"),
    [("pytest.exit('enough')", 2, "rank 1 has left the session: .*enough"), ("os._exit(7)", 7, "")],
    ids=["exit", "dies"],
)
def test_rank_that_leaves_takes_the_others_along(session: Session, end: str, code: int, message: str) -> None:
    session.run(f"def test_a():\n    if rank == 1: {end}\ndef test_b(): barrier()", 2)
    assert session.code == code
    assert re.search(message, session.output)


def test_torchrun_leaves_the_default_group_to_the_tests(session: Session) -> None:
    session.run(
        """
        import torch.distributed as dist
        def test_group(): dist.init_process_group("gloo"); dist.barrier(); dist.destroy_process_group()
        def test_one(): assert rank != 1, "one is bad"
        """,
        2,
        kind="torch",
    )
    assert (session.code, session.counts()) == (1, "1 failed, 1 passed")
    assert "FAILED test_it.py::test_one - rank 1: AssertionError: one is bad" in session.output


def test_hang_under_torchrun_ends_with_the_stacks_of_all_ranks(session: Session) -> None:
    session.run("def test_hang():\n    import time\n    if rank == 0: time.sleep(100)", 2, kind="torch", limit=2)
    assert session.code != 0
    assert re.search(r"stacks of rank 0 ---\n.*\n.*in test_hang\n", session.output)


def test_without_launcher_only_the_time_limit_is_left(session: Session) -> None:
    session.run(
        """
        def test_nothing_is_started(): assert "mpi4py" not in sys.modules and "torch" not in sys.modules
        @pytest.mark.mpi
        def test_mpi(): barrier()
        @pytest.mark.launched
        def test_launched(): barrier()
        """,
        1,
        kind="none",
    )
    assert (session.code, session.counts()) == (0, "1 passed, 2 skipped")
    session.run("def test_hang():\n    import time; time.sleep(100)", 1, kind="none", limit=1)
    assert session.code == 124
    assert re.search(r"more than 1 s in test_it.py::test_hang ===\n+.*\n.*in test_hang\n", session.output)


@pytest.mark.parametrize(
    ("kind", "argument", "name", "left_out"),
    [
        ("none", "tests", "unit", None),
        ("mpi", "tests", "unit", True),
        ("torch", "tests", "test_architecture.py", True),
        ("mpi", "tests", "ranks", None),
        ("mpi", "tests/unit/test_rings.py::test_result", "unit", None),
    ],
)
def test_launcher_runs_the_tests_of_ranks_alone(
    monkeypatch: pytest.MonkeyPatch,
    kind: Literal["none", "mpi", "torch"],
    argument: str,
    name: str,
    left_out: bool | None,
) -> None:
    monkeypatch.setattr(rank_options, "LAUNCH", Launch(kind))
    config = Mock(args=[argument])
    config.invocation_params.dir = REPOSITORY
    assert rank_options.pytest_ignore_collect(REPOSITORY / "tests" / name, config) is left_out


@pytest.mark.parametrize(
    ("kind", "left"), [("mpi", ["plain", "not skipped"]), ("none", ["plain", "not skipped", "skipped"])]
)
def test_launcher_leaves_out_what_is_skipped_for_sure(
    monkeypatch: pytest.MonkeyPatch, kind: Literal["none", "mpi"], left: list[str]
) -> None:
    monkeypatch.setattr(rank_options, "LAUNCH", Launch(kind))
    conditions = {"plain": (), "not skipped": (False,), "skipped": (True,)}
    items = [Mock(iter_markers=lambda name, args=args: [Mock(args=args)]) for args in conditions.values()]
    names = dict(zip(items, conditions, strict=True))
    config = Mock()
    rank_options.pytest_collection_modifyitems(config, items)
    assert [names[item] for item in items] == left
    told = [item for call in config.hook.pytest_deselected.mock_calls for item in call.kwargs["items"]]
    assert [names[item] for item in told] == ([] if kind == "none" else ["skipped"])


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["passed", "passed"], "passed"),
        (["passed", "failed", "skipped"], "failed"),
        (["skipped", "skipped"], "skipped"),
        (["passed", "skipped"], None),
        (["xfailed", "xpassed"], "xfailed"),
        (["xpassed", "xpassed"], "xpassed"),
        (["xfailed", "failed"], "failed"),
    ],
)
def test_agreed_kind(kinds: list[Kind], expected: Kind | None) -> None:
    assert agreed_kind(kinds) == expected


def test_equal_failures_are_printed_once() -> None:
    failed = {rank: Outcome("failed", "no", text="E  no" if rank else "E  never") for rank in range(4)}
    assert str(RanksRepr("failed", failed, 0, None)) == "failed\nrank 0\nE  never\nranks 1, 2, 3\nE  no"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("none", 0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}, ("mpi", 1, 2)),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, ("mpi", 2, 4)),
        ({"PMIX_RANK": "3"}, ("mpi", 3, None)),
        ({"SLURM_PROCID": "0"}, ("none", 0, 1)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, ("mpi", 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "3"}, ("none", 0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, ("torch", 1, 3)),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "3", "PMIX_RANK": "0"}, ("torch", 1, 3)),
    ],
)
def test_launcher_is_found_by_its_variables(environment: dict[str, str], expected: tuple[str, int, int | None]) -> None:
    found = detect(environment)
    assert (found.kind, found.rank, found.size) == expected
