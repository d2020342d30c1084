"""Chooses how a bucket is reduced: through the memory of the node, across nodes, or as the backend can."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch

from heatopt._log import logger
from heatopt.comm._collectives import gather_flat, reduce_flat
from heatopt.comm._group import MAX_NODE_WORDS, RankGroup
from heatopt.comm._node_reduction import BucketMemory, NodeReduction, ReduceOptions, Take
from heatopt.comm._settings import shared_memory_wanted
from heatopt.comm._shared_memory import NodeMemory
from heatopt.comm._transport import Transport
from heatopt.comm._work import Steps

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
        if self._state is _State.UNDECIDED and device.type == "cpu":
            self._node = _open_node(group, make_group)
            self._state = _State.PRIVATE if self._node is None else _State.SHARED
        if self._node is not None and device.type == "cpu":
            memory = self._node.allocate(numel, dtype)
            if memory is not None:
                return memory
            logger.warning("not enough memory to share: a bucket of %d bytes is private", numel * dtype.itemsize)
        return BucketMemory([torch.zeros(numel, dtype=dtype, device=device)], 0, False)

    def steps(self, group: RankGroup, memory: BucketMemory, options: ReduceOptions) -> Steps[None]:
        """Sum a bucket over the ranks of ``group`` and divide, in place."""
        if self._node is not None and memory.shared and not (options.reproducible and group.num_nodes > 1):
            return self._node.steps(memory, options)
        # Values are rounded on the network only.
        wire_dtype = options.wire_dtype if group.num_nodes > 1 else None
        return reduce_flat(group, memory.own, "sum", options.divisor, options.blocking, wire_dtype)

    def share_steps(self, group: RankGroup, memory: BucketMemory, take: Take) -> Steps[None]:
        """Show the memory of each other rank of ``group`` to ``take``."""
        if self._node is not None and memory.shared and group.num_nodes == 1:
            return self._node.share_steps(memory, take)
        return _share_by_gather(group, memory.own, take)

    def close(self) -> None:
        """Let go of the node's memory; what lives in it keeps it."""
        self._node = None
        self._state = _State.PRIVATE


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
    node = NodeMemory(group.exchange_objects, nodes[group.node_index], group.rank, group.lose, group.is_gone)
    if not node.open_flags(MAX_NODE_WORDS):
        logger.warning("the ranks of a node cannot share memory here; gradients travel through the backend instead")
        return None
    owners = min(map(len, nodes))
    if len(nodes) == 1:
        group.exchange_through(node)
        return NodeReduction(node, owners, None)
    slices = [[node[k] for node in nodes] for k in range(owners)]
    slices += [[rank] for node in nodes for rank in node[owners:]]
    return NodeReduction(node, owners, make_group(slices, "set-up of the groups across nodes"))
