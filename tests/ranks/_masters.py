"""Plain torch over wide copies: what training with master weights must be, to the last bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from heatopt import DataParallelOptimizer
from tests.support import parity
from tests.support.algorithms import Case
from tests.support.problems import Net
from tests.support.training import SMALL_BUCKET_MB

if TYPE_CHECKING:
    from heatopt.comm import Communicator

MASTERS = "master_weights"
MASTER = "master_weight"
ADAMW = Case(torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1})
SGD = Case(torch.optim.SGD, {"lr": 0.1})


def make_net(case: Case, dtype: torch.dtype = torch.bfloat16) -> Net:
    return Net(dtype, matrices_only=case.matrices_only, with_empty=case.takes_empty)


def wrap(comm: Communicator, case: Case, net: torch.nn.Module, shard: str = "none", **options: Any) -> Any:
    """The data-parallel optimizer with masters in single precision."""
    settings = {"comm": comm, "bucket_mb": SMALL_BUCKET_MB, "master_dtype": torch.float32, "shard": shard} | options
    return DataParallelOptimizer(case.optimizer(net.parameters()), **settings)


def backward(comm: Communicator, optimizer: torch.optim.Optimizer, net: Net, step: int) -> None:
    """Gradients of this rank's part of a batch."""
    optimizer.zero_grad()
    net(net.batch(step, comm.size).part(comm.rank, comm.size)).backward()


def train(comm: Communicator, optimizer: torch.optim.Optimizer, net: Net, steps: range) -> None:
    """One update for each of ``steps``."""
    for step in steps:
        backward(comm, optimizer, net, step)
        optimizer.step()


class Oracle:
    """A plain optimizer over wide copies of a narrow network, which is the copies, rounded, after each update.

    Gradients of the narrow network are averaged one after the other, and cast.

    Args:
        comm: the ranks whose gradients are averaged.
        case: the algorithm.
        net: the narrow network; it is this object's own.
        dtype: of the copies.
    """

    def __init__(self, comm: Communicator, case: Case, net: Net, dtype: torch.dtype = torch.float32) -> None:
        self.comm = comm
        self.net = net
        self.wide = [torch.nn.Parameter(p.detach().to(dtype)) for p in net.parameters()]
        self.optimizer = case.optimizer(self.wide)
        self.seen: set[int] = set()  # which copies have ever had a gradient: the others have no master yet

    def backward(self, step: int) -> None:
        """Give the copies the cast averages of the gradients."""
        backward(self.comm, self.optimizer, self.net, step)
        own = [p.grad for p in self.net.parameters()]
        columns = zip(*self.comm.all_gather_object(own), strict=True)
        for number, (wide, column) in enumerate(zip(self.wide, columns, strict=True)):
            mean = parity.mean_in_rank_order(column)
            wide.grad = None if mean is None else mean.to(wide.dtype)
            self.seen |= set() if mean is None else {number}
        self.net.zero_grad()

    @torch.no_grad()
    def update(self) -> None:
        """Update the copies, and round them."""
        self.optimizer.step()
        for parameter, wide in zip(self.net.parameters(), self.wide, strict=True):
            parameter.copy_(wide)

    def train(self, steps: range) -> None:
        """One update for each of ``steps``."""
        for step in steps:
            self.backward(step)
            self.update()

    def snapshot(self) -> dict[str, Any]:
        """What :func:`snapshot` must find."""
        masters = {number: self.wide[number].detach() for number in sorted(self.seen)}
        return {"net": list(self.net.parameters()), "masters": masters, "states": self.optimizer.state_dict()}


def snapshot(net: Net, optimizer: Any) -> dict[str, Any]:
    """What training has made: the parameters, the masters and the states. Collective."""
    states = optimizer.state_dict()
    return {"net": list(net.parameters()), "masters": dict(sorted(states.pop(MASTERS).items())), "states": states}
