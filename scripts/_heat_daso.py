"""DASO as it was published and as Heat computes it, re-enacted from its formulas: what heatopt's DASO is compared with.

After each batch gradients are averaged within the node. Among nodes, in turn one rank of each node:

* warm-up and cool-down: averages the parameters, rounded to bfloat16, and they replace the single-precision ones;
* in between, after every B-th batch: sends its parameters, and S batches later mixes what has arrived into what it
  has by then, ``x <- (2 S x + sum of x_i) / (2 S + P)``; after the last batch of an epoch: averages them as they are,

and passes the result on to its node. B and S begin at 4 and 1; where the loss has stopped improving B is halved and S
made smaller by one, not below 1, and where B was 1 both start anew from the largest B. Transfers go on in the
background as heatopt's do. The optimizer's own state stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from heatopt import DetectMetricPlateau
from heatopt.comm import Communicator, Work

__all__ = ["HeatDaso"]


class HeatDaso:
    """Steps ``optimizer`` on all ranks of ``comm``, each node of which has as many of them.

    Args:
        optimizer: a torch optimizer.
        epochs: of the training.
        comm: the ranks.
        warmup: epochs at the beginning in which nodes meet after each batch.
        cooldown: the same at the end.
        stability: the relative change of the loss that counts as an improvement.
        most: largest B.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        *,
        comm: Communicator,
        warmup: int,
        cooldown: int,
        stability: float,
        most: int = 8,
    ) -> None:
        self.torch_optimizer = optimizer
        self._within, self._across = comm.by_node()
        self._comm = comm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._phases = (warmup, epochs - cooldown)
        self._most = most
        self._plateau = DetectMetricPlateau(patience=2, threshold=stability)
        self._epoch = self._batch = self._turn = 0
        self._skip = self._wait = 0
        self._sent: tuple[Work[torch.Tensor], int, int] | None = None  # the sum, who sent it, when it is due
        for parameter in self._parameters:
            comm.broadcast(parameter.data)
        self._enter_epoch()

    @property
    def global_skip(self) -> int:
        """B; 0: nodes meet after each batch."""
        return self._skip

    def zero_grad(self) -> None:
        """As the optimizer's."""
        self.torch_optimizer.zero_grad()

    def step(self, last: bool) -> None:
        """One update and what follows it; ``last``: it is the last one of an epoch."""
        gradients = _flat(p.grad for p in self._parameters)
        _write(self._within.allreduce(gradients, "mean"), [p.grad for p in self._parameters])
        self.torch_optimizer.step()
        if self._skip == 0:
            self._meet(torch.bfloat16)
        else:
            self._cycle(last)
        self._batch = 0 if last else self._batch + 1

    def _cycle(self, last: bool) -> None:
        if self._sent is not None and (last or self._batch >= self._sent[2]):
            self._merge(*self._sent[:2])
        if last:
            self._meet(torch.float32)
        elif self._batch % self._skip == 0:
            values = _flat(self._parameters)
            if self._within.rank == self._turn:
                work = self._across.allreduce_async(values, "sum")
            else:
                work = None
            self._sent = (work, self._turn, self._batch + self._wait)  # type: ignore[assignment]
            self._turn = (self._turn + 1) % self._within.size

    def _merge(self, work: Work[torch.Tensor] | None, sender: int) -> None:
        own = _flat(self._parameters)
        if work is not None:
            own = (2 * self._wait * own + work.wait()) / (2 * self._wait + self._across.size)
        _write(self._within.broadcast(own, sender), self._parameters)
        self._sent = None

    def _meet(self, dtype: torch.dtype) -> None:
        values = _flat(self._parameters).to(dtype)
        if self._within.rank == self._turn:
            self._across.allreduce(values, "mean")
        self._within.broadcast(values, self._turn)
        _write(values.float(), self._parameters)
        self._turn = (self._turn + 1) % self._within.size

    def epoch_loss_logic(self, loss: float) -> None:
        """Decide on B and S of the next epoch."""
        mean = self._comm.allreduce(torch.tensor(loss, dtype=torch.float64), "mean").item()
        self._epoch += 1
        self._enter_epoch()
        if self._skip == 0 or not self._plateau.has_plateaued(mean):
            return
        if self._skip > 1:
            self._skip, self._wait = self._skip // 2, max(self._wait - 1, 1)
        else:
            self._skip, self._wait = self._most, self._most // 4

    def _enter_epoch(self) -> None:
        warm, cool = self._phases
        if self._epoch < warm or self._epoch >= cool:
            self._skip = self._wait = 0
        elif self._epoch == warm:
            self._skip, self._wait = 4, 1


def _flat(tensors: Iterable[Any]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _write(flat: torch.Tensor, tensors: list[Any]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data.copy_(part.view_as(tensor))
