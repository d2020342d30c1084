"""Reductions of buckets that live in shared memory, within a node and across nodes.

[Note: Hierarchy]
With several nodes the owner of a slice first sums it over its node; then the owners of the same slice on all nodes
reduce it with each other, all slices at the same time over all network interfaces, each byte crossing once; then each
owner hands the result to its neighbours. Sums are in rank order within a node, and of the nodes' sums in node order.

[Note: Small buckets]
What a small bucket costs is the meetings, so on a single node it makes do with one: each rank shows a copy of its
values, and sums all copies by itself. There are two copies, used in turn, so that nobody overwrites what another rank
still reads: a rank that shows its next but one copy has been to the meeting between, to which all came after reading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from heatopt.comm._collectives import gather_flat, reduce_flat, reduce_scatter_parts
from heatopt.comm._node_sum import slice_bounds, spread, sum_in_first, sum_slice, sum_small, sum_to
from heatopt.comm._shared_memory import Lane, NodeMemory, SharedBlock
from heatopt.comm._transport import Transport
from heatopt.comm._work import Stage, Steps

__all__ = ["BucketMemory", "NodeReduction", "Parts", "ReduceOptions", "Take"]

# Up to so many bytes a meeting costs more than it does to sum everything on every rank.
_SMALL_BYTES = 64 * 1024
_COPIES_IN_TURN = 2
_LINE_BYTES = 64

Take = Callable[[int, torch.Tensor], None]
"""Is given a rank and its memory, to be read before it returns."""

Parts = Sequence[Sequence[torch.Tensor]]
"""By rank: what it owns of memory that the ranks of a node have in common; one dtype, at least one tensor in all."""


class Copies:
    """What the ranks show each other of a small bucket; see [Note: Small buckets].

    Args:
        block: has the bucket's memory, and behind it that of the copies: :meth:`nbytes` for each rank.
        dtype: type of the elements.
        numel: elements of the bucket.
    """

    def __init__(self, block: SharedBlock, dtype: torch.dtype, numel: int) -> None:
        stride = _stride(numel * dtype.itemsize)
        self._sets = [
            list(map(_as_real, block.typed(dtype, numel, stride * (1 + turn)))) for turn in range(_COPIES_IN_TURN)
        ]

    @staticmethod
    def nbytes(bucket_bytes: int) -> int:
        """Memory of a bucket of so many bytes, with its copies."""
        return (1 + _COPIES_IN_TURN) * _stride(bucket_bytes)

    def next(self, numel: int) -> list[torch.Tensor]:
        """The first ``numel`` elements of each rank's copy, of the set whose turn it is, as real numbers."""
        self._sets.reverse()
        found = self._sets[0]
        return found if numel == found[0].numel() else [copy[:numel] for copy in found]


@dataclass(frozen=True)
class BucketMemory:
    """The memory of one bucket: this rank's, and its neighbours' where the node shares it."""

    segments: list[torch.Tensor]
    """Flat memory of each rank of the node; only this rank's if the memory is not shared."""
    position: int
    """Which of them is this rank's."""
    shared: bool
    """True if the reduction goes through the node's memory (also on a node of one rank, if others have more)."""
    copies: Copies | None = None
    """What is shown of a small bucket; None for others."""

    @property
    def own(self) -> torch.Tensor:
        """This rank's memory."""
        return self.segments[self.position]

    def first(self, numel: int) -> BucketMemory:
        """The first ``numel`` elements of each."""
        return replace(self, segments=[segment[:numel] for segment in self.segments])


@dataclass(frozen=True)
class ReduceOptions:
    """How buckets are reduced; equal on all ranks."""

    divisor: float
    """What the sum is divided by."""
    blocking: bool
    """Complete before returning."""
    wire_dtype: torch.dtype | None = None
    """What floating values are rounded to on the network."""
    reproducible: bool = False
    """Sum in rank order across nodes too, whatever that costs."""


