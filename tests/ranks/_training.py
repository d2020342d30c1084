"""Small problems for tests of several ranks, and what they are compared with: one process and the whole batch.

Nothing here draws from torch's own random generator, which the threads of a test share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt

if TYPE_CHECKING:
    from heatopt.comm import Communicator

TINY = 1e-4
"""A ``bucket_mb`` so small that every parameter of these models has a bucket of its own."""

MODES = [
    pytest.param({"bucket_mb": TINY, "blocking": True}, id="many-buckets"),
    pytest.param({"bucket_mb": TINY, "blocking": False}, id="non-blocking"),
    pytest.param({"bucket_mb": 8}, id="one-bucket"),
]
"""How gradients travel."""
every_mode = pytest.mark.parametrize("mode", MODES)

Batch = tuple[torch.Tensor, torch.Tensor]
FEATURES, OUTPUTS, ROWS = 4, 3, 4


def generator(seed: int) -> torch.Generator:
    """A source of random numbers of one's own."""
    return torch.Generator().manual_seed(seed)


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Overwrite all parameters with numbers that depend on ``seed`` alone, and return the module."""
    source = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
            real.copy_(torch.randn(real.shape, generator=source, dtype=torch.float64) / 2)
    return module


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A network with six parameters, three of them matrices."""
    layers = [nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, OUTPUTS)]
    return fill(nn.Sequential(*layers).to(dtype), seed)


def matrices(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A network whose parameters are matrices only."""
    layers = [nn.Linear(FEATURES, 6, bias=False), nn.Tanh(), nn.Linear(6, OUTPUTS, bias=False)]
    return fill(nn.Sequential(*layers).to(dtype), seed)


class Words(nn.Module):
    """An embedding with sparse gradients; each row of the input selects four of its seven words."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, OUTPUTS, sparse=True, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding((x * 10).long().remainder(7)).mean(1)


def words(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """An embedding with sparse gradients."""
    return fill(Words(dtype), seed)


def batch(step: int, rank: int, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> Batch:
    """The inputs and targets of one rank at one step."""
    source = generator(1 + 1009 * step + rank)
    x = torch.randn(rows, FEATURES, generator=source, dtype=torch.float64)
    y = torch.randn(rows, OUTPUTS, generator=source, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def whole(step: int, ranks: int | Iterable[int], dtype: torch.dtype = torch.float64) -> Batch:
    """The batches of all ranks, or of the given ones, as one batch."""
    numbers = range(ranks) if isinstance(ranks, int) else ranks
    parts = [batch(step, rank, dtype=dtype) for rank in numbers]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def loss_of(model: nn.Module, data: Batch) -> torch.Tensor:
    """Mean of the squared errors."""
    x, y = data
    return (model(x) - y).abs().square().mean()


@dataclass(frozen=True)
class Algorithm:
    """One of torch's algorithms, with a problem that it can solve."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def closure(self) -> bool:
        """Whether ``step`` needs a closure."""
        return self.name == "LBFGS"

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        make = {"Muon": matrices, "SparseAdam": words}.get(self.name, net)
        return make(dtype, seed)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        kind: type[torch.optim.Optimizer] = getattr(heatopt, self.name)
        return kind(model.parameters(), **self.options)  # type: ignore[arg-type]

    def update(self, optimizer: torch.optim.Optimizer, model: nn.Module, data: Batch) -> float:
        """One step of training; returns the loss before it (of this rank, or as ``step`` returned it)."""

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, data)
            loss.backward()
            return loss.detach()  # LBFGS makes it a number, and torch warns of a loss that has a history

        if self.closure:
            return float(optimizer.step(closure))  # type: ignore[arg-type]
        loss = closure()
        optimizer.step()
        return loss.item()


_OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "LBFGS": {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"},
    "RMSprop": {"momentum": 0.5},
    "Adam": {"amsgrad": True, "weight_decay": 0.01},
}

ALGORITHMS = [
    Algorithm(name, _OPTIONS.get(name, {}))
    for name, kind in sorted(vars(torch.optim).items())
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]
"""Every algorithm that this torch has."""

by_name = {algorithm.name: algorithm for algorithm in ALGORITHMS}

Make = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum: whatever is added to a gradient shows in the parameters, in its size."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, which moves parameters whose gradient is zero but not those whose gradient is None."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def wrap(comm: Communicator, make: Make, model: nn.Module, /, **options: Any) -> heatopt.DataParallelOptimizer:
    """The data-parallel optimizer over ``comm``, with a bucket for each parameter unless ``options`` say otherwise."""
    return heatopt.DataParallelOptimizer(make(model), **{"comm": comm, "bucket_mb": TINY, "model": model} | options)


def train(
    optimizer: torch.optim.Optimizer, model: nn.Module, batches: Iterable[Batch], scale: float = 1.0
) -> list[float]:
    """Train on ``batches`` in turn and return the losses; ``scale`` multiplies the loss for backward."""
    losses = []
    for data in batches:
        optimizer.zero_grad()
        loss = loss_of(model, data)
        (loss * scale).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def reference(make: Make, model: nn.Module, size: int, steps: int | Sequence[int]) -> torch.optim.Optimizer:
    """Train ``model`` in one process on the whole batches of ``size`` ranks; returns the plain torch optimizer."""
    optimizer = make(model)
    train(optimizer, model, [whole(step, size) for step in (range(steps) if isinstance(steps, int) else steps)])
    return optimizer


def tensors_of(thing: object) -> list[torch.Tensor]:
    """All tensors in modules, optimizers, state dictionaries and lists, in a fixed order."""
    if isinstance(thing, torch.Tensor):
        return [thing.detach()]
    if isinstance(thing, nn.Module):
        return [tensor.detach() for tensor in thing.state_dict().values()]
    if isinstance(thing, torch.optim.Optimizer):
        return tensors_of(thing.state_dict())
    if isinstance(thing, dict):
        return [tensor for key in thing for tensor in tensors_of(thing[key])]
    if isinstance(thing, list | tuple):
        return [tensor for item in thing for tensor in tensors_of(item)]
    return []


def assert_close(actual: object, expected: object, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Compare all tensors of two modules, optimizers or lists; sparse ones by what they stand for."""
    ours, theirs = [[t.to_dense() for t in tensors_of(thing)] for thing in (actual, expected)]
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


def assert_equal(actual: object, expected: object) -> None:
    """Compare all tensors of two modules, optimizers or lists bit for bit."""
    ours, theirs = tensors_of(actual), tensors_of(expected)
    assert len(ours) == len(theirs)
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert _bits(mine) == _bits(other), f"tensor {number} differs: {mine} is not {other}"


def assert_ranks_equal(comm: Communicator, *things: object) -> None:
    """All tensors in ``things`` have the same bits on all ranks, the last one included."""
    own = [hashlib.sha1(_bits(tensor)).hexdigest() for tensor in tensors_of(list(things))]
    for rank, found in enumerate(comm.all_gather_object(own)):
        assert found == own, f"rank {rank} has other bits than rank {comm.rank}"


def _bits(tensor: torch.Tensor) -> bytes:
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    header = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return header + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    """Copies of the gradients."""
    return [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def assert_shares(optimizer: heatopt.DataParallelOptimizer) -> None:
    """The wrapper has no groups, state or defaults of its own."""
    inner = optimizer.torch_optimizer
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
