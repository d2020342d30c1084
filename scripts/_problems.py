"""What the comparison of methods trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import torch
from _batches import GlobalBatches
from torch import nn
from torch.nn.functional import cross_entropy

from heatopt.comm import Communicator

__all__ = ["PROBLEMS", "Problem", "learning_rate", "pretrain"]

WARM_UP = 0.05  # of the updates, while the learning rate grows


@dataclass(frozen=True)
class Problem:
    """A model, and how it is trained."""

    model: nn.Module
    inputs: torch.Tensor
    targets: torch.Tensor
    held_out: tuple[torch.Tensor, torch.Tensor]
    """Inputs and targets that are not trained on."""
    batch: int
    """Samples of all ranks together."""
    pretrain: int
    """Updates that are alike for all methods, before those that are compared."""
    steps: int
    """Updates that are compared."""
    rate: float
    """Largest learning rate."""
    seconds: float
    """What a simulated rank takes for forward, backward and update."""
    smoothing: float = 0.0
    """Of the labels."""

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of some samples."""
        return cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), label_smoothing=self.smoothing)

    def batch_loss(self, model: nn.Module, indices: torch.Tensor) -> torch.Tensor:
        """That of some samples of the training data."""
        return self.loss(model, self.inputs[indices], self.targets[indices])

    def batches(self, rank: int, size: int, seed: int) -> Iterator[torch.Tensor]:
        """The indices of a rank's samples, batch by batch, without end."""
        epochs = GlobalBatches(len(self.inputs), self.batch, rank=rank, size=size, seed=seed)
        return chain.from_iterable(map(epochs.epoch, count()))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """What makes the updates."""
        return torch.optim.AdamW(model.parameters(), lr=self.rate, fused=True)


def make_digits(comm: Communicator, seed: int) -> Problem:
    """The handwritten digits."""
    from train_digits import make_task

    torch.manual_seed(seed)
    task = make_task()
    return Problem(
        task.model,
        task.train_inputs.float(),
        task.train_targets,
        (task.test_inputs.float(), task.test_targets),
        batch=16,
        pretrain=0,
        steps=800,
        rate=2e-3,
        seconds=2e-3,
        smoothing=0.1,
    )


def make_text(comm: Communicator, seed: int) -> Problem:
    """Python source, byte by byte. Collective."""
    from train_text import ByteGPT, cut, read_on_rank_0

    train_text, test_text = read_on_rank_0(comm, 240_000)
    test_inputs, test_targets = cut(test_text, 32)
    stride = max(1, len(test_inputs) // 1000)  # evenly spaced pieces, so that the test sees every held-out file
    torch.manual_seed(seed)  # here: while ranks communicate in the simulator, others draw numbers
    return Problem(
        ByteGPT(32, width=128, heads=4, layers=3),
        *cut(train_text, 32),
        (test_inputs[::stride], test_targets[::stride]),
        batch=8,
        pretrain=400,
        steps=800,
        rate=1e-3,
        seconds=5e-3,
    )


PROBLEMS: dict[str, Callable[[Communicator, int], Problem]] = {"digits": make_digits, "text": make_text}


def learning_rate(step: int, steps: int) -> float:
    """A short rise, then half a cosine down to a tenth."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def pretrain(comm: Communicator, problem: Problem, updates: int, steps: int, seed: int) -> tuple[Any, Any]:
    """The states of model and optimizer after the first ``updates`` of ``steps`` updates, on all ranks. Collective.

    Rank 0 makes them alone, with the batches of all ranks: what exact synchronisation computes, up to rounding.
    """
    states = None
    if comm.rank == 0:
        model = copy.deepcopy(problem.model)
        optimizer = problem.optimizer(model)
        for step, batch in enumerate(islice(problem.batches(0, 1, seed), updates)):
            for group in optimizer.param_groups:
                group["lr"] = problem.rate * learning_rate(step, steps)
            optimizer.zero_grad()
            problem.batch_loss(model, batch).backward()
            optimizer.step()
        states = model.state_dict(), optimizer.state_dict()["state"]
    shared: tuple[Any, Any] = comm.broadcast_object(states)
    return shared
