"""Vectors over all parameters, of which each rank holds a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from heatopt.comm import Communicator

__all__ = ["SplitVector"]

_HALF = (torch.float16, torch.bfloat16)


class SplitVector:
    """A vector over all parameters, with the operations that torch's LBFGS uses.

    What is computed element by element is local. A number that depends on all elements is collective: each rank's part
    of it is exchanged in double precision, all ranks combine the parts in the same way, and round once, so that they
    see the same bits and take the same branches. An operation that a later torch may use is missing here, which is an
    AttributeError on all ranks, where a tensor would give each rank a number of its own.

    Args:
        part: this rank's elements, which the vector holds without a copy.
        comm: the ranks.
    """

    def __init__(self, part: torch.Tensor, comm: Communicator) -> None:
        self.part = part
        self._comm = comm

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.mul and isinstance(arguments[0], cls) and not keywords:
            return arguments[0].mul(arguments[1])
        return NotImplemented

    # Element by element

    def _new(self, part: torch.Tensor) -> SplitVector:
        return SplitVector(part, self._comm)

    def clone(self, *, memory_format: torch.memory_format = torch.preserve_format) -> SplitVector:
        return self._new(self.part.clone(memory_format=memory_format))

    def neg(self) -> SplitVector:
        return self._new(self.part.neg())

    def abs(self) -> SplitVector:
        return self._new(self.part.abs())

    def mul(self, factor: torch.Tensor | float) -> SplitVector:
        return self._new(self.part.mul(factor))

    def sub(self, other: SplitVector) -> SplitVector:
        return self._new(self.part.sub(other.part))

    def add_(self, other: SplitVector, *, alpha: Any = 1) -> SplitVector:
        self.part.add_(other.part, alpha=alpha)
        return self

    def copy_(self, other: SplitVector) -> SplitVector:
        self.part.copy_(other.part)
        return self

    # Numbers: tensors of no dimension, of the vector's dtype. Collective.

    def dot(self, other: SplitVector) -> torch.Tensor:
        return self._combine(_wide(self.part).dot(_wide(other.part)), _add_up)

    def sum(self) -> torch.Tensor:
        return self._combine(_wide(self.part).sum(), _add_up)

    def max(self) -> torch.Tensor:
        own = self.part.max() if self.part.numel() else torch.tensor(-math.inf)
        return self._combine(own, _largest)

    def _combine(self, own: torch.Tensor, combine: Callable[[list[float]], float]) -> torch.Tensor:
        words = np.array([own.item()], dtype=np.float64).view(np.int64)
        rows = self._comm.exchange_words(words, "an inner product or a norm over all parameters")
        numbers = np.ascontiguousarray(rows).view(np.float64).ravel().tolist()
        return torch.tensor(combine(numbers), dtype=self.part.dtype, device=self.part.device)


def _wide(part: torch.Tensor) -> torch.Tensor:
    """Half types are added up in single precision."""
    return part.float() if part.dtype in _HALF else part


def _add_up(numbers: list[float]) -> float:
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)


def _largest(numbers: list[float]) -> float:
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)
