"""Whether hundreds of tensors are of the same kind as before, asked in each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["SameKind", "kinds_of"]


class SameKind:
    """Tells quickly that tensors have the type, dtype, device, layout, shape and strides of those given here.

    One loop in C++, that of the guards of ``torch.compile``; seven properties of each tensor would take longer than
    the update. A torch without it, or None among the tensors, costs time and nothing else.

    Args:
        tensors: none of them is kept. Without any, the answer is False.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._check: Any = None
        self._count = len(tensors)
        if not tensors:
            return
        try:
            from torch._C._dynamo.guards import TensorGuards

            guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            if guards.check(*tensors):
                self._check = guards.check
        except (ImportError, TypeError, ValueError, RuntimeError):
            pass

    def __call__(self, tensors: Sequence[Any]) -> bool:
        """True: all are of the same kind. False: at least one is not, or nobody knows."""
        return self._check is not None and len(tensors) == self._count and bool(self._check(*tensors))


def kinds_of(tensors: Sequence[torch.Tensor]) -> list[object]:
    """The same, to be compared with ``==``; slow, and sure."""
    return [(tensor.dtype, tensor.device, tensor.shape, tensor.stride()) for tensor in tensors]
