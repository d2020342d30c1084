"""Whose memory the parameters of an optimizer live in, and the case that each rank has its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from heatopt.comm import BucketMemory, Communicator
from heatopt.sharding._partition import Block
from heatopt.sharding._views import OwnViews, Views

__all__ = ["OwnParameters", "ParameterMemory"]


class ParameterMemory(ABC):
    """What an update needs of the memory of its parameters.

    Args:
        channel: returns the communicator.
    """

    is_shared = False
    """True if the ranks of a node have the parameters in common."""

    def __init__(self, channel: Callable[[], Communicator]) -> None:
        self._channel = channel

    @abstractmethod
    def hold(
        self, parameters: Sequence[torch.Tensor], others: Iterable[torch.Tensor] = (), *, equal: bool = False
    ) -> None:
        """Take the ``parameters``, all of the optimizer's, into the memory where they belong. Collective.

        Args:
            parameters: in their order.
            others: tensors that stay where they are, which a parameter must not share memory with.
            equal: they are equal on all ranks; otherwise those that move get rank 0's values.
        """

    @abstractmethod
    def apart(self) -> AbstractContextManager[None]:
        """Context in which each rank has memory of its own for them; :meth:`hold` ends that state."""

    @abstractmethod
    def begin(self, parameters: Sequence[torch.Tensor]) -> None:
        """Return once this rank may write its pieces. Collective."""

    @abstractmethod
    def write(self, parameters: Sequence[torch.Tensor], parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Overwrite one of the ``parameters`` with ``value``, which is equal on all ranks. Collective if shared."""

    @abstractmethod
    def views(self, blocks: Sequence[Block], parameters: Sequence[torch.Tensor], former: Views | None) -> Views:
        """The pieces of ``parameters``. Collective if they travel.

        Args:
            blocks: the partition.
            parameters: by index.
            former: views by the same partition that do not fit any more.
        """


class OwnParameters(ParameterMemory):
    """Each rank has all parameters in memory of its own, where the user may do what he likes; pieces travel."""

    def hold(
        self, parameters: Sequence[torch.Tensor], others: Iterable[torch.Tensor] = (), *, equal: bool = False
    ) -> None:
        pass

    def apart(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, parameters: Sequence[torch.Tensor]) -> None:
        pass

    def write(self, parameters: Sequence[torch.Tensor], parameter: torch.Tensor, value: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value)

    def views(self, blocks: Sequence[Block], parameters: Sequence[torch.Tensor], former: Views | None) -> Views:
        comm = self._channel()
        if isinstance(former, OwnViews):
            memories = former.memories
        else:
            memories = _take_turns(comm, blocks)
        return OwnViews(blocks, memories, comm.rank, parameters)


def _take_turns(comm: Communicator, blocks: Sequence[Block]) -> list[BucketMemory]:
    """Memory for a row of each block: all of one kind have the same, since one travels after the other. Collective."""
    rows: dict[tuple[torch.dtype, torch.device], int] = {}
    for block in blocks:
        kind = (block.dtype, block.device)
        rows[kind] = max(rows.get(kind, 0), block.row)
    lent = {kind: comm.allocate(row, *kind) for kind, row in rows.items()}
    return [lent[block.dtype, block.device].first(block.row) for block in blocks]
