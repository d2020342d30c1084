"""Chooses how a bucket is reduced: through the memory of the node, across nodes, or as the backend can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch

from heatopt._log import logger
from heatopt.comm._collectives import gather_flat, reduce_flat, reduce_scatter_parts
from heatopt.comm._group import MAX_NODE_WORDS, RankGroup
from heatopt.comm._node_reduction import BucketMemory, NodeReduction, Parts, ReduceOptions, Take
from heatopt.comm._settings import shared_memory_wanted
from heatopt.comm._shared_memory import SharedBlock
from heatopt.comm._transport import Transport
from heatopt.comm._work import Steps
from heatopt.errors import HeatoptError

__all__ = ["BucketReducer"]

MakeGroup = Callable[[list[list[int]], str], Transport]


class _State(Enum):
    """Whether the ranks of a node share memory."""

    UNDECIDED = "undecided"  # until the first allocation, where all ranks decide together
    SHARED = "shared"
    PRIVATE = "private"


class BucketReducer:
    """Memory and reductions of the buckets of one group; the group comes with each call, so nothing owns it."""

    def __init__(self) -> None:
        self._state = _State.UNDECIDED
        self._node: NodeReduction | None = None
        self._has_warned = False

    def allocate(
        self, group: RankGroup, make_group: MakeGroup, numel: int, dtype: torch.dtype, device: torch.device
    ) -> BucketMemory:
        """Zeroed memory for a bucket. Collective.

        Args:
            group: the ranks.
            make_group: makes, of lists of ranks that cover the group, the one that this rank is in.
            numel: elements.
            dtype: type of the elements.
            device: where they are to be; the memory of a node is shared on CPUs only.
        """
        if device.type == "cpu":
            self._decide(group, make_group)
        if self._node is not None and device.type == "cpu":
            memory = self._node.allocate(numel, dtype)
            if memory is not None:
                return memory
            self._warn_once(numel * dtype.itemsize)
        return BucketMemory([torch.zeros(numel, dtype=dtype, device=device)], 0, False)

    def _warn_once(self, nbytes: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "no memory to share for a bucket of %d bytes: it travels through the backend instead, as may others; "
                "the memory, or what a process may map or open (vm.max_map_count, ulimit -n), is used up",
                nbytes,
            )

    def allocate_once(self, group: RankGroup, make_group: MakeGroup, nbytes: int) -> SharedBlock | None:
        """Memory that the ranks of each node have in common; None on all ranks if there is none. Collective."""
        self._decide(group, make_group)
        return None if self._node is None else self._node.allocate_once(nbytes)

    def _decide(self, group: RankGroup, make_group: MakeGroup) -> None:
        if self._state is _State.UNDECIDED:
            self._node = _open_node(group, make_group)
            self._state = _State.PRIVATE if self._node is None else _State.SHARED

    def steps(self, group: RankGroup, memory: BucketMemory, options: ReduceOptions) -> Steps[None]:
        """Sum a bucket over the ranks of ``group`` and divide, in place."""
        node = self._node_for(group, memory, options)
        if node is not None:
            return node.steps(memory, options)
        wire_dtype = _wire_dtype(group, options)
        return reduce_flat(group, memory.own, "sum", options.divisor, options.blocking, wire_dtype)

    def scatter_steps(
        self, group: RankGroup, memory: BucketMemory, bounds: Sequence[int], options: ReduceOptions
    ) -> Steps[None]:
        """The same, but elements ``bounds[r]:bounds[r + 1]`` reach rank r alone."""
        node = self._node_for(group, memory, options)
        if node is not None:
            return node.scatter_steps(memory, bounds, options)
        return _scatter(group, memory.own, bounds, options)

    def _node_for(self, group: RankGroup, memory: BucketMemory, options: ReduceOptions) -> NodeReduction | None:
        return self._node if memory.shared and not (options.reproducible and group.num_nodes > 1) else None

    def share_steps(self, group: RankGroup, memory: BucketMemory, take: Take) -> Steps[None]:
        """Show the memory of each other rank of ``group`` to ``take``."""
        if self._node is not None and memory.shared and group.num_nodes == 1:
            return self._node.share_steps(memory, take)
        return _share_by_gather(group, memory.own, take)

    def spread_steps(self, parts: Parts) -> Steps[None]:
        """Copy what each rank owns of memory by :meth:`allocate_once` to the other nodes."""
        if self._node is None:
            raise HeatoptError("the communicator is closed, and with it the way to the parameters of other nodes")
        return self._node.spread_steps(parts)

    def close(self) -> None:
        """Let go of the node's memory; what lives in it keeps it."""
        self._node = None
        self._state = _State.PRIVATE


def _wire_dtype(group: RankGroup, options: ReduceOptions) -> torch.dtype | None:
    """Values are rounded on the network only."""
    return options.wire_dtype if group.num_nodes > 1 else None


def _scatter(group: RankGroup, flat: torch.Tensor, bounds: Sequence[int], options: ReduceOptions) -> Steps[None]:
    unit = 2 if flat.is_complex() else 1
    values = torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
    first, *ends = (bound * unit for bound in bounds)
    lengths = [end - start for start, end in zip([first, *ends], ends, strict=False)]
    mean = yield from reduce_scatter_parts(
        group, values, lengths, options.divisor, options.blocking, _wire_dtype(group, options)
    )
    start = sum(lengths[: group.rank])
    values[start : start + mean.numel()] = mean


def _share_by_gather(group: RankGroup, own: torch.Tensor, take: Take) -> Steps[None]:
    rows = yield from gather_flat(group, own, True)
    for rank, row in enumerate(rows):
        if rank != group.rank:
            take(rank, row)


def _open_node(group: RankGroup, make_group: MakeGroup) -> NodeReduction | None:
    """Let the ranks of each node share memory, if all of them can and want to. Collective."""
    if not group.can_share_memory:
        return None
    nodes = group.nodes()
    wanted = shared_memory_wanted() and group.size > len(nodes)
    if not all(group.exchange_objects(wanted, "set-up of shared memory")):
        return None
    node = group.node_memory(nodes[group.node_index])
    if not node.open_flags(MAX_NODE_WORDS):
        logger.warning("the ranks of a node cannot share memory here; gradients travel through the backend instead")
        return None
    owners = min(map(len, nodes))
    if len(nodes) == 1:
        group.exchange_through(node)
        return NodeReduction(node, nodes, 0, owners, None)
    slices = [[node[k] for node in nodes] for k in range(owners)]
    slices += [[rank] for node in nodes for rank in node[owners:]]
    across = make_group(slices, "set-up of the groups across nodes")
    return NodeReduction(node, nodes, group.node_index, owners, across)
