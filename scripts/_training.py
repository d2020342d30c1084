"""The training loop shared by the scripts: the usual one of PyTorch, with a data-parallel optimizer."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _algorithms import PER_STEP, make_optimizers, make_scheduler
from _batches import GlobalBatches
from _options import RankParser, check_options, make_directory
from _report import Report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import heatopt
from heatopt.comm import Communicator

# Test samples that go through the model at once.
TEST_CHUNK = 256


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class Task:
    """A model and the data to train and test it on.

    Inputs and targets hold one sample in each row. The model gives scores of the classes in the last
    dimension, and the targets are the numbers of the right classes.
    """

    title: str
    model: nn.Module
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Task:
        """The task on a device, its floating point numbers in a type."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        model = self.model.to(device, dtype)
        data = (self.train_inputs, self.train_targets, self.test_inputs, self.test_targets)
        return Task(self.title, model, *(move(tensor) for tensor in data))


def run(
    parser: RankParser,
    options: argparse.Namespace,
    make_task: Callable[[], Task],
    learning_rates: dict[str, float],
) -> None:
    """Check the options, train, and write the results.

    Args:
        parser: for errors in the options.
        options: what it parsed.
        make_task: builds the model, with the default generator seeded, and the data.
        learning_rates: default learning rates by algorithm.
    """
    comm = parser.comm
    check_options(parser, options)
    torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // comm.node_size)))
    torch.manual_seed(options.seed)
    task = make_task().to(choose_device(options.device, comm), getattr(torch, options.dtype))
    try:
        trainer = Trainer(task, options, comm, learning_rates)
    except ValueError as error:
        parser.error(str(error))
    make_directory(parser, options.out)
    try:
        with Report(options.out, trainer.steps, comm.rank) as report:
            trainer.train(report)
    except DivergedError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if options.plot:
        report.picture(f"{task.title}, {options.optimizer}, ranks: {comm.size}")
    report.table(task.title, trainer.summary(report))
    report.say(f"wrote {options.out}/metrics.jsonl" + (" and training.png" if options.plot else ""))


def choose_device(kind: str, comm: Communicator) -> torch.device:
    """The CPU, or the GPU of this rank: ranks of a node share its GPUs evenly."""
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", comm.node_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


