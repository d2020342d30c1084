"""``scripts/bench_memory.py``: what it makes of the bytes that its processes find."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.support.launch import LAUNCH, REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

pytest.importorskip("rich")

import bench_memory

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="one process")


def test_limits() -> None:
    share = pytest.approx(0.26)
    assert bench_memory.limits("none", 4, 0.3) == {}
    assert bench_memory.limits("state", 4, 0.3) == {"states": share}
    assert bench_memory.limits("gradients", 4, 0.3) == {"states": share, "gradients": pytest.approx(0.56)}
    assert bench_memory.limits("state, shared parameters", 4, 0.3) == {"parameters": share, "states": share}


def rank(sizes: list[float], falls: dict[str, float]) -> dict[str, Any]:
    """What one rank has measured: counted parameters, states and gradients; and what the PSS falls by."""
    pss = {"travelling": 50.0, "all": 900.0, **falls}
    return {"counted": dict(zip(bench_memory.PARTS, sizes, strict=True)), "pss": pss, "bucket": 20.0}


def test_summary() -> None:
    """The rank that has most where bytes are counted, the mean of the PSS, each over what one process has."""
    plain = rank([100, 200, 100], {"parameters": 101, "states": 200, "gradients": 100})
    kind = "gradients"
    own = [
        rank([100, 101, 60], {"parameters": 100, "states": 100, "gradients": 60}),
        rank([100, 103, 70], {"parameters": 100, "states": 102, "gradients": 80}),
    ]
    shared = [rank([50, 103, 70], {bench_memory.TOGETHER: both, "states": 102}) for both in (120, 130)]
    rows = bench_memory.summarize(
        2, {bench_memory.PLAIN: [plain, plain], kind: own, kind + bench_memory.SHARED: shared}
    )
    assert rows[bench_memory.PLAIN]["parameters"] == {"counted": 1.0, "pss": 1.01}
    assert rows[kind]["states"] == {"counted": 0.515, "pss": 0.505, "limit": 0.51, "kept": False}
    assert rows[kind]["gradients"] == {"counted": 0.7, "pss": 0.7, "limit": pytest.approx(0.71), "kept": True}
    assert rows[kind]["travelling"] == {"pss": 0.5}
    together = rows[kind + bench_memory.SHARED]
    assert together["parameters"] == {"counted": 0.5, "pss": 0.55, "limit": 0.51, "kept": False}
    assert together["gradients"] == {"counted": 0.7, "limit": pytest.approx(0.71), "kept": True}
