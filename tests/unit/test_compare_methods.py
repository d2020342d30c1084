"""``scripts/compare_methods.py``: what it refuses, what it records, and the formulas of what it compares."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from heatopt.comm import Communicator, ThreadWorld, world
from tests.support.launch import LAUNCH, REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

for package in ("rich", "sklearn", "matplotlib"):
    pytest.importorskip(package)

import _batches  # noqa: E402
import _heat_daso  # noqa: E402
import _methods  # noqa: E402
import _pictures  # noqa: E402
import _problems  # noqa: E402
import compare_methods  # noqa: E402

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="one process")


def losses_of_one_process(steps: int) -> list[float]:
    """Those of plain AdamW with whole batches."""
    problem = _problems.make_digits(world(), seed=0)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=problem.rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _problems.learning_rate(step, steps))
    batches = _batches.GlobalBatches(len(problem.inputs), problem.batch, rank=0, size=1, seed=0).epoch(0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.batch_loss(problem.model, next(batches))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_simulated_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses of one process, bytes as the formulas say, the same results again, and the same table of earlier ones."""
    threads = torch.get_num_threads()
    options = ["--tasks", "digits", "--seeds", "0", "--rates", "100mbit", "--steps", "50", "--epoch", "5", "--simulate"]
    try:
        for folder in ("a", "b"):
            methods = ["exact", "DiLoCo", "DASO", "Heat's DASO"]
            compare_methods.main([*options, "--methods", *methods, "--out", str(tmp_path / folder)])
    finally:
        torch.set_num_threads(threads)
    first, second = (json.loads((tmp_path / f / "compare_methods.json").read_text()) for f in ("a", "b"))
    assert first["results"] == second["results"]
    losses = {result["method"]: result["losses"] for result in first["results"]}
    assert losses["exact"] == pytest.approx(losses_of_one_process(50), rel=1e-4)
    assert {found[0] for found in losses.values()} == {losses["exact"][0]}
    for result in first["results"]:
        assert result["steps"] == 50
        assert result["total_sent"] == pytest.approx(result["expected_sent"], rel=0.03), result["method"]
        assert len(result["losses"]) == len(result["seconds"]) == len(result["sent"])
    seconds = {result["method"]: result["total_seconds"] for result in first["results"]}
    assert seconds["exact"] > seconds["DASO"] > seconds["DiLoCo"] > 50 * 2e-3
    table = capsys.readouterr().out.split("digits")[-1]
    compare_methods.main(["--join", str(tmp_path / "a" / "compare_methods.json"), "--out", str(tmp_path / "c")])
    assert capsys.readouterr().out.split("digits")[-1] == table
    assert (tmp_path / "c" / "compare_digits.png").read_bytes().startswith(b"\x89PNG")


def test_pretraining_is_the_beginning_of_exact_training(tmp_path: Path) -> None:
    """Batches, learning rates and optimizer state go on, and all methods begin with the same bits."""
    threads = torch.get_num_threads()
    options = ["--tasks", "digits", "--seeds", "3", "--rates", "none", "--simulate", "--epoch", "10"]
    lengths = {"whole": (0, 50, ["exact"]), "rest": (20, 30, ["exact", "DiLoCo"])}
    try:
        for name, (before, steps, methods) in lengths.items():
            length = ["--pretrain", str(before), "--steps", str(steps)]
            compare_methods.main([*options, *length, "--methods", *methods, "--out", str(tmp_path / name)])
    finally:
        torch.set_num_threads(threads)
    [whole], [exact, diloco] = (
        json.loads((tmp_path / name / "compare_methods.json").read_text())["results"] for name in lengths
    )
    assert exact["losses"] == pytest.approx(whole["losses"][20:], rel=1e-3)
    assert exact["final_loss"] == pytest.approx(whole["final_loss"], rel=1e-3)
    assert exact["held_out_loss"] == pytest.approx(whole["held_out_loss"], rel=1e-3)
    assert diloco["losses"][0] == exact["losses"][0]
    assert diloco["losses"][1:] != exact["losses"][1:]


