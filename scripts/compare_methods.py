#!/usr/bin/env python
"""Train the digits network and the small GPT with each method, on two nodes with a slow network between them.

    python scripts/compare_methods.py --out docs/algorithms                          root, Linux: network namespaces
    python scripts/compare_methods.py --simulate --out runs/methods                  anywhere: a simulated network

    python scripts/compare_methods.py --simulate --rates 100mbit --seeds 0 1 2       final losses of three seeds

For each rate of the network all methods train in turn in one job of 2 nodes x 2 ranks, with the same batches, AdamW and
learning rates, from the same model: --pretrain updates are made first, by one process with the whole batches, which is
what exact synchronisation computes. They count neither as time nor as bytes. Written: compare_methods.json, and for
each task a picture of the training loss against time and against the bytes that a node has sent.

Losses while training are means over ranks, each with its own parameters. The final losses are those of all the training
data and of held-out data after all ranks have been made equal.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _heat_daso import HeatDaso
from _measuring import setting, write_results
from _methods import EXACT, METHODS, Epochs, Method
from _pictures import draw_comparison, show_comparison, show_seeds
from _problems import PROBLEMS, Problem, learning_rate, pretrain

import heatopt
from heatopt.comm import Communicator, Passage, SimulatedCommunicator, SimulatedWorld, VirtualNetwork

NODES, SLOTS = 2, 2
_FEWEST_EPOCHS = 3  # one each to warm up, between, and to cool down
RATES = {"100mbit": 100e6 / 8, "1gbit": 1e9 / 8, "none": 5e9}


@dataclass(frozen=True)
class Length:
    """How many updates there are."""

    pretrain: int
    """Before the comparison."""
    steps: int
    """Compared."""
    epoch: int
    """In an epoch, for the methods that have phases."""
    phases: Epochs
    """How the compared ones are cut for them."""

    @classmethod
    def of(cls, problem: Problem, options: argparse.Namespace) -> Length:
        """As the command line says."""
        before = problem.pretrain if options.pretrain is None else options.pretrain
        epochs = max(_FEWEST_EPOCHS, (options.steps or problem.steps) // options.epoch)
        return cls(before, epochs * options.epoch, options.epoch, Epochs(total=epochs, warmup=1, cooldown=1))

    def learning_rate(self, step: int) -> float:
        """Over the largest one, at an update of the comparison, counted from 0."""
        return learning_rate(self.pretrain + step, self.pretrain + self.steps)


def sent_bytes() -> int:
    """What this node has sent so far; 0 where it has no such interface."""
    path = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(path.read_text()) if path.exists() else 0


class Run:
    """One training with one method, which goes on where ``states`` are."""

    def __init__(
        self, comm: Communicator, problem: Problem, states: tuple[Any, Any], length: Length, seed: int
    ) -> None:
        self._comm = comm
        self._problem = problem
        self._length = length
        self._batches = islice(problem.batches(comm.rank, comm.size, seed), length.pretrain, None)
        self.model = copy.deepcopy(problem.model)
        self.model.load_state_dict(states[0])
        self._inner = problem.optimizer(self.model)
        self._inner.load_state_dict({**self._inner.state_dict(), "state": copy.deepcopy(states[1])})
        self._losses: list[float] = []
        self._times: list[float] = []
        self._sent: list[int] = []
        self._expected = 0.0  # what the method's formula says has been sent, in units of the parameters

    def train(self, method: Method) -> dict[str, Any]:
        """Train, and return what has been recorded: of each step the loss, seconds and bytes since the start."""
        optimizer = method.make(self._inner, self.model, self._comm, self._length.phases)
        epoch = self._length.epoch
        self._comm.barrier()
        begin, before = self._comm.seconds(), sent_bytes()
        for step, batch in enumerate(islice(self._batches, self._length.steps)):
            last = (step + 1) % epoch == 0
            self._expected += method.share(optimizer, step + 1, step % epoch, last)
            for group in self._inner.param_groups:
                group["lr"] = self._problem.rate * self._length.learning_rate(step)
            self._step(optimizer, batch, last)
            self._times.append(self._comm.seconds() - begin)
            self._sent.append(sent_bytes() - before)
            if last and hasattr(optimizer, "epoch_loss_logic"):
                optimizer.epoch_loss_logic(fmean(self._losses[-epoch:]))
        if hasattr(optimizer, "synchronize"):
            optimizer.synchronize()
        records = self._comm.all_gather_object((self._losses, self._times, self._sent, self._comm.node_rank))
        size = sum(p.nbytes for p in self.model.parameters())
        return {
            "losses": [fmean(column) for column in zip(*(r[0] for r in records), strict=True)],
            "seconds": [max(column) for column in zip(*(r[1] for r in records), strict=True)],
            "sent": [fmean(column) for column in zip(*(r[2] for r in records if r[3] == 0), strict=True)],
            "final_loss": self._mean_loss(self._problem.inputs, self._problem.targets),
            "held_out_loss": self._mean_loss(*self._problem.held_out),
            "pretrain": self._length.pretrain,
            "steps": self._length.steps,
            "epoch": epoch,
            "begin": begin,
            "parameter_bytes": size,
            "expected_sent": self._expected * size,
        }

    def _step(self, optimizer: Any, batch: torch.Tensor, last: bool) -> None:
        optimizer.zero_grad()
        loss = self._problem.batch_loss(self.model, batch)
        loss.backward()
        if isinstance(self._comm, SimulatedCommunicator):
            self._comm.compute(self._problem.seconds)
        if isinstance(optimizer, HeatDaso):
            optimizer.step(last)
        else:
            optimizer.step()
        self._losses.append(loss.item())

    @torch.no_grad()
    def _mean_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Of all these samples, of which each rank takes its part."""
        total = torch.zeros(2, dtype=torch.float64)
        for part in torch.arange(self._comm.rank, len(inputs), self._comm.size).split(256):
            loss = self._problem.loss(self.model, inputs[part], targets[part])
            total += torch.tensor([float(loss) * len(part), len(part)])
        weighted, count = self._comm.allreduce(total, "sum").tolist()
        return weighted / count


