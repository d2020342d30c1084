"""What a backend must be able to do with bytes; the collectives are built from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from heatopt.comm._work import Request

__all__ = ["Transport"]


class Transport(ABC):
    """Operations between ranks on contiguous tensors, which are on a device that :meth:`_to_wire` chose.

    With ``blocking`` an operation may complete before it returns. Operations of one lane are started in the same order
    on all ranks; see [Note: Order of stages].
    """

    rank: int
    """This process's number, 0 to size - 1."""
    size: int
    """Number of ranks."""

    def _to_wire(self, flat: torch.Tensor) -> torch.Tensor:
        """Return ``flat`` itself, or a copy of it where the backend can reach it."""
        return flat

    def _is_on_device(self, flat: torch.Tensor) -> bool:
        """True if the device itself carries ``flat``, in the order of its streams. Collective at the first call."""
        return False

    def _has_native_sum(self, dtype: torch.dtype) -> bool:
        """True if :meth:`_native_sum` gives the bits of a sum in rank order for ``dtype``."""
        return False

    def _native_sum(self, flat: torch.Tensor, blocking: bool) -> Request:
        raise NotImplementedError

    @abstractmethod
    def _all_to_all(self, send: torch.Tensor, receive: torch.Tensor, lane: int, blocking: bool) -> Request:
        """Send the r-th of ``size`` equal parts of ``send`` to rank r."""

    @abstractmethod
    def _all_to_all_parts(
        self, send: torch.Tensor, receive: torch.Tensor, lengths: Sequence[int], blocking: bool
    ) -> Request:
        """Send the r-th part of ``send``, of ``lengths[r]`` elements, to rank r; on lane 0.

        ``receive`` has ``size`` times as many elements as this rank's part; ``lengths`` are equal on all ranks.
        """

    @abstractmethod
    def _all_gather(self, send: torch.Tensor, receive: torch.Tensor, lane: int, blocking: bool) -> Request:
        """Fill ``receive`` with the ``send`` of all ranks, in rank order."""

    @abstractmethod
    def _broadcast(self, flat: torch.Tensor, root: int, blocking: bool) -> Request:
        """Fill ``flat`` with that of ``root``."""