def test_distances_of_means_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    common = {"rate": "none", "task": "t", "steps": 8, "pretrain": 4}
    losses = {"exact": [(1.0, 4.0), (3.0, 4.0)], "other": [(1.5, 3.0), (2.6, 3.0)]}
    results = [
        {**common, "method": method, "seed": seed, "final_loss": trained, "held_out_loss": held_out}
        for method, pairs in losses.items()
        for seed, (trained, held_out) in enumerate(pairs)
    ]
    _pictures.show_seeds(results, "exact")
    words = next(line for line in capsys.readouterr().out.splitlines() if "other" in line).replace("│", " ").split()
    assert words == ["other", "1.5000", "2.6000", "+2.5", "%", "3.0000", "-25.0", "%"]
    _pictures.show_seeds([r for r in results if r["seed"] == 0], "exact")
    assert not capsys.readouterr().out


def test_namespaces_need_root_and_their_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for tool in ("ip", "tc", "unshare", "mpirun"):
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match=r"only root may make network namespaces: .* or give --simulate"):
        compare_methods.main(["--out", str(tmp_path / "x")])
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="ip, tc, unshare, mpirun not found"):
        compare_methods.main(["--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_too_few_updates(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_methods.main(["--steps", "119"])
    assert "--steps must be at least 3 times --epoch, 40, got 119" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare_methods.main(["--epoch", "0"])
    assert "--epoch must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare_methods.main(["--pretrain", "-1"])
    assert "--pretrain must be at least 0, got -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "steps", "expected"),
    [("exact", 300, 300.0), ("LocalSGD", 300, 37.0), ("DiLoCo", 300, 6.0), ("Streaming DiLoCo", 300, 5.75)],
)
def test_formulas_of_fixed_periods(method: str, steps: int, expected: float) -> None:
    share = _methods.METHODS[method].share
    assert sum(share(None, step, 0, False) for step in range(1, steps + 1)) == pytest.approx(expected)


@pytest.mark.parametrize(("nodes", "kept"), [(2, 0.875), (8, 0.8)])
def test_the_published_merge_loses_progress(nodes: int, kept: float) -> None:
    """With equal nodes and a constant gradient, B = 4 and S = 1: 2 S / (2 S + P) of every fourth batch stays."""

    def train(comm: Communicator) -> float:
        parameter = torch.nn.Parameter(torch.zeros(3))
        inner = torch.optim.SGD([parameter], lr=1.0)
        optimizer = _heat_daso.HeatDaso(inner, 9, comm=comm, warmup=0, cooldown=0, stability=0.05)
        assert optimizer.global_skip == 4
        for _ in range(40):
            optimizer.zero_grad()
            parameter.sum().backward()
            optimizer.step(last=False)
        return -parameter[0].item() / 40

    assert ThreadWorld(nodes, ranks_per_node=1).run(train) == pytest.approx([kept] * nodes)


def test_the_reference_rounds_weights_in_its_warm_up() -> None:
    def train(comm: Communicator) -> tuple[float, int, int]:
        parameter = torch.nn.Parameter(torch.full((3,), 1.0 + comm.rank))
        inner = torch.optim.SGD([parameter], lr=2.0**-9)
        optimizer = _heat_daso.HeatDaso(inner, 9, comm=comm, warmup=1, cooldown=1, stability=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (-parameter).sum().backward()
            optimizer.step(last=False)
        optimizer.epoch_loss_logic(1.0)
        first = optimizer.global_skip
        for _ in range(7):
            optimizer.epoch_loss_logic(1.0)
        return parameter[0].item(), first, optimizer.global_skip

    # 1 + 2^-9 is 1 in bfloat16: five updates are lost; then B = 4, and the last epoch cools down.
    assert ThreadWorld(4, ranks_per_node=2).run(train) == [(1.0, 4, 0)] * 4
