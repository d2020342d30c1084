"""The scripts: their parts, their command lines, and small runs in one process."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

for package in ("rich", "sklearn", "matplotlib"):
    pytest.importorskip(package)

import _algorithms  # noqa: E402
import _batches  # noqa: E402
import _options  # noqa: E402
import _report  # noqa: E402
import _training  # noqa: E402
import bench_overhead  # noqa: E402
import plot_ranks  # noqa: E402
import train_digits  # noqa: E402
import train_text  # noqa: E402

from heatopt.comm import Communicator, ThreadWorld  # noqa: E402

SMALL_TEXT = ["--text-size", "20000", "--context", "16", "--test-pieces", "8", "--batch-size", "8"]


def digits(out: Path, *arguments: str, steps: int = 3) -> list[dict[str, Any]]:
    """Train on the digits in this process; the metrics."""
    train_digits.main(["--no-plot", "--steps", str(steps), "--out", str(out), *arguments])
    return _report.read_metrics(out / "metrics.jsonl")


def spawn(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does."""
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )


def error(capsys: pytest.CaptureFixture[str], main: Any, *arguments: str) -> str:
    """The message that a wrong command line ends with."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


class TestBatches:
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 12])
    def test_slices_of_all_ranks_make_the_same_global_batch(self, size: int) -> None:
        whole = _batches.GlobalBatches(50, 12, rank=0, size=1, seed=7)
        ranks = [_batches.GlobalBatches(50, 12, rank=rank, size=size, seed=7) for rank in range(size)]
        for epoch in range(3):
            parts = zip(*(rank.epoch(epoch) for rank in ranks), strict=True)
            for expected, slices in zip(whole.epoch(epoch), parts, strict=True):
                assert torch.equal(torch.cat(slices), expected)

    def test_an_epoch_holds_no_sample_twice(self) -> None:
        batches = _batches.GlobalBatches(50, 12, rank=0, size=1, seed=0)
        indices = torch.cat(list(batches.epoch(0)))
        assert len(indices) == 48 == len(batches) * 12
        assert len(indices.unique()) == 48

    def test_epochs_and_seeds_differ_but_repeat(self) -> None:
        def order(seed: int, epoch: int) -> list[int]:
            batches = _batches.GlobalBatches(50, 50, rank=0, size=1, seed=seed)
            return next(batches.epoch(epoch)).tolist()

        assert order(0, 1) == order(0, 1)
        assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9

    def test_the_default_generator_is_left_alone(self) -> None:
        state = torch.get_rng_state()
        list(_batches.GlobalBatches(50, 10, rank=0, size=1, seed=0).epoch(0))
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_batch_that_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="cannot be divided by 3 ranks"):
            _batches.GlobalBatches(50, 10, rank=0, size=3, seed=0)
        with pytest.raises(ValueError, match="larger than the 50 training samples"):
            _batches.GlobalBatches(50, 51, rank=0, size=1, seed=0)


class TestAlgorithms:
    def test_every_algorithm_of_torch_is_known(self) -> None:
        names = _algorithms.optimizer_names()
        assert {"AdamW", "LBFGS", "Muon", "SGD", "SparseAdam"} <= set(names)
        assert "Optimizer" not in names
        for name in set(names) - {"SparseAdam"}:
            assert _algorithms.check_optimizer_name(name) == name
            assert _algorithms.make_optimizers(name, train_digits.DigitNet(), {"lr": 0.1}, adamw_lr=0.2)

    def test_every_scheduler_of_torch_is_known_or_refused_with_a_reason(self) -> None:
        names = _algorithms.scheduler_names()
        assert {"CosineAnnealingLR", "OneCycleLR", "ReduceLROnPlateau", "StepLR"} <= set(names)
        assert not {"LRScheduler", *_algorithms.NOT_BY_NAME} & set(names)

    def test_muon_and_adamw_share_the_parameters(self) -> None:
        model = train_text.ByteGPT(context=8, width=8, heads=2, layers=1)
        muon, adamw = _algorithms.make_optimizers("Muon", model, {"lr": 0.1}, adamw_lr=0.2)
        groups = [{id(p) for p in optimizer.param_groups[0]["params"]} for optimizer in (muon, adamw)]
        assert groups[0] == {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        assert groups[1] == {id(p) for p in model.parameters()} - groups[0]
        assert [optimizer.param_groups[0]["lr"] for optimizer in (muon, adamw)] == [0.1, 0.2]

    def test_cosine_and_one_cycle_get_the_length_of_the_run(self) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        assert _algorithms.make_scheduler("CosineAnnealingLR", optimizer, {}, updates=9).T_max == 9
        assert _algorithms.make_scheduler("CosineAnnealingLR", optimizer, {"T_max": 5}, updates=9).T_max == 5
        assert _algorithms.make_scheduler("OneCycleLR", optimizer, {"max_lr": 1}, updates=9).total_steps == 9

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("x=1", 1),
            ("x=1e-3", 1e-3),
            ("x=(0.9,0.95)", (0.9, 0.95)),
            ("x=[1,2]", [1, 2]),
            ("x=true", True),
            ("x=False", False),
            ("x=None", None),
            ("x=inf", float("inf")),
            ("x=strong_wolfe", "strong_wolfe"),
            ("x=a=b", "a=b"),
        ],
    )
    def test_values_on_the_command_line(self, text: str, value: Any) -> None:
        assert _options.name_and_value(text) == ("x", value)


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--optimizer SparseAdam", "SparseAdam needs sparse gradients"),
            ("--optimizer adamw", "no algorithm 'adamw'; it has ASGD"),
            ("--optimizer-args foo=1", "AdamW has no argument 'foo'; it has lr, betas"),
            ("--optimizer-args foo", "'foo' is not of the form NAME=VALUE"),
            ("--optimizer-args eps=1 eps=2", "--optimizer-args holds a name twice"),
            ("--optimizer-args betas=(2,2)", "AdamW(betas=(2, 2), lr=0.002): Invalid beta"),
            ("--lr 1 --optimizer-args lr=1", "learning rate is given twice"),
            ("--lr 0", "must be above 0"),
            ("--scheduler Nothing", "torch has no scheduler 'Nothing'; it has"),
            ("--scheduler LambdaLR", "LambdaLR takes functions or schedulers"),
            ("--scheduler StepLR", "StepLR needs --scheduler-args step_size=..."),
            ("--scheduler-every step", "need --scheduler"),
            ("--optimizer LBFGS --clip 1", "--clip cannot be used with LBFGS"),
            ("--batch-size 65 --accumulate 2", "--batch-size 65 cannot be divided by --accumulate 2; 64 can"),
            ("--batch-size 9999", "larger than the 1437 training samples"),
            ("--accumulate 0", "must be 1 or more"),
            ("--epochs two", "--epochs: invalid"),
            ("--epochs 2 --steps 2", "not allowed with argument"),
            ("--dtype float16", "invalid choice"),
            ("--bach-size 4", "unrecognized arguments"),
        ],
    )
    def test_digits(self, arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = error(capsys, train_digits.main, *arguments.split(), "--out", str(tmp_path / "out"))
        assert message in found
        assert not (tmp_path / "out").exists()

    def test_out_that_is_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").touch()
        assert "File exists" in error(capsys, train_digits.main, "--out", str(tmp_path / "file"))

    def test_too_little_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        message = error(capsys, train_text.main, "--text-size", "1000000000")
        assert "less than 1,000,000,000 bytes" in message

    def test_a_batch_that_the_ranks_cannot_share(self, capsys: pytest.CaptureFixture[str]) -> None:
        class ThreeRanks:
            rank, size = 0, 3
            barriers = 0

            def barrier(self) -> None:
                self.barriers += 1

        comm: Any = ThreeRanks()
        parser = _options.make_parser("", comm, epochs=1, batch_size=64, learning_rates={"SGD": 1}, out="x")
        with pytest.raises(SystemExit):
            _options.check_options(parser, parser.parse_args([]))
        assert "--batch-size 64 cannot be divided by 3 ranks; 63 can" in capsys.readouterr().err
        assert comm.barriers == 1

    def test_only_rank_0_speaks(self, capsys: pytest.CaptureFixture[str]) -> None:
        class Second:
            rank, size = 1, 2

            def barrier(self) -> None: ...

        comm: Any = Second()
        for argument in ("--help", "--nonsense"):
            parser = _options.make_parser("", comm, epochs=1, batch_size=2, learning_rates={"SGD": 1}, out="x")
            with pytest.raises(SystemExit):
                parser.parse_args([argument])
        assert capsys.readouterr() == ("", "")


class TestTraining:
    def test_metrics(self, tmp_path: Path) -> None:
        records = digits(tmp_path, "--batch-size", "718", steps=3)
        assert [record["step"] for record in records] == [1, 2, 3]
        assert [record["epoch"] for record in records] == [1, 1, 2]
        assert [set(record) for record in records] == [
            {"step", "epoch", "time", "loss", "lr"},
            {"step", "epoch", "time", "loss", "lr", "test_loss", "accuracy"},
            {"step", "epoch", "time", "loss", "lr", "test_loss", "accuracy"},
        ]
        times = [record["time"] for record in records]
        assert times == sorted(times)
        assert records[-1]["loss"] < records[0]["loss"]

    def test_it_learns(self, tmp_path: Path) -> None:
        assert digits(tmp_path, steps=66)[-1]["accuracy"] > 0.93

    @pytest.mark.parametrize("optimizer", sorted(set(_algorithms.optimizer_names()) - {"SparseAdam"}))
    def test_every_algorithm(self, optimizer: str, tmp_path: Path) -> None:
        records = digits(tmp_path, "--optimizer", optimizer, steps=2)
        assert len(records) == 2

    @pytest.mark.parametrize(
        "arguments",
        [
            "ReduceLROnPlateau --scheduler-args patience=0 threshold=1.0",
            "ReduceLROnPlateau --scheduler-every step --scheduler-args patience=0 threshold=1.0",
            "CosineAnnealingLR --scheduler-args T_max=4",
            "OneCycleLR --scheduler-args max_lr=0.1",
        ],
    )
    def test_schedulers_move_the_rate(self, arguments: str, tmp_path: Path) -> None:
        records = digits(tmp_path, "--batch-size", "718", "--scheduler", *arguments.split(), steps=6)
        assert len({record["lr"] for record in records}) > 1

    def test_the_seed_decides(self, tmp_path: Path) -> None:
        def losses(*arguments: str) -> list[float]:
            return [record["loss"] for record in digits(tmp_path, *arguments)]

        assert losses("--seed", "5") == losses("--seed", "5")
        assert losses("--seed", "5") != losses("--seed", "6")

    def test_accumulation_gives_the_same_losses(self, tmp_path: Path) -> None:
        once = digits(tmp_path, "--dtype", "float64", steps=5)
        pieces = digits(tmp_path, "--dtype", "float64", "--accumulate", "4", steps=5)
        assert [r["loss"] for r in pieces] == pytest.approx([r["loss"] for r in once], abs=1e-10)

    def test_clip_changes_the_losses(self, tmp_path: Path) -> None:
        free, clipped = (digits(tmp_path, "--optimizer", "SGD", *clip, steps=22) for clip in ([], ["--clip", "1e-3"]))
        assert free[0]["loss"] == clipped[0]["loss"]
        assert free[-1]["loss"] < 2 < clipped[-1]["loss"]

    def test_a_loss_that_is_no_number_ends_the_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            digits(tmp_path, "--optimizer", "SGD", "--lr", "1e9", steps=9)
        assert end.value.code == 1
        assert "try a lower --lr" in capsys.readouterr().err

    def test_muon_says_what_the_others_are_trained_with(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train_text.main(["--no-plot", "--steps", "1", "--out", str(tmp_path), "--optimizer", "Muon", *SMALL_TEXT])
        assert "AdamW the other" in capsys.readouterr().out


@pytest.fixture(scope="module")
def task() -> _training.Task:
    """The digits in float64; each user trains a copy."""
    torch.manual_seed(0)
    return train_digits.make_task().to(torch.device("cpu"), torch.float64)


class TestTerminal:
    def test_a_file_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
        assert not _report.ends_at_terminal()

    @pytest.mark.parametrize(
        ("launcher_output", "expected"), [("/dev/pts/0", True), ("pipe:[42]", False), (OSError, False)]
    )
    def test_under_open_mpi_the_launcher_tells(
        self, launcher_output: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def readlink(path: str) -> str:
            if launcher_output is OSError:
                raise OSError
            return launcher_output

        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
        assert _report.ends_at_terminal()
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
        monkeypatch.setattr(_report.os, "readlink", readlink)
        assert _report.ends_at_terminal() is expected


class TestRanks:
    """The same global batches on one rank and on several, here as threads of one process."""

    def losses(self, task: _training.Task, size: int, out: Path, *arguments: str) -> list[float]:
        def train(comm: Communicator) -> list[_report.Record]:
            parser = _options.make_parser(
                "", comm, epochs=1, batch_size=64, learning_rates=train_digits.LEARNING_RATES, out=str(out)
            )
            options = parser.parse_args(["--dtype", "float64", "--steps", "5", *arguments])
            _options.check_options(parser, options)
            trainer = _training.Trainer(copy.deepcopy(task), options, comm, train_digits.LEARNING_RATES)
            with _report.Report(out, trainer.steps, comm.rank) as report:
                trainer.train(report)
            assert trainer.replicas_agree()
            return report.records

        records = ThreadWorld(size, timeout=60).run(train)
        results = [[r["loss"] for r in each] + [each[-1]["test_loss"], each[-1]["accuracy"]] for each in records]
        assert all(result == results[0] for result in results)
        return results[0]

    @pytest.mark.parametrize("size", [2, 4])
    @pytest.mark.parametrize(
        "arguments",
        [
            "--optimizer AdamW",
            "--optimizer AdamW --accumulate 4 --clip 0.1",
            "--optimizer Muon --scheduler CosineAnnealingLR --scheduler-every step",
            "--optimizer LBFGS --optimizer-args max_iter=3",
            "--optimizer SGD --no-blocking --scheduler ReduceLROnPlateau --scheduler-every step",
        ],
    )
    def test_same_losses(self, task: _training.Task, size: int, arguments: str, tmp_path: Path) -> None:
        one, several = (self.losses(task, n, tmp_path, *arguments.split()) for n in (1, size))
        assert several == pytest.approx(one, rel=0, abs=1e-10)


class TestText:
    def test_files_are_held_out(self, tmp_path: Path) -> None:
        for number in range(1, 17):
            (tmp_path / f"m{number:02}.py").write_text(f"{number:02}")
        train, test = train_text.read_source(tmp_path, 27)
        assert (train, test) == (b"010203040506070910111213141"[:27], b"08")

    def test_targets_are_the_next_bytes(self) -> None:
        inputs, targets = train_text.cut(b"abcdefghi", 4)
        assert [bytes(row.tolist()) for row in inputs] == [b"abcd", b"efgh"]
        assert [bytes(row.tolist()) for row in targets] == [b"bcde", b"fghi"]

    def test_the_model_does_not_see_the_future(self) -> None:
        model = train_text.ByteGPT(context=8, width=16, heads=2, layers=2)
        text = torch.randint(256, (1, 8))
        changed = text.clone()
        changed[0, 5:] += 1
        before, after = model(text), model(changed % 256)
        assert torch.equal(before[0, :5], after[0, :5])
        assert not torch.equal(before[0, 5:], after[0, 5:])


class TestScriptsAsPrograms:
    def test_digits(self, tmp_path: Path) -> None:
        result = spawn("train_digits.py", "--steps", "4", "--out", str(tmp_path / "a" / "b"))
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert "test accuracy" in result.stdout
        assert len(_report.read_metrics(tmp_path / "a" / "b" / "metrics.jsonl")) == 4
        assert (tmp_path / "a" / "b" / "training.png").read_bytes().startswith(b"\x89PNG")

    def test_text(self, tmp_path: Path) -> None:
        result = spawn("train_text.py", "--steps", "2", "--no-plot", "--out", str(tmp_path), *SMALL_TEXT)
        assert result.returncode == 0, result.stderr
        assert "Python source" in result.stdout
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_a_wrong_argument(self) -> None:
        result = spawn("train_digits.py", "--optimizer", "Adum")
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.count("error:") == 1
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        "script", ["train_digits.py", "train_text.py", "bench_overhead.py", "bench_fuse.py", "plot_ranks.py"]
    )
    def test_help(self, script: str) -> None:
        result = spawn(script, "--help")
        assert result.returncode == 0
        assert result.stdout.startswith(f"usage: {script}")


class TestBenchmark:
    def test_results(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        threads = torch.get_num_threads()
        file = tmp_path / "result.json"
        try:
            bench_overhead.main(["--rounds", "1", "--pairs", "2", "--block-ms", "1", "--json", str(file)])
        finally:
            torch.set_num_threads(threads)
        report = json.loads(file.read_text())
        assert [result["case"] for result in report["results"]] == ["small", "medium", "deep"]
        assert {"date", "processor", "cores", "torch", "heatopt"} <= set(report["machine"])
        assert "overhead" in capsys.readouterr().out

    def test_median_of_the_pairs(self) -> None:
        rounds = [bench_overhead.ratios([11.0, 22.0, 90.0], [10.0, 20.0, 30.0])] * 2
        value, (low, high) = bench_overhead.median_overhead(rounds)
        assert value == pytest.approx(0.1)
        assert low == high == value

    @pytest.mark.parametrize("arguments", [["--optimizer", "LBFGS"], ["--pairs", "0"], ["--models", "x"]])
    def test_wrong_arguments(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert "error:" in error(capsys, bench_overhead.main, *arguments)


class TestPicture:
    def test_curves(self, tmp_path: Path) -> None:
        runs = {
            ranks: [{"step": s, "loss": 1 / s + shift} for s in range(1, 9)]
            for ranks, shift in ((1, 0.0), (2, 0.0), (4, 1e-12))
        }
        plot_ranks.draw(runs, tmp_path / "new" / "ranks.png", "title")
        assert (tmp_path / "new" / "ranks.png").stat().st_size > 10_000
        assert plot_ranks.largest_difference(runs[1], runs[4]) == pytest.approx(1e-12, rel=1e-3)

    def test_one_rank_needs_no_launcher(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "ranks.png"
        plot_ranks.main(["--ranks", "1", "--launcher", "none {ranks}", "--out", str(out), "--", "--steps", "2"])
        assert out.exists()
        assert "largest difference: 0.0e+00" in capsys.readouterr().out

    def test_a_launcher_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="cannot find no-such-launcher"):
            plot_ranks.main(["--ranks", "2", "--launcher", "no-such-launcher {ranks}", "--out", str(tmp_path / "x")])

    def test_wrong_arguments(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "must hold {ranks}" in error(capsys, plot_ranks.main, "--launcher", "mpirun")
        assert "must be 1 or more" in error(capsys, plot_ranks.main, "--ranks", "0")
