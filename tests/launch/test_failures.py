"""What one rank does ends the job on all ranks, soon, with the cause on stderr: real jobs under real launchers."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.support.launch import LAUNCH
from tests.support.launcher import Finished, Kind, launch

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="starts launchers itself")

# The time-out is 600 s where a test sets none, so whatever ends within this was noticed.
SOON = 30.0
PARAMETERS = "decoder.bias, decoder.weight, encoder.bias"


def assert_ended(job: Finished, *patterns: str, survivors: bool = False) -> None:
    """The job has failed soon after the fault, and each pattern is on stderr."""
    assert job.returncode != 0, job.text
    assert job.after_fault is not None, job.text
    assert job.after_fault < SOON, job.text
    for pattern in patterns:
        assert re.search(pattern, job.stderr), f"no {pattern!r} in\n{job.text}"
    if not survivors:
        assert "has finished" not in job.stdout, job.text


# A rank fails


@pytest.mark.parametrize(
    ("where", "rank", "size", "kind"),
    [
        ("before", 0, 2, "mpi"),
        ("after", 1, 2, "mpi"),
        ("hook", 3, 4, "mpi"),
        ("before", 1, 2, "torch"),
    ],
)
def test_exception(where: str, rank: int, size: int, kind: Kind) -> None:
    job = launch("train.py", f"raise-{where}", rank, size=size, kind=kind)
    assert_ended(job, r"BatchError: cannot read batch 17", rf"rank {rank} failed with BatchError: cannot read batch 17")
    assert job.stderr.count("BatchError: cannot read batch 17\nheatopt: rank") == 1  # the traceback comes first, once


def test_exit_with_a_code() -> None:
    assert_ended(launch("train.py", "exit-3", 0), "RankFailedError: rank 0 left the program")


def test_exit_with_a_text() -> None:
    job = launch("train.py", "exit-text", 1)
    assert_ended(job, "no licence left", "rank 1 left the program")


@pytest.mark.parametrize(("rank", "size", "kind"), [(0, 2, "mpi"), (1, 2, "torch")])
def test_early_exit_without_an_error(rank: int, size: int, kind: Kind) -> None:
    job = launch("train.py", "exit-0", rank, size=size, kind=kind)
    assert_ended(job, rf"RankFailedError.*rank {rank}\b", "SGD", re.escape(PARAMETERS))


def test_fewer_steps() -> None:
    job = launch("train.py", "fewer-steps", 0, size=3)
    assert_ended(job, r"RankFailedError: rank 0 left the program while rank \d waited", re.escape(PARAMETERS))
    assert "use join()" in job.stderr


def test_end_of_the_program_before_the_optimizer_is_made() -> None:
    assert_ended(launch("train.py", "leave-first", 1), "RankFailedError: rank 1 left the program")


@pytest.mark.parametrize(
    ("fault", "size", "kind", "named"),
    [
        # The launcher notices, and names the rank.
        ("os-exit-7", 2, "mpi", r"rank 1\b|,1\]"),
        ("kill", 3, "mpi", r"rank 1\b|,1\]"),
        # To torchrun that is a good end.
        ("os-exit-0", 2, "torch", r"rank 0 lost contact in step\(\) of SGD"),
    ],
    ids=["exit", "kill", "exit-torchrun"],
)
def test_sudden_death(fault: str, size: int, kind: Kind, named: str) -> None:
    assert_ended(launch("train.py", fault, 1, size=size, kind=kind), named)


@pytest.mark.parametrize(
    ("fault", "size", "kind", "named"),
    [
        ("kill-update", 3, "mpi", r"rank 1\b|,1\]"),
        ("os-exit-0-update", 2, "torch", "rank 0 lost contact in the meeting before an update of shared parameters"),
        ("sleep-update", 2, "mpi", "CollectiveTimeoutError.*the meeting before an update of shared parameters"),
    ],
    ids=["kill", "exit-torchrun", "stall"],
)
def test_a_rank_that_others_wait_for_before_they_write_shared_parameters(
    fault: str, size: int, kind: Kind, named: str
) -> None:
    """Where it is between the header of ``step()`` and the update. Nothing of the memory stays behind."""
    options = '{"shard": "state", "parameters_per_node": "shared"}'
    assert_ended(launch("train.py", fault, 1, 4, options, size=size, kind=kind), named)
    assert [path.name for path in Path("/dev/shm").glob("*heatopt*")] == []


def test_the_host_of_the_store_does_not_wait_for_a_dead_rank() -> None:
    """Rank 0 goes last, but rank 1 was killed after their last step."""
    job = launch("train.py", "kill-end", 1, kind="env")
    assert job.returncodes == (0, -signal.SIGKILL), job.text
    assert_ended(job, survivors=True)
    assert job.stdout.count("has finished") == 1


def test_abort() -> None:
    job = launch("train.py", "abort", 1)
    assert_ended(job, "heatopt: the disk is full")
    assert job.returncode == 5


# Ranks do not do the same


@pytest.mark.parametrize(("size", "kind"), [(3, "mpi"), (2, "torch")])
def test_disagreements_are_errors_on_all_ranks(size: int, kind: Kind, tmp_path: Path) -> None:
    """Each is caught on all ranks, with the same text, and training goes on."""
    job = launch("mismatches.py", tmp_path, size=size, kind=kind)
    assert job.returncode == 0, job.text
    assert job.stdout.count("has finished") == size
    odd = f"rank {size - 1}"
    expected = {
        "construction": (r"rank 0 .*", rf"{odd} .*allreduce"),
        "shape": (r"'a\.weight' of shape \(6, 4\)", rf"{odd} has 'a\.weight' of shape \(7, 4\)"),
        "count": (r"rank 0 has 4, ", rf"{odd} has 6.*{odd} has 'c\.weight'"),
        "dtype": (r"rank 0 has 'b\.weight' .*float32", rf"{odd} has 'b\.weight' .*bfloat16"),
        "order": (r"rank 0 has 'a\.weight'", rf"{odd} has 'b\.bias'", "another order"),
        "names": (r"rank 0 has 'b\.weight'", rf"{odd} has 'x\.weight'"),
        "group_count": (r"'b\.weight' .*group 0", rf"{odd} has 'b\.weight' .*group 1"),
        "option": (r"'weight_decay'.*rank 0 has 0\.01", r"rank 1 has 0\.02"),
        "algorithm": (r"rank 0 has Adadelta", rf"{odd} has Adagrad"),
        "setting": (r"bucket_mb.*rank 0 has 4", rf"{odd} has 3"),
        "learning_rate": (r"'lr'.*rank 0 has 0\.1", rf"{odd} has 0\.2"),
        "clip": (r"rank 0 is in step\(\)", rf"{odd} is in clip_grad_norm_\(\)"),
        "clip_without_backward": (r"rank 0 is in step\(\)", rf"{odd} is in clip_grad_norm_\(\)"),
        "added_group": (r"rank 0 is in step\(\)", rf"{odd} is in add_param_group\(\)"),
    }
    reports = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(size)]
    assert reports == [reports[0]] * size
    found = dict(line.split(": ", 1) for line in reports[0].splitlines())
    assert found.keys() == expected.keys()
    for name, patterns in expected.items():
        for pattern in patterns:
            assert re.search(pattern, found[name]), f"{name}: no {pattern!r} in {found[name]}"


def test_disagreement_that_nobody_catches(tmp_path: Path) -> None:
    job = launch("mismatches.py", tmp_path, "shape")
    assert_ended(job, r"RankMismatchError: .*rank 1 has 'a\.weight' of shape \(7, 4\)")


@pytest.mark.parametrize(
    ("fault", "call", "size", "kind"),
    [
        ("barrier", "barrier", 2, "mpi"),
        ("allreduce", "allreduce mean", 2, "torch"),
    ],
)
def test_ranks_that_wait_for_each_other(fault: str, call: str, size: int, kind: Kind) -> None:
    job = launch("train.py", fault, 1, size=size, kind=kind)
    assert_ended(job, r"RankMismatchError: rank \d waits in .* while rank \d waits in ", call, "SGD")


# A rank is late


@pytest.mark.parametrize(
    ("fault", "rank", "size", "kind", "call", "argument"),
    [
        ("sleep-before", 1, 2, "mpi", "backward", False),
        ("sleep-after", 2, 3, "mpi", "step", True),
        ("sleep-after", 0, 2, "torch", "step", True),
    ],
    ids=["environment", "argument", "torchrun"],
)
def test_stall(fault: str, rank: int, size: int, kind: Kind, call: str, argument: bool) -> None:
    env = {} if argument else {"HEATOPT_TIMEOUT": "3"}
    job = launch("train.py", fault, rank, *([3] if argument else []), size=size, kind=kind, env=env)
    assert_ended(
        job,
        rf"CollectiveTimeoutError: rank \d waited 3 s in {call}\(\) of SGD \(bucket 0: {re.escape(PARAMETERS)}",
        rf"late: rank {rank} \(at .*train\.py:\d+",
    )


@pytest.mark.parametrize("kind", ["mpi", "torch"], ids=["mpirun", "torchrun"])  # pytest-mpi takes "mpi" for its marker
def test_slow_but_right(kind: Kind) -> None:
    job = launch("slow.py", kind=kind, env={"HEATOPT_TIMEOUT": "3"})
    assert job.returncode == 0, job.text
    assert job.stdout.count("has finished") == 2


def test_polling_does_not_hide_a_dead_rank() -> None:
    """Without a launcher that ends rank 0 as well: it has to find out."""
    job = launch("polling.py", kind="env")
    assert job.returncodes == (1, 1), job.text
    assert "RankFailedError: rank 0 lost contact" in job.stderr
    assert "completed" not in job.stdout


# Works in the background


@pytest.mark.parametrize(("size", "kind"), [(3, "mpi"), (2, "torch")])
def test_a_program_ends_with_works_in_the_background(size: int, kind: Kind) -> None:
    """They arrive: other ranks may wait for them."""
    job = launch("background.py", "forgotten", size=size, kind=kind)
    assert job.returncode == 0, job.text
    assert job.stdout.count(f"arrived: {[[float(size)]] * 3}") == size, job.text


@pytest.mark.parametrize(("size", "kind"), [(2, "mpi"), (2, "torch")])
def test_a_rank_that_never_launches_is_named_at_the_end(size: int, kind: Kind) -> None:
    job = launch("background.py", "missing", size=size, kind=kind)
    assert_ended(job, "rank 1 left the program while rank 0 waited for it in a forgotten average|rank 0 lost contact")
