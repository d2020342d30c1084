"""``scripts/bench_fuse.py`` measures what it says it measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.support.launch import LAUNCH, REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

pytest.importorskip("rich")

import bench_fuse

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="one process")
SMALL = ["--tensors", "4", "--elements", "5", "6", "--rounds", "1", "--steps", "2"]


@pytest.mark.parametrize(("algorithm", "implementations"), [("Adam", 7), ("AdamW", 5), ("RMSprop", 4)])
def test_results(tmp_path: Path, algorithm: str, implementations: int) -> None:
    threads = torch.get_num_threads()
    file = tmp_path / "result.json"
    try:
        bench_fuse.main([*SMALL, "--optimizer", algorithm, "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    report = json.loads(file.read_text())
    assert list(report["results"]) == ["5", "6"]
    for results in report["results"].values():
        assert len(results) == implementations
        assert all(0 < found["min_ms"] <= found["median_ms"] <= found["max_ms"] for found in results.values())


@pytest.mark.parametrize("arguments", [["--optimizer", "Adum"], ["--tensors", "0"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_fuse.parse(arguments)
    assert "error:" in capsys.readouterr().err
