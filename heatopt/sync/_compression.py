"""Which elements of a gradient travel, and what happens to the others. Pure.

[Note: Compression]
With a policy C each rank r keeps, for every parameter, a residual e_r: what it has not sent yet. In a reduction

    a_r = e_r + g_r,        s_r = C(a_r),        p.grad = (1/P) sum_r s_r,        e_r = a_r - s_r,

so an element that is left out travels later, with all that has come to it meanwhile: error feedback. It is of one
parameter and one rank at a time, hence neither the buckets nor their order change it. Without error feedback e_r = 0.

Where the mean has another divisor D than the number of ranks P (weights, ``join()``), a residual is kept in the unit in
which its mean over all P ranks is what the averages lack: e_r counts as e_r D / P before it is divided by D. Thus
``sum over steps of p.grad + (1/P) sum_r e_r`` is the sum of the exact means, whatever the weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from numbers import Real

import torch

__all__ = ["Compression", "Threshold", "TopK"]


class Compression(ABC):
    """What travels of a gradient: the base of :class:`TopK`, :class:`Threshold` and policies of your own.

    A policy says which elements of one parameter's gradient a rank sends, and as which values; the rest stays in the
    residual. It has no state and draws no random numbers that differ from those of a repetition: what it returns
    depends on the tensor alone. Its ``repr``, by default all of its attributes, must be equal on all ranks.

    Args:
        error_feedback: add what was not sent to the next gradient; otherwise it is lost.

    Example:
        >>> class Every(heatopt.Compression):
        ...     def __init__(self, stride):
        ...         super().__init__()
        ...         self.stride = stride
        ...
        ...     def compress(self, flat):
        ...         indices = torch.arange(0, flat.numel(), self.stride, device=flat.device)
        ...         return indices, flat[indices]
    """

    def __init__(self, error_feedback: bool = True) -> None:
        if not isinstance(error_feedback, bool):
            raise TypeError(f"error_feedback must be True or False, got {error_feedback!r}")
        self.error_feedback = error_feedback

    @abstractmethod
    def compress(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose what is sent.

        Args:
            flat: gradient plus residual of one parameter, one-dimensional, in the order of its indices, of the
                gradient's dtype, but float32 for half types. Not to be changed. May be empty, or hold inf and nan.

        Returns:
            Distinct indices, int64, and what is sent for each, of the dtype of ``flat``: usually ``flat[indices]``. It
            travels in the gradient's dtype; what rounding takes from it stays in the residual, too.
        """

    def count(self, numel: int) -> int | None:
        """How many indices :meth:`compress` returns for so many elements, if that depends on nothing else.

        Otherwise None, the default: ranks then tell each other, which is one exchange more for each bucket.
        """
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in sorted(vars(self).items()))})"


class TopK(Compression):
    """The share ``ratio`` of each parameter's elements that are largest in absolute value; ties: the lowest index.

    k = max(1, ceil(ratio * numel)) elements of each parameter (none of an empty one). With error feedback: Stich et
    al., "Sparsified SGD with memory", NeurIPS 2018, arXiv 1809.07599. ``TopK(1.0)`` gives the bits of no compression.

    Args:
        ratio: 0 < ratio <= 1.
        error_feedback: as in :class:`Compression`; without it the elements that are small stay what they are for ever.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``ratio`` is out of its range.
    """

    def __init__(self, ratio: float, error_feedback: bool = True) -> None:
        super().__init__(error_feedback)
        self.ratio = _number("ratio", ratio)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be a number > 0 and <= 1, got {ratio!r}")

    def count(self, numel: int) -> int:
        return min(numel, max(1, math.ceil(self.ratio * numel)))

    def compress(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.count(flat.numel())
        if k == flat.numel():
            return torch.arange(k, device=flat.device), flat
        sizes = flat.abs().nan_to_num_(nan=math.inf, posinf=math.inf)
        smallest = torch.topk(sizes, k, sorted=False).values.min()
        # topk promises no order among equals: all that are larger, and as many of the equal ones as there is room for.
        larger = (sizes > smallest).nonzero().view(-1)
        equal = (sizes == smallest).nonzero().view(-1)[: k - larger.numel()]
        indices = torch.cat([larger, equal])
        return indices, flat[indices]


class Threshold(Compression):
    """All elements whose absolute value is at least ``value``; Strom, Interspeech 2015, and Aji & Heafield 2017.

    How many that are differs from rank to rank and step to step. A threshold is in the unit of the gradients: with a
    :class:`heatopt.GradScaler` that of the scaled ones.

    Args:
        value: at least 0; 0 sends everything.
        error_feedback: as in :class:`Compression`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``value`` is out of its range.
    """

    def __init__(self, value: float, error_feedback: bool = True) -> None:
        super().__init__(error_feedback)
        self.value = _number("value", value)
        if not 0 <= self.value < math.inf:
            raise ValueError(f"value must be a finite number >= 0, got {value!r}")

    def compress(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # What is not a number is sent as well: it is to be seen in the averages, and not to stay here.
        indices = (~(flat.abs() < self.value)).nonzero().view(-1)
        return indices, flat[indices]


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)
