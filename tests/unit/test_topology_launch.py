"""Who started the process, which ranks share a node, and what else the environment says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from heatopt.comm._launch import Launch, detect_launch
from heatopt.comm._settings import DEFAULT_TIMEOUT, check_timeout, default_timeout, ranks_per_node
from heatopt.comm._topology import Topology
from heatopt.errors import RankMismatchError

RENDEZVOUS = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = RENDEZVOUS | {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}
MPICH = {"PMI_SIZE": "5", "PMI_RANK": "2"}
MVAPICH = {"MV2_COMM_WORLD_SIZE": "6", "MV2_COMM_WORLD_RANK": "2"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_NTASKS": "8"}
ALLOCATION = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "17"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({}, Launch("single"), id="nothing"),
        pytest.param({"PATH": "/bin", "HOME": "/root"}, Launch("single"), id="nothing of a launcher"),
        pytest.param(TORCHRUN, Launch("torchrun", 4, "TORCHELASTIC_RUN_ID"), id="torchrun"),
        pytest.param(OPEN_MPI, Launch("mpi", 3, "OMPI_COMM_WORLD_SIZE"), id="Open MPI"),
        pytest.param(MPICH, Launch("mpi", 5, "PMI_SIZE"), id="MPICH"),
        pytest.param(MVAPICH, Launch("mpi", 6, "MV2_COMM_WORLD_SIZE"), id="MVAPICH"),
        pytest.param(SRUN, Launch("mpi", 8, "SLURM_STEP_NUM_TASKS"), id="srun"),
        pytest.param(RENDEZVOUS, Launch("torchrun", 4, "WORLD_SIZE"), id="env://"),
        pytest.param(ALLOCATION, Launch("single"), id="python in a Slurm allocation"),
        pytest.param({**OPEN_MPI, **TORCHRUN}, Launch("torchrun", 4, "TORCHELASTIC_RUN_ID"), id="torchrun in mpirun"),
        pytest.param({**SRUN, **TORCHRUN}, Launch("torchrun", 4, "TORCHELASTIC_RUN_ID"), id="torchrun in srun"),
        pytest.param({**OPEN_MPI, **RENDEZVOUS}, Launch("mpi", 3, "OMPI_COMM_WORLD_SIZE"), id="env:// in mpirun"),
        pytest.param(
            {**SRUN, **OPEN_MPI}, Launch("mpi", 3, "OMPI_COMM_WORLD_SIZE"), id="mpirun in an srun step: the innermost"
        ),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "1"}, Launch("single"), id="mpirun -n 1"),
        pytest.param({"SLURM_STEP_NUM_TASKS": "1"}, Launch("single"), id="srun -n 1"),
        pytest.param(
            {"SLURM_STEP_NUM_TASKS": "1", **OPEN_MPI},
            Launch("mpi", 3, "OMPI_COMM_WORLD_SIZE"),
            id="mpirun in an interactive step of one task",
        ),
        pytest.param({"OMPI_COMM_WORLD_SIZE": ""}, Launch("single"), id="empty variable"),
    ],
)
def test_launcher(environ: dict[str, str], expected: Launch) -> None:
    assert detect_launch(environ) == expected


@pytest.mark.parametrize("missing", RENDEZVOUS)
@pytest.mark.parametrize("environ", [RENDEZVOUS, TORCHRUN], ids=["env", "torchrun"])
def test_incomplete_rendezvous_is_none(environ: dict[str, str], missing: str) -> None:
    """A stray RANK or WORLD_SIZE, as some schedulers leave them, starts nothing."""
    without = {name: value for name, value in environ.items() if name != missing}
    assert detect_launch(without) == Launch("single")
    assert detect_launch(without | {missing: ""}) == Launch("single")


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "many"}, "OMPI_COMM_WORLD_SIZE"),
        (RENDEZVOUS | {"WORLD_SIZE": "4.0"}, "WORLD_SIZE"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE"),
    ],
)
def test_number_that_is_none_is_named(environ: dict[str, str], name: str) -> None:
    with pytest.raises(ValueError, match=rf"environment variable {name} must be an integer, got"):
        detect_launch(environ)


def places(topology: Topology) -> list[tuple[int, int, int]]:
    """(node_index, node_rank, node_size) of each rank."""
    ranks = range(len(topology.node_of))
    return [(topology.node_index(r), topology.node_rank(r), topology.node_size(r)) for r in ranks]


@pytest.mark.parametrize(
    ("keys", "nodes", "expected"),
    [
        (["a"], 1, [(0, 0, 1)]),
        (["a", "a", "a"], 1, [(0, 0, 3), (0, 1, 3), (0, 2, 3)]),
        (["b", "b", "a"], 2, [(0, 0, 2), (0, 1, 2), (1, 0, 1)]),
        (["x", "y", "x", "y"], 2, [(0, 0, 2), (1, 0, 2), (0, 1, 2), (1, 1, 2)]),
        ([("host", 1), ("host", 0), ("host", 1)], 2, [(0, 0, 2), (1, 0, 1), (0, 1, 2)]),
    ],
)
def test_ranks_with_equal_keys_share_a_node(
    monkeypatch: pytest.MonkeyPatch, keys: list[Any], nodes: int, expected: list[tuple[int, int, int]]
) -> None:
    """Nodes are numbered by their lowest rank, ranks of a node in their order."""
    monkeypatch.delenv("HEATOPT_RANKS_PER_NODE", raising=False)
    for topology in (Topology.from_keys(keys), Topology.detect(keys)):
        assert topology.num_nodes == nodes
        assert places(topology) == expected


def test_environment_overrides_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEATOPT_RANKS_PER_NODE", "2")
    assert Topology.detect(["same"] * 5).node_of == (0, 0, 1, 1, 2)
    assert Topology.detect([1, 2, 3]).node_of == (0, 0, 1)


@pytest.mark.parametrize(("mine", "theirs"), [("1", ""), ("", "2"), ("two", "2")])
def test_ranks_that_would_see_different_nodes(monkeypatch: pytest.MonkeyPatch, mine: str, theirs: str) -> None:
    """A launcher may leave the variable behind; then ranks would wait for each other in different operations."""
    monkeypatch.setenv("HEATOPT_RANKS_PER_NODE", mine)
    with pytest.raises(RankMismatchError, match=f"rank 0 has '{mine or 'none'}', rank 2 has '{theirs or 'none'}'"):
        Topology.agree(lambda own: [own, own, ("b", theirs)], "a")


def test_ranks_that_see_the_same_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEATOPT_RANKS_PER_NODE", "2 ")
    assert Topology.agree(lambda own: [own, ("b", "2"), ("c", "2")], "a").node_of == (0, 0, 1)
    monkeypatch.delenv("HEATOPT_RANKS_PER_NODE")
    assert Topology.agree(lambda own: [own, ("b", ""), own], "a").node_of == (0, 1, 0)


def test_topology_of_a_group_keeps_the_nodes() -> None:
    topology = Topology((0, 0, 1, 1, 2))
    assert topology.of_group([4, 1, 0]).node_of == (0, 1, 1)
    assert topology.of_group([2]).node_of == (0,)


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("", None), ("  ", None), ("3", 3), (" 1 ", 1)])
def test_ranks_per_node(monkeypatch: pytest.MonkeyPatch, text: str | None, expected: int | None) -> None:
    if text is None:
        monkeypatch.delenv("HEATOPT_RANKS_PER_NODE", raising=False)
    else:
        monkeypatch.setenv("HEATOPT_RANKS_PER_NODE", text)
    assert ranks_per_node() == expected


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_ranks_per_node_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HEATOPT_RANKS_PER_NODE", text)
    with pytest.raises(ValueError, match=rf"HEATOPT_RANKS_PER_NODE must be an integer >= 1, got '{text}'"):
        ranks_per_node()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, DEFAULT_TIMEOUT),
        ("", DEFAULT_TIMEOUT),
        (" ", DEFAULT_TIMEOUT),
        ("30", 30.0),
        ("0.5", 0.5),
        ("0", math.inf),
    ],
)
def test_timeout_of_the_environment(monkeypatch: pytest.MonkeyPatch, text: str | None, expected: float) -> None:
    if text is None:
        monkeypatch.delenv("HEATOPT_TIMEOUT", raising=False)
    else:
        monkeypatch.setenv("HEATOPT_TIMEOUT", text)
    assert default_timeout() == expected


@pytest.mark.parametrize("text", ["-1", "nan", "soon"])
def test_timeout_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HEATOPT_TIMEOUT", text)
    with pytest.raises(ValueError, match=r"environment variable HEATOPT_TIMEOUT must be"):
        default_timeout()


@pytest.mark.parametrize(("value", "expected"), [(1, 1.0), (0.25, 0.25), (0, math.inf), (math.inf, math.inf)])
def test_check_timeout(value: float, expected: float) -> None:
    seconds = check_timeout(value)
    assert seconds == expected
    assert isinstance(seconds, float)


@pytest.mark.parametrize("value", ["30", None, True, [1]])
def test_timeout_of_another_type(value: object) -> None:
    with pytest.raises(TypeError, match=r"wait must be a number of seconds, got .* of type"):
        check_timeout(value, "wait")


@pytest.mark.parametrize("value", [-1, -math.inf, math.nan])
def test_timeout_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"wait must be >= 0 seconds \(0: no time-out\), got"):
        check_timeout(value, "wait")
