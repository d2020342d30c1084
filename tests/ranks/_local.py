"""Local-update methods, slowly and obviously: all replicas in one process, one parameter after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.ranks._training import Make, batch, loss_of, net

Values = list[torch.Tensor]


class Replica:
    """One rank's model and optimizer."""

    def __init__(self, make: Make, rank: int, model: Callable[[], nn.Module] = net) -> None:
        self.rank = rank
        self.model = model()
        self.optimizer = make(self.model)

    def update(self, step: int) -> None:
        """One local update with the batch of this rank."""
        self.optimizer.zero_grad()
        loss_of(self.model, batch(step, self.rank)).backward()
        self.optimizer.step()

    @property
    def values(self) -> Values:
        """Copies of the parameters."""
        return [p.detach().clone() for p in self.model.parameters()]

    @values.setter
    def values(self, values: Values) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), values, strict=True):
                parameter.copy_(value)


def replicas(make: Make, size: int) -> list[Replica]:
    """Equal replicas, one per rank."""
    return [Replica(make, rank) for rank in range(size)]


def mean(lists: list[Values]) -> Values:
    """The mean over replicas, parameter by parameter."""
    return [torch.stack(values).sum(0) / len(lists) for values in zip(*lists, strict=True)]


def minus(a: Values, b: Values) -> Values:
    return [x - y for x, y in zip(a, b, strict=True)]


def plus(a: Values, b: Values, factor: float = 1.0) -> Values:
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def zeros(a: Values) -> Values:
    return [torch.zeros_like(x) for x in a]
