"""One process: every collective is the identity. It needs no MPI and no torch.distributed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn, TypeVar

import torch

from heatopt.comm._communicator import Communicator, Words
from heatopt.comm._exit import write_last_words
from heatopt.comm._settings import default_timeout
from heatopt.comm._topology import Topology
from heatopt.comm._work import COMPLETED, Request

__all__ = ["SingleCommunicator"]

T = TypeVar("T")


class SingleCommunicator(Communicator):
    """The communicator of a process that works alone."""

    def __init__(self) -> None:
        super().__init__(0, Topology((0,)), default_timeout())

    def abort(self, message: str, code: int = 1) -> NoReturn:
        write_last_words(message)
        sys.exit(code)

    def _has_native_sum(self, dtype: torch.dtype) -> bool:
        return True

    def _native_sum(self, flat: torch.Tensor, blocking: bool) -> Request:
        return COMPLETED

    def _all_to_all(self, send: torch.Tensor, receive: torch.Tensor, lane: int, blocking: bool) -> Request:
        receive.view(-1).copy_(send.view(-1))
        return COMPLETED

    def _all_to_all_parts(
        self, send: torch.Tensor, receive: torch.Tensor, lengths: Sequence[int], blocking: bool
    ) -> Request:
        return self._all_to_all(send, receive, 0, blocking)

    def _all_gather(self, send: torch.Tensor, receive: torch.Tensor, lane: int, blocking: bool) -> Request:
        receive.view(-1).copy_(send.view(-1))
        return COMPLETED

    def _broadcast(self, flat: torch.Tensor, root: int, blocking: bool) -> Request:
        return COMPLETED

    def _exchange_words(self, words: Words) -> Words:
        return words[None]

    def _exchange_objects(self, obj: T) -> list[T]:
        return [obj]

    def _open_group(
        self, color: int, rank: int, *, name: str, topology: Topology, members: tuple[int, ...]
    ) -> Communicator:
        return SingleCommunicator()