class NodeReduction:
    """Reduces buckets through the memory of the node.

    Args:
        node: the memory.
        nodes: the ranks of each node, ascending.
        index: which of them is this one.
        owners: how many ranks of each node own a slice: as many as the smallest node has ranks.
        across: this rank and the owners of the same slice on the other nodes; None for a single node.
    """

    def __init__(
        self, node: NodeMemory, nodes: Sequence[tuple[int, ...]], index: int, owners: int, across: Transport | None
    ) -> None:
        self._node = node
        self._nodes = nodes
        self._index = index
        self._owners = owners
        self._across = across

    def allocate(self, numel: int, dtype: torch.dtype) -> BucketMemory | None:
        """Memory for a bucket; None on all ranks if any has not enough. Collective."""
        nbytes = numel * dtype.itemsize
        small = self._across is None and nbytes <= _SMALL_BYTES
        block = self._node.allocate(Copies.nbytes(nbytes) if small else nbytes)
        if block is None:
            return None
        copies = Copies(block, dtype, numel) if small else None
        return BucketMemory(block.typed(dtype, numel), self._node.local_rank, True, copies)

    def steps(self, memory: BucketMemory, options: ReduceOptions) -> Steps[None]:
        """Replace a bucket of all ranks by its mean. See [Note: Sums in shared memory]."""
        if memory.copies is not None:
            yield from self._small_steps(memory.own, memory.copies, options.divisor)
            return
        yield self._node.arrive(Lane.LAUNCH)
        if self._node.local_rank < self._owners:
            segments = list(map(_as_real, memory.segments))
            start, stop = slice_bounds(segments[0].numel(), self._node.local_rank, self._owners)
            if self._across is None:
                sum_slice(segments, start, stop, options.divisor)
            else:
                parts = [segment[start:stop] for segment in segments]
                total = sum_in_first(parts)
                yield Stage.EXCHANGE
                yield from reduce_flat(
                    self._across, total, "sum", options.divisor, options.blocking, _wire_dtype(memory, options)
                )
                spread(total, parts)
        yield Stage.FINISH
        yield self._node.arrive(Lane.FINISH, memory.own.nbytes)

    def _small_steps(self, own: torch.Tensor, copies: Copies, divisor: float) -> Steps[None]:
        own = _as_real(own)
        shown = copies.next(own.numel())
        shown[self._node.local_rank].copy_(own)
        yield self._node.arrive(Lane.LAUNCH, own.nbytes)
        sum_small(own, shown, divisor)

    def scatter_steps(self, memory: BucketMemory, bounds: Sequence[int], options: ReduceOptions) -> Steps[None]:
        """Replace elements ``bounds[r]:bounds[r + 1]`` of rank r's bucket by the mean of all ranks.

        Across nodes the owner of a slice sums what the owners of that slice on all nodes, and the ranks that those
        stand for on nodes of more ranks, are to receive.
        """
        yield self._node.arrive(Lane.LAUNCH)
        segments = list(map(_as_real, memory.segments))
        unit = 2 if memory.own.is_complex() else 1
        local_rank = self._node.local_rank
        if self._across is None:
            mine = slice(bounds[local_rank] * unit, bounds[local_rank + 1] * unit)
            sum_to(segments[local_rank][mine], [segment[mine] for segment in segments], options.divisor)
        elif local_rank < self._owners:
            served = [ranks[local_rank :: self._owners] for ranks in self._nodes]
            slices = [[slice(bounds[r] * unit, bounds[r + 1] * unit) for r in ranks] for ranks in served]
            sums = [sum_in_first([segment[s] for segment in segments]) for node in slices for s in node]
            lengths = [sum(s.stop - s.start for s in node) for node in slices]
            yield Stage.EXCHANGE
            means = yield from reduce_scatter_parts(
                self._across, torch.cat(sums), lengths, options.divisor, options.blocking, _wire_dtype(memory, options)
            )
            own = slices[self._index]
            parts = torch.split(means, [s.stop - s.start for s in own])
            for segment, place, part in zip(segments[local_rank :: self._owners], own, parts, strict=True):
                segment[place].copy_(part)
        yield Stage.FINISH
        yield self._node.arrive(Lane.FINISH, memory.own.nbytes)

    def share_steps(self, memory: BucketMemory, take: Take) -> Steps[None]:
        """Show the neighbours' segments to ``take``; nobody writes into one before all have seen it."""
        yield self._node.arrive(Lane.LAUNCH)
        for rank, segment in enumerate(memory.segments):
            if rank != memory.position:
                take(rank, segment)
        yield self._node.arrive(Lane.FINISH)

    def allocate_once(self, nbytes: int) -> SharedBlock | None:
        """Memory that the ranks of this node have in common; None on all ranks if any has not enough. Collective."""
        return self._node.allocate(-(-nbytes // self._node.local_size))

    def spread_steps(self, parts: Parts) -> Steps[None]:
        """Copy what each rank has written of its node's common memory to that of the other nodes.

        The owner of a slice stands for the ranks that it stands for in reductions: it sends what those of its node
        own, and alone writes what those of other nodes own. So each byte reaches a node once, and is written once.
        """
        yield self._node.arrive(Lane.LAUNCH)
        local_rank = self._node.local_rank
        if self._across is not None and local_rank < self._owners:
            served = [
                [part for rank in ranks[local_rank :: self._owners] for part in parts[rank]] for ranks in self._nodes
            ]
            counts = [sum(part.numel() for part in node) for node in served]
            first = next(part for own in parts for part in own)
            row = first.new_zeros(max(counts))
            row[: counts[self._index]] = torch.cat([first.new_empty(0), *(p.reshape(-1) for p in served[self._index])])
            rows = yield from gather_flat(self._across, row, True)
            for index, (node, found) in enumerate(zip(served, rows, strict=False)):
                if index != self._index:
                    lengths = [part.numel() for part in node]
                    for part, values in zip(node, found[: counts[index]].split(lengths), strict=True):
                        part.copy_(values.view(part.shape))
        yield self._node.arrive(Lane.FINISH)


def _wire_dtype(memory: BucketMemory, options: ReduceOptions) -> torch.dtype | None:
    """What a node's sums are rounded to: gradients that are as narrow as ``wire_dtype`` keep their range and digits."""
    wire, own = options.wire_dtype, memory.own.dtype
    return own if wire is not None and own.itemsize <= wire.itemsize else wire


def _stride(nbytes: int) -> int:
    """Bytes from one copy to the next: no two ranks write to one cache line."""
    return -(-nbytes // _LINE_BYTES) * _LINE_BYTES


def _as_real(segment: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(segment).view(-1) if segment.is_complex() else segment