class Trainer:
    """Trains the model of a task on all ranks of a communicator.

    Args:
        task: the model and its data, the same on all ranks.
        options: the command line, checked.
        comm: the ranks.
        learning_rates: default learning rates by algorithm.

    Raises:
        ValueError: the algorithm, the scheduler or the data do not fit the options.
    """

    def __init__(
        self, task: Task, options: argparse.Namespace, comm: Communicator, learning_rates: dict[str, float]
    ) -> None:
        self.task = task
        self.options = options
        self.comm = comm
        self.batches = GlobalBatches(
            len(task.train_inputs), options.batch_size, rank=comm.rank, size=comm.size, seed=options.seed
        )
        self.steps = options.steps or options.epochs * len(self.batches)
        arguments = dict(options.optimizer_args)
        rate = options.lr or learning_rates.get(options.optimizer)
        if rate is not None:
            arguments.setdefault("lr", rate)
        plain = make_optimizers(options.optimizer, task.model, arguments, learning_rates["AdamW"])
        # The one line that makes the training data-parallel (a list, because Muon needs a second optimizer).
        self.optimizers = [
            heatopt.DataParallelOptimizer(
                optimizer,
                options.blocking,
                model=task.model,
                comm=comm,
                accumulation_steps=options.accumulate,
            )
            for optimizer in plain
        ]
        every = options.scheduler_every or ("step" if options.scheduler in PER_STEP else "epoch")
        self.per_step = every == "step"
        self.schedulers = self._make_schedulers()
        self.seconds = 0.0  # spent in training steps

    def _make_schedulers(self) -> list[LRScheduler]:
        name = self.options.scheduler
        if name is None:
            return []
        updates = self.steps if self.per_step else math.ceil(self.steps / len(self.batches))
        arguments = self.options.scheduler_args
        return [make_scheduler(name, optimizer, arguments, updates) for optimizer in self.optimizers]

    def train(self, report: Report) -> None:
        """Train all steps, and test at the end of each epoch and of the run.

        Raises:
            DivergedError: a loss is infinite or not a number; all ranks see the same loss, so all stop.
        """
        if len(self.optimizers) > 1:
            counts = [sum(len(g["params"]) for g in o.param_groups) for o in self.optimizers]
            report.say(
                f"Muon trains the {counts[0]} weight matrices of linear layers, AdamW the other {counts[1]} parameters"
            )
        begin = time.perf_counter()
        step = 0
        for epoch in range(math.ceil(self.steps / len(self.batches))):
            for indices in self.batches.epoch(epoch):
                step += 1
                rate = self.optimizers[0].param_groups[0]["lr"]
                start = time.perf_counter()
                loss = self.train_step(self.task.train_inputs[indices], self.task.train_targets[indices])
                now = time.perf_counter()
                self.seconds += now - start
                record = {
                    "step": step,
                    "epoch": epoch + 1,
                    "time": now - begin,
                    "loss": loss,
                    "lr": float(rate),
                }
                last = step == self.steps
                if last or step % len(self.batches) == 0:
                    record["test_loss"], record["accuracy"] = self.test()
                if not all(map(math.isfinite, record.values())):
                    raise DivergedError(f"the loss is {loss} at step {step}: try a lower --lr, or --clip")
                self.move_schedulers(record)
                report.step(record)
                if last:
                    return

    def train_step(self, inputs: Tensor, targets: Tensor) -> float:
        """One step on this rank's part of a batch; returns the loss of the whole batch."""
        pieces = self.options.accumulate
        first_loss: list[Tensor] = []

        def closure() -> Tensor:
            total = torch.zeros((), dtype=torch.float64, device=inputs.device)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            for part, target in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
                loss = mean_loss(self.task.model(part), target) / pieces
                loss.backward()
                total += loss.detach()
            first_loss.append(total)
            return total

        if self.options.optimizer == "LBFGS":
            self.optimizers[0].step(closure)
        else:
            closure()
            if self.options.clip is not None:
                # The gradients are final when backward returns, so torch's own function does.
                nn.utils.clip_grad_norm_(self.task.model.parameters(), self.options.clip)
            for optimizer in self.optimizers:
                optimizer.step()
        return float(heatopt.reduce_metric(first_loss[0], comm=self.comm))

    def move_schedulers(self, record: dict[str, float]) -> None:
        """Move the schedulers where it is time: at each step or at the end of an epoch."""
        for scheduler in self.schedulers:
            if not self.per_step and "accuracy" not in record:
                continue
            if isinstance(scheduler, ReduceLROnPlateau):
                # Both losses are means over all ranks, so that all ranks decide alike.
                scheduler.step(record["loss"] if self.per_step else record["test_loss"])
            else:
                scheduler.step()

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """Loss and accuracy on the test data; each rank tests its share of it."""
        inputs = self.task.test_inputs[self.comm.rank :: self.comm.size]
        targets = self.task.test_targets[self.comm.rank :: self.comm.size]
        sums = torch.zeros(3, dtype=torch.float64, device=inputs.device)
        self.task.model.eval()
        for part, target in zip(inputs.split(TEST_CHUNK), targets.split(TEST_CHUNK), strict=True):
            scores = self.task.model(part)
            loss = mean_loss(scores, target).double() * target.numel()
            right = (scores.argmax(-1) == target).sum().double()
            sums += torch.stack([loss, right, right.new_tensor(target.numel())])
        self.task.model.train()
        loss_sum, right_sum, count = self.comm.allreduce(sums, "sum").tolist()
        return loss_sum / count, right_sum / count

    def replicas_agree(self) -> bool:
        """Whether all ranks hold the same parameters, to the last bit."""
        digest = hashlib.sha256()
        for parameter in self.task.model.parameters():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return len(set(self.comm.all_gather_object(digest.hexdigest()))) == 1

    def summary(self, report: Report) -> dict[str, str]:
        """What to show at the end. All ranks must call it."""
        agree = self.replicas_agree()
        last = report.records[-1]
        samples = self.steps * self.options.batch_size
        return {
            "optimizer": " and ".join(type(o.torch_optimizer).__name__ for o in self.optimizers),
            "ranks": str(self.comm.size),
            "global batch": str(self.options.batch_size),
            "steps": str(self.steps),
            "loss of the last batch": f"{last['loss']:.4f}",
            "test loss": f"{last['test_loss']:.4f}",
            "test accuracy": f"{last['accuracy']:.2%}",
            "time": f"{last['time']:.1f} s",
            "training samples/s": f"{samples / self.seconds:,.0f}",
            "replicas identical": "yes" if agree else "NO",
        }


def mean_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, its mean over all samples and positions."""
    return cross_entropy(scores.flatten(0, -2), targets.flatten())
