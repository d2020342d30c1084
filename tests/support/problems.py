"""Small models, data and batches: the same on every rank, without a look at the global random numbers.

``N`` ranks with their parts of a batch, and one process with the whole of it, must train the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

STEPS = 3
_PER_RANK = 2  # samples


def generator(*key: int) -> torch.Generator:
    """Random numbers that depend on ``key`` alone."""
    seed = 1
    for number in key:
        seed = (seed * 1_000_003 + number + 17) % 2**31
    return torch.Generator().manual_seed(seed)


def random(shape: Iterable[int], dtype: torch.dtype, *key: int) -> Tensor:
    """A tensor of normally distributed numbers; for narrower dtypes the same numbers, rounded."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), generator=generator(*key), dtype=wide).to(dtype)


@dataclass(frozen=True)
class Batch:
    """Some samples."""

    inputs: Tensor
    targets: Tensor
    branch: Tensor
    """Which samples take the branch of :class:`Net`."""

    def part(self, rank: int, size: int) -> Batch:
        """What ``rank`` of ``size`` ranks sees: its own copy, so that it lies in memory as anywhere else."""
        return Batch(*(tensor.chunk(size)[rank].clone() for tensor in (self.inputs, self.targets, self.branch)))


class Net(nn.Module):
    """Two layers with all that is odd about parameters.

    ``first`` is used twice, ``branch`` by some samples only, ``unused`` by none; ``scale`` has no dimension and
    ``empty`` no element; no size is a power of two.

    Args:
        dtype: of all parameters.
        device: of all parameters.
        matrices_only: give every parameter two dimensions.
        with_empty: have the parameter without elements.
        features: number of inputs.
        hidden: number of hidden units.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        device: str = "cpu",
        matrices_only: bool = False,
        with_empty: bool = True,
        features: int = 5,
        hidden: int = 7,
    ) -> None:
        super().__init__()
        self.features = features
        shapes: dict[str, tuple[int, ...]] = {
            "first": (hidden, features),
            "bias": (1, hidden) if matrices_only else (hidden,),
            "scale": (1, 1) if matrices_only else (),
            "branch": (hidden, hidden),
            "unused": (4, 3),
            "second": (3, hidden),
        }
        if with_empty:
            shapes["empty"] = (0, 3)
        for number, (name, shape) in enumerate(shapes.items()):
            value = random(shape, dtype, 7, number) / max(shape[-1:] or (1,)) ** 0.5
            self.register_parameter(name, nn.Parameter(value.to(device)))

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss over the samples."""
        hidden = batch.inputs @ self.first.mT * self.scale + self.bias
        # tanh has poles among the complex numbers
        hidden = hidden / (1 + hidden.abs()) if hidden.is_complex() else torch.tanh(hidden)
        if batch.branch.any():
            hidden = hidden + batch.branch[:, None] * (hidden @ self.branch)
        error = torch.cat([hidden @ self.second.mT - batch.targets, hidden @ self.first - batch.inputs], dim=1)
        squares = (error * error.conj()).real if error.is_complex() else error.square()
        loss = squares.sum(dim=1).mean()
        return loss + torch.real(self.empty).sum() if hasattr(self, "empty") else loss

    def batch(self, step: int, size: int) -> Batch:
        """The samples of all of ``size`` ranks at ``step``; at step 1 none of them takes the branch."""
        count = size * _PER_RANK
        dtype, device = self.first.dtype, self.first.device
        ranks = torch.arange(count) // _PER_RANK
        takes = ((ranks + step) % 2 == 0) & (step != 1)
        return Batch(
            random((count, self.features), dtype, 11, step, size).to(device),
            random((count, 3), dtype, 13, step, size).to(device),
            takes.to(device),
        )

    def losses(self, size: int, rank: int | None = None) -> list[Callable[[], Tensor]]:
        """The loss of each step: over the samples of all of ``size`` ranks, or over those of one."""
        batches = [self.batch(step, size) for step in range(STEPS)]
        return [partial(self, batch if rank is None else batch.part(rank, size)) for batch in batches]


@dataclass(frozen=True)
class Words:
    """Samples that are sets of rows of a table."""

    indices: Tensor
    sample: Tensor
    """To which sample each index belongs."""
    targets: Tensor


class Table(nn.Module):
    """An embedding with sparse gradients: the sum of a sample's rows is its prediction.

    Args:
        dense: have a dense parameter beside it.
    """

    rows = 9
    width = 3

    def __init__(self, *, dense: bool = False) -> None:
        super().__init__()
        weight = random((self.rows, self.width), torch.float64, 3)
        self.embedding = nn.Embedding(self.rows, self.width, sparse=True, _weight=weight)
        self.shift = nn.Parameter(random((self.width,), torch.float64, 5)) if dense else None

    def forward(self, words: Words) -> Tensor:
        """The mean loss over the samples."""
        sums = torch.zeros_like(words.targets).index_add(0, words.sample, self.embedding(words.indices))
        error = sums - words.targets if self.shift is None else sums + self.shift - words.targets
        return error.square().sum(dim=1).mean()


def words(samples: list[list[int]], step: int) -> Words:
    """Samples with the given rows; targets depend on the rows and the step, not on the rank that sees them."""
    targets = [random((Table.width,), torch.float64, 19, step, *rows) for rows in samples]
    return Words(
        torch.tensor([row for rows in samples for row in rows], dtype=torch.int64),
        torch.tensor([number for number, rows in enumerate(samples) for _ in rows], dtype=torch.int64),
        torch.stack(targets),
    )
