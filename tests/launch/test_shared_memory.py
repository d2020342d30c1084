"""Gradients meet in the memory of the node under every launcher, with the same bits as without it."""

from __future__ import annotations

import re

import pytest

from tests.support.launch import LAUNCH
from tests.support.launcher import Kind, launch

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="starts launchers itself")


def train(size: int, kind: Kind = "mpi", *arguments: str, **env: str) -> tuple[str, str]:
    """Where gradients met, and the digest of the parameters, equal on all ranks."""
    job = launch("shared.py", *arguments, size=size, kind=kind, env=env)
    assert set(job.returncodes) == {0}, job.text
    assert job.stderr.strip() == "", job.text
    found = re.findall(r"^rank \d+ \| (nodes \d+ \| shared \w+) \| \[\] \| (\w+)$", job.stdout, re.MULTILINE)
    assert len(found) == size, job.text
    assert len(set(found)) == 1, job.text
    return found[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [2, 3])
def test_same_bits_with_and_without(size: int) -> None:
    where, digest = train(size)
    assert where == "nodes 1 | shared True"
    assert train(size, HEATOPT_SHARED_MEMORY="0") == ("nodes 1 | shared False", digest)


def test_gloo_shares_memory_too() -> None:
    assert train(2, "torch") == train(2)


def test_two_nodes() -> None:
    """Sums of nodes are added: with 2 + 1 ranks that is the order of the ranks, so the bits are those of one node."""
    where, digest = train(3, HEATOPT_RANKS_PER_NODE="2")
    assert where == "nodes 2 | shared True"
    assert digest == train(3)[1]


def test_wire_dtype_rounds_between_nodes_only() -> None:
    assert train(2, "mpi", "bfloat16") == train(2)
    where, digest = train(2, "mpi", "bfloat16", HEATOPT_RANKS_PER_NODE="1")
    assert where == "nodes 2 | shared False"
    assert digest != train(2)[1]
