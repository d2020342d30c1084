"""What the tests of compressed gradients have in common.

And compressed averages the slow and obvious way: all ranks in one process, element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

import heatopt
from tests.ranks._training import Batch, batch, loss_of

if TYPE_CHECKING:
    from heatopt.comm import Communicator

Choose = Callable[[list[complex]], list[int]]
Gradients = Sequence[torch.Tensor | None]

STEPS = 5
TOP = heatopt.TopK(0.2)


def residuals(optimizer: heatopt.DataParallelOptimizer) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = optimizer.state_dict().get("residuals", {})
    return found


def lacking(optimizer: heatopt.DataParallelOptimizer, comm: Communicator) -> list[torch.Tensor]:
    """The mean of the residuals over all ranks."""
    return [comm.allreduce(residual.clone(), "mean") for residual in residuals(optimizer).values()]


def batches(comm: Communicator, steps: range = range(STEPS)) -> list[Batch]:
    return [batch(step, comm.rank) for step in steps]


def still(model: nn.Module) -> torch.optim.Optimizer:
    """Gradients do not depend on what was sent before."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def largest(ratio: float) -> Choose:
    """What ``TopK(ratio)`` sends."""

    def choose(values: list[complex]) -> list[int]:
        k = min(len(values), max(1, math.ceil(ratio * len(values))))
        return sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k]

    return choose


def at_least(value: float) -> Choose:
    """What ``Threshold(value)`` sends."""
    return lambda values: [i for i, number in enumerate(values) if abs(number) >= value]


class Signs(heatopt.Compression):
    """A policy of a user's: every other element, as its sign times the mean of the absolute values."""

    def compress(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.arange(0, flat.numel(), 2)
        chosen = flat[indices]
        return indices, chosen.sign() * chosen.abs().mean()


def every_other(values: list[complex]) -> list[int]:
    return list(range(0, len(values), 2))


class Reference:
    """The residuals of all ranks, and the averages that they give.

    Args:
        choose: the indices that are sent.
        feedback: with residuals.
        signs: what is sent is :class:`Signs`'s.
    """

    def __init__(self, choose: Choose, feedback: bool = True, signs: bool = False) -> None:
        self.choose, self.feedback, self.signs = choose, feedback, signs
        self.residuals: dict[tuple[int, int], torch.Tensor] = {}  # by rank and parameter

    def average(
        self, gradients: Sequence[Gradients], shares: Sequence[float] | None = None
    ) -> list[torch.Tensor | None]:
        """The averages of what ``gradients[rank]`` become, with weights that have a mean of 1."""
        averages: list[torch.Tensor | None] = []
        for number, of_ranks in enumerate(zip(*gradients, strict=True)):
            present = [g for g in of_ranks if g is not None]
            if not present:
                averages.append(None)
                continue
            total = torch.zeros_like(present[0]).view(-1)
            for rank, gradient in enumerate(of_ranks):
                own = torch.zeros_like(total) if gradient is None else gradient.reshape(-1).clone()
                self._send(rank, number, own, total)
            averages.append((total / len(of_ranks)).view(present[0].shape))
        return averages

    def _send(self, rank: int, number: int, own: torch.Tensor, total: torch.Tensor) -> None:
        if self.feedback and (rank, number) in self.residuals:
            own += self.residuals[rank, number]
        indices = self.choose(own.tolist())
        size = sum(abs(own[i]) for i in indices) / max(len(indices), 1)
        for i in indices:
            sent = own[i].sign() * size if self.signs else own[i].clone()
            total[i] += sent
            own[i] -= sent
        self.residuals[rank, number] = own

    def residuals_of(self, rank: int, model: nn.Module) -> dict[str, torch.Tensor]:
        """By name, in the shape of the parameters."""
        return {
            name: self.residuals[rank, number].view(p.shape) if self.feedback else torch.zeros_like(p)
            for number, (name, p) in enumerate(model.named_parameters())
        }

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, size: int, steps: Sequence[int]) -> None:
        """Train one model for ``size`` ranks."""
        for step in steps:
            found = [gradients_of(model, step, rank) for rank in range(size)]
            for p, average in zip(model.parameters(), self.average(found), strict=True):
                p.grad = average
            optimizer.step()


def gradients_of(model: nn.Module, step: int, rank: int) -> list[torch.Tensor]:
    """Of one rank's loss."""
    return list(torch.autograd.grad(loss_of(model, batch(step, rank)), list(model.parameters())))