def train_all(comm: Communicator, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs of one rate; the same list on all ranks."""
    torch.set_num_threads(1)
    results = []
    for task in options.tasks:
        for seed in options.seeds:
            problem = PROBLEMS[task](comm, seed)
            length = Length.of(problem, options)
            states = pretrain(comm, problem, length.pretrain, length.pretrain + length.steps, seed)
            for method in options.methods:
                # Each has traffic, groups and plans of its own.
                run = Run(comm.duplicate(method), problem, states, length, seed)
                results.append({"task": task, "seed": seed, "method": method, **run.train(METHODS[method])})
    return results


def count_simulated(results: list[dict[str, Any]], trace: list[Passage]) -> None:
    """Fill in the bytes of a simulation, whose nodes have no interface."""
    ends = [passage.end for passage in trace]
    sums = [0.0, *accumulate(passage.sent / NODES for passage in trace)]
    for result in results:
        # A nanosecond: clocks are sums of floating-point numbers.
        start = sums[bisect_right(ends, result["begin"] + 1e-9)]
        result["sent"] = [sums[bisect_right(ends, result["begin"] + t + 1e-9)] - start for t in result["seconds"]]


def simulate(options: argparse.Namespace, rate: str) -> list[dict[str, Any]]:
    """The runs of one rate in one process."""
    network = VirtualNetwork(bandwidth=RATES[rate])
    world = SimulatedWorld(NODES * SLOTS, network, ranks_per_node=SLOTS)
    results: list[dict[str, Any]] = world.run(train_all, options)[0]
    count_simulated(results, world.trace)
    return results


def launch(options: argparse.Namespace, rate: str) -> list[dict[str, Any]]:
    """The runs of one rate in network namespaces."""
    script = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "runs.json")
        lists = [
            *("--tasks", *options.tasks, "--methods", *options.methods),
            *("--seeds", *map(str, options.seeds), "--epoch", str(options.epoch)),
            *(() if options.steps is None else ("--steps", str(options.steps))),
            *(() if options.pretrain is None else ("--pretrain", str(options.pretrain))),
        ]
        nodes = [str(script.with_name("two_nodes.sh")), "-n", str(NODES), "-s", str(SLOTS), "-r", rate, "--"]
        command = [*nodes, sys.executable, str(script), "--worker", str(out), *lists]
        if subprocess.run(command, check=False).returncode or not out.exists():
            raise SystemExit(f"the job with {rate} has failed; see above")
        found: list[dict[str, Any]] = json.loads(out.read_text())
        return found


def work(options: argparse.Namespace) -> None:
    """What a rank of :func:`launch` does."""
    comm = heatopt.world()
    results = train_all(comm, options)
    if comm.rank == 0:
        options.worker.write_text(json.dumps(results))
    comm.barrier()


def refuse_without_namespaces() -> None:
    """Say what is missing, before anything is started."""
    missing = [tool for tool in ("ip", "tc", "unshare", "mpirun") if shutil.which(tool) is None]
    if missing or os.name != "posix" or os.geteuid() != 0:
        what = f"{', '.join(missing)} not found" if missing else "only root may make network namespaces"
        raise SystemExit(f"{what}: this needs Linux, root, iproute2 and Open MPI; or give --simulate")


def thin(result: dict[str, Any], points: int) -> dict[str, Any]:
    """Curves with fewer points: the mean of the losses between two of them."""
    count = len(result["losses"])
    width = max(1, count // points)
    ends = range(width - 1, count, width)
    length = result["epoch"]  # of warm-up and of cool-down
    return {
        **{key: value for key, value in result.items() if key != "begin"},
        "losses": [round(fmean(result["losses"][end - width + 1 : end + 1]), 5) for end in ends],
        "seconds": [round(result["seconds"][end], 4) for end in ends],
        "sent": [round(result["sent"][end]) for end in ends],
        "total_seconds": result["seconds"][-1],
        "middle_seconds": result["seconds"][-length - 1] - result["seconds"][length - 1],
        "total_sent": result["sent"][-1],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", choices=list(RATES), default=["100mbit", "1gbit"])
    parser.add_argument("--tasks", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="updates of each run (default: 800)")
    parser.add_argument("--pretrain", type=int, help="updates before that (default: 0 of digits, 400 of text)")
    parser.add_argument(
        "--epoch",
        type=int,
        default=40,
        help="updates of one, for methods with phases (default %(default)s): the first warms up, the last cools down",
    )
    parser.add_argument("--simulate", action="store_true", help="in the simulator, with the computation times declared")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder (default %(default)s)")
    parser.add_argument("--join", nargs="+", type=Path, default=[], help="show these earlier results together instead")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.epoch < 1:
        parser.error(f"--epoch must be at least 1, got {options.epoch}")
    if options.steps is not None and options.steps < _FEWEST_EPOCHS * options.epoch:
        parser.error(f"--steps must be at least {_FEWEST_EPOCHS} times --epoch, {options.epoch}, got {options.steps}")
    if options.pretrain is not None and options.pretrain < 0:
        parser.error(f"--pretrain must be at least 0, got {options.pretrain}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.worker is not None:
        work(options)
        return
    if not options.simulate and not options.join:
        refuse_without_namespaces()
    described = setting(heatopt.comm.SingleCommunicator())
    described |= {"ranks": NODES * SLOTS, "nodes": NODES, "simulated": options.simulate}
    described["epoch"] = options.epoch
    results = []
    for path in options.join:
        kept = json.loads(path.read_text())
        described, results = kept["setting"], results + kept["results"]
    for rate in () if options.join else options.rates:
        begin = time.perf_counter()
        runs = (simulate if options.simulate else launch)(options, rate)
        results += [{"rate": rate, **thin(run, 50)} for run in runs]
        print(f"{rate}: {len(runs)} runs in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    write_results(options.out / "compare_methods.json", described, results)
    show_comparison(results, EXACT)
    show_seeds(results, EXACT)
    for task in dict.fromkeys(result["task"] for result in results):
        draw_comparison([r for r in results if r["task"] == task], options.out / f"compare_{task}.png", task)


if __name__ == "__main__":
    main()
