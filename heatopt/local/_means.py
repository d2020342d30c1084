"""Plain averages, made at once, of what all ranks of a group have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from heatopt.comm import Communicator
from heatopt.local._moments import moments_of
from heatopt.local._packing import Packed, weighed
from heatopt.local._subject import Subject
from heatopt.sync import broadcast_tensors

__all__ = ["average_buffers", "average_moments", "average_over", "exchange_numbers"]


def average_over(group: Communicator, tensors: Sequence[torch.Tensor], chunk: int, weight: float | None = None) -> None:
    """Replace ``tensors`` by their means over ``group``, in messages of at most ``chunk`` elements. Collective.

    Args:
        group: the ranks.
        tensors: of the same shapes and dtypes on all of them.
        chunk: most elements of one message.
        weight: of this rank, on average 1; None: all count alike.
    """
    packed = Packed(weighed(tensors, weight), chunk)
    for part in packed.chunks:
        group.allreduce(part, "mean")
    for tensor, mean in zip(tensors, packed.unpack(), strict=True):
        tensor.copy_(mean)


def exchange_numbers(group: Communicator, numbers: Sequence[float], what: str) -> list[list[float]]:
    """The numbers of every rank of ``group``. Collective."""
    words = np.array(numbers, dtype=np.float64).view(np.int64)
    found: list[list[float]] = group.exchange_words(words, what).view(np.float64).tolist()
    return found


def average_buffers(channel: Communicator, subject: Subject, chunk: int) -> None:
    """Average the model's floating buffers, and take the others from rank 0. Collective."""
    buffers = subject.buffers()
    average_over(channel, [b for b in buffers if b.is_floating_point() or b.is_complex()], chunk)
    others = [b for b in buffers if not (b.is_floating_point() or b.is_complex())]
    broadcast_tensors(channel, others, 0, "broadcast of integer buffers")


def average_moments(channel: Communicator, subject: Subject, order: int, chunk: int) -> None:
    """Average the first (1) or second (2) moments of the optimizer. Collective."""
    state, parameters = subject.optimizer.state, subject.parameters()
    own = {
        (index, name): value
        for index, parameter in enumerate(parameters)
        if parameter in state
        for name, value in moments_of(state[parameter], order).items()
    }
    # A rank whose loss has not touched a parameter yet has no moments of it.
    described = [(*key, tuple(value.shape), str(value.dtype)) for key, value in own.items()]
    common = set.intersection(*map(set, channel.exchange_objects(described, "the moments of each rank")))
    average_over(channel, [own[index, name] for index, name, *_ in sorted(common)], chunk)
