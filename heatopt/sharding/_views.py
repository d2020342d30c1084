"""The pieces of parameters as tensors: views of where the parameters lie in memory now."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from heatopt.buckets import covers_its_memory, find_overlaps
from heatopt.comm import BucketMemory, Communicator
from heatopt.sharding._members import Member, PieceMembers
from heatopt.sharding._partition import Block

__all__ = ["CONCLUDING", "OwnViews", "Views"]

CONCLUDING = "a look at whether all ranks have made their part of the update"


class _Traffic:
    """What one block moves, and between which tensors."""

    def __init__(self, block: Block, memory: BucketMemory, rank: int, targets: dict[int, torch.Tensor]) -> None:
        self._block = block
        self.memory = memory
        self._parts: dict[int, list[torch.Tensor]] = {}
        for piece in block.pieces:
            part = targets[piece.index]
            self._parts.setdefault(piece.rank, []).append(part[piece.start : piece.stop] if block.cut else part)
        self._sizes = {owner: [part.numel() for part in parts] for owner, parts in self._parts.items()}
        self._own = self._parts.get(rank, [])
        self._own_places = self._places(memory.own, rank)

    def write(self) -> None:
        """Copy what this rank owns to where the others read it."""
        if self._own:
            torch._foreach_copy_(self._own_places, self._own)

    def take(self, rank: int, row: torch.Tensor) -> None:
        """Overwrite what ``rank`` owns with what it has made of it."""
        parts = self._parts.get(rank)
        if parts:
            torch._foreach_copy_(parts, self._places(row, rank))

    def _places(self, row: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """Where what ``rank`` owns lies in its row."""
        sizes = self._sizes.get(rank, [])
        places = torch.split(row[: sum(sizes)], sizes)
        return list(places if self._block.cut else map(torch.Tensor.view_as, places, self._parts.get(rank, [])))


class Views(ABC):
    """This rank's pieces of parameters, and how the others see what has become of them.

    Args:
        parameters: by index.

    Raises:
        ValueError: parameters share memory.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        _refuse_shared_memory(parameters)
        self._places = _places(parameters)
        self.members: dict[int, Member] = {}
        """This rank's, by index of their parameters."""

    @cached_property
    def own(self) -> PieceMembers:
        """This rank's, together."""
        return PieceMembers(self.members.values())

    def are_current(self, parameters: Sequence[torch.Tensor]) -> bool:
        """False if a parameter's elements are not where they were."""
        return _places(parameters) == self._places

    @abstractmethod
    def refresh(self) -> None:
        """Before an update: see what has become of parameters that have no flat view."""

    @abstractmethod
    def begin(self) -> None:
        """Before another update within a step: return once this rank may write. Collective if others read here."""

    @abstractmethod
    def share(self, comm: Communicator) -> None:
        """After an update: give all ranks all pieces. Collective."""

    def conclude(self, comm: Communicator, failed: bool) -> bool:
        """Share the pieces; return whether the update has ``failed`` on any rank. Collective."""
        self.share(comm)
        return bool(comm.exchange_words(np.array([failed], dtype=np.int64), CONCLUDING).any())


class OwnViews(Views):
    """All pieces of ``parameters``, which each rank has in memory of its own, by the blocks that they travel in.

    Args:
        blocks: the partition.
        memories: where rows of each block meet.
        rank: this one.
        parameters: by index.
    """

    def __init__(
        self, blocks: Sequence[Block], memories: Sequence[BucketMemory], rank: int, parameters: Sequence[torch.Tensor]
    ) -> None:
        super().__init__(parameters)
        self.memories = memories
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._traffic = []
        for block, memory in zip(blocks, memories, strict=True):
            indices = dict.fromkeys(piece.index for piece in block.pieces)
            make = self._flat if block.cut else torch.Tensor.detach
            targets = {index: make(parameters[index]) for index in indices}
            self._traffic.append(_Traffic(block, memory, rank, targets))
            for piece in block.pieces:
                if piece.rank == rank:
                    whole = parameters[piece.index]
                    part = targets[piece.index][piece.start : piece.stop] if block.cut else whole
                    self.members[piece.index] = Member(whole, piece, part)

    def _flat(self, parameter: torch.Tensor) -> torch.Tensor:
        if parameter.is_contiguous():
            return parameter.detach().view(-1)
        flat = parameter.detach().clone(memory_format=torch.contiguous_format).view(-1)
        self._copies.append((parameter.detach(), flat))
        return flat

    def refresh(self) -> None:
        for parameter, flat in self._copies:
            flat.view(parameter.shape).copy_(parameter)

    def begin(self) -> None:
        pass

    def share(self, comm: Communicator) -> None:
        for number, traffic in enumerate(self._traffic):
            traffic.write()
            comm.share_memory(traffic.memory, traffic.take, f"sharing of updated parameters, block {number}")
        for parameter, flat in self._copies:
            parameter.copy_(flat.view(parameter.shape))


def _places(parameters: Sequence[torch.Tensor]) -> list[Any]:
    return [*map(torch.Tensor.data_ptr, parameters), *map(torch.Tensor.stride, parameters)]


def _refuse_shared_memory(parameters: Sequence[torch.Tensor]) -> None:
    """Raise if an element belongs to two parameters, which two ranks would update, each in its own way."""
    dense = [index for index, parameter in enumerate(parameters) if covers_its_memory(parameter)]
    shared = sorted(dense[position] for position in find_overlaps([parameters[index] for index in dense]))
    if shared:
        raise ValueError(
            f"parameters {', '.join(map(str, shared[:8]))}{', ...' if len(shared) > 8 else ''} share memory, so their "
            "updates cannot be divided among ranks; make them one parameter (decoder.weight = encoder.weight), listed "
            "once, or use shard='none'"
        )
