"""The contract of a communicator: groups of ranks, and ranks that do not agree."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

import heatopt
from heatopt.comm import Communicator, NodeGroups
from heatopt.errors import HeatoptError, RankMismatchError
from tests.ranks._training import batch, net, sgd, train
from tests.support.launch import LAUNCH
from tests.support.tensors import assert_usable

if TYPE_CHECKING:
    from tests.support.ranks import Ranks


@pytest.fixture(autouse=True)
def _nodes_as_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEATOPT_RANKS_PER_NODE", raising=False)


# Groups


def test_ranks_are_numbered(ranks: Ranks) -> None:
    def body(comm: Communicator) -> tuple[int, int]:
        assert comm.timeout > 0
        assert 0 <= comm.node_rank < comm.node_size <= comm.size
        assert 0 <= comm.node_index < comm.num_nodes
        return comm.rank, comm.size

    assert ranks(body) == [(rank, ranks.size) for rank in range(ranks.size)]


def members_of(group: Communicator, comm: Communicator) -> list[int]:
    """Ranks in ``comm`` of the ranks of ``group``, found out through ``group``."""
    assert_usable(group)
    members = group.all_gather_object(comm.rank)
    assert members[group.rank] == comm.rank
    assert len(members) == group.size
    return members


def test_split_by_color(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(comm.rank % 2)
        mine = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
        assert members_of(group, comm) == mine
        assert group.allreduce(torch.tensor(float(comm.rank))).item() == sum(mine)
        assert group.broadcast(torch.tensor(float(comm.rank)), group.size - 1).item() == mine[-1]
        assert members_of(comm.split(-(10**12) if comm.rank else 0), comm) == ([0] if comm.rank == 0 else
                                                                             list(range(1, comm.size)))  # fmt: skip
        assert members_of(comm.split(5), comm) == list(range(comm.size))
        assert group.timeout == comm.timeout

    ranks(body)


def test_split_without_color_gives_a_group_of_its_own(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(None if comm.rank < 2 else 0)
        assert members_of(group, comm) == ([comm.rank] if comm.rank < 2 else list(range(2, comm.size)))
        assert members_of(comm.split(None), comm) == [comm.rank]

    ranks(body)


def test_split_orders_by_key_then_rank(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        assert members_of(comm.split(0, -comm.rank), comm) == list(reversed(range(comm.size)))
        even_first = sorted(range(comm.size), key=lambda rank: (rank % 2, rank))
        assert members_of(comm.split(0, comm.rank % 2), comm) == even_first

    ranks(body)


def test_nested_groups(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        backwards = comm.split(0, -comm.rank)
        pairs = backwards.split(backwards.rank // 2)
        inner = pairs.split(0, -pairs.rank)
        wanted = [rank for rank in range(comm.size) if (comm.size - 1 - rank) // 2 == (comm.size - 1 - comm.rank) // 2]
        assert members_of(inner, comm) == wanted
        assert members_of(pairs, comm) == wanted[::-1]
        assert_usable(comm)

    ranks(body)


def test_traffic_of_groups_never_meets(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        twin, half = comm.duplicate(), comm.split(comm.rank % 2)
        assert members_of(twin, comm) == list(range(comm.size))
        works = [
            group.allreduce_async(torch.full((5000,), float(number + 1)))
            for number, group in enumerate((comm, twin, half, comm, twin))
        ]
        sizes = (comm.size, twin.size, half.size, comm.size, twin.size)
        for number in (1, 0, 2, 4, 3):
            assert (works[number].wait() == (number + 1) * sizes[number]).all()

    ranks(body)


def test_groups_of_different_ranks_work_at_their_own_pace(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(comm.rank % 2)
        for turn in range(3 + 5 * (comm.rank % 2)):
            assert group.allreduce(torch.tensor(turn)).item() == turn * group.size
        assert_usable(comm)

    ranks(body)


def test_split_refuses_what_is_no_color(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for color in ("left", 1.5, True):
            with pytest.raises(TypeError, match="color must be an int or None"):
                comm.split(color)  # type: ignore[arg-type]
        assert_usable(comm)

    ranks(body)


def test_close_leaves_the_parent_alone(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(0)
        tensor = torch.ones(20_000)
        group.allreduce_async(tensor)
        group.close()
        assert (tensor == comm.size).all()  # what was in flight is complete
        group.close()
        assert_usable(comm)

    ranks(body)


def test_nothing_is_sent_on_what_was_closed(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(0)
        model = net()
        optimizer = heatopt.LocalSGD(sgd(model), comm=group, sync_every=2)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        group.close()
        calls: list[Callable[[], Any]] = [
            group.barrier,
            lambda: group.split(0),
            lambda: heatopt.LocalSGD(sgd(net()), comm=group),
            optimizer.synchronize,
            lambda: train(optimizer, model, [batch(step, comm.rank) for step in range(2, 4)]),
        ]
        for call in calls if comm.size > 1 else ():
            with pytest.raises(HeatoptError, match="has been closed"):
                call()
        assert_usable(comm)

    ranks(body)


@pytest.mark.parametrize("per_node", [None, 1, 2])
def test_close_closes_what_optimizers_have_opened(
    ranks: Ranks, per_node: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their channels, and groups of ranks across nodes; then nothing is left of them."""
    if per_node is not None:
        choose_nodes(monkeypatch, per_node)
    opened: dict[int, list[Communicator]] = defaultdict(list)
    closed: dict[int, list[Communicator]] = defaultdict(list)
    known: list[weakref.ref[Communicator]] = []
    make_group, close = Communicator._make_group, Communicator.close

    def making(self: Communicator, groups: list[list[int]], what: str) -> Communicator:
        opened[threading.get_ident()].append(make_group(self, groups, what))
        return opened[threading.get_ident()][-1]

    def closing(self: Communicator) -> None:
        closed[threading.get_ident()].append(self)
        close(self)

    monkeypatch.setattr(Communicator, "_make_group", making)
    monkeypatch.setattr(Communicator, "close", closing)

    def body(comm: Communicator) -> None:
        for _ in range(3):
            group = comm.split(0)
            layer = torch.nn.Linear(3, 2)
            optimizer = heatopt.DataParallelOptimizer(torch.optim.Adam(layer.parameters()), comm=group, shard="state")
            layer(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            group.close()
            own = opened.pop(threading.get_ident())
            assert len(own) >= (2 if comm.size > 1 else 1)
            assert set(map(id, own)) == set(map(id, closed.pop(threading.get_ident())))
            known.extend(map(weakref.ref, own))
        assert_usable(comm)

    ranks(body)
    # Not by threads at the same time, of which only one would do it. What a tensor has held is garbage a pass later.
    for _ in range(3):
        gc.collect()
    assert [reference() for reference in known] == [None] * len(known)


def choose_nodes(monkeypatch: pytest.MonkeyPatch, per_node: int) -> None:
    if LAUNCH.launched:
        pytest.skip("the world has been made, with the environment of the launch")
    monkeypatch.setenv("HEATOPT_RANKS_PER_NODE", str(per_node))


@pytest.mark.every_size
@pytest.mark.parametrize("per_node", [1, 2, 3, 4])
def test_nodes_of_chosen_size(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, per_node: int) -> None:
    choose_nodes(monkeypatch, per_node)

    def body(comm: Communicator) -> None:
        size, rank = comm.size, comm.rank
        nodes = [list(range(start, min(start + per_node, size))) for start in range(0, size, per_node)]
        node = rank // per_node
        assert (comm.num_nodes, comm.node_index) == (len(nodes), node)
        assert (comm.node_size, comm.node_rank) == (len(nodes[node]), rank % per_node)
        groups = comm.by_node()
        assert isinstance(groups, NodeGroups)
        assert members_of(groups.within, comm) == nodes[node]
        wanted = [members[rank % per_node] for members in nodes if rank % per_node < len(members)]
        assert members_of(groups.across, comm) == wanted
        # Two stages give what one gives, where all nodes have as many ranks.
        if size % per_node == 0:
            value = groups.across.allreduce(groups.within.allreduce(torch.tensor([rank + 1.0])))
            assert value.item() == size * (size + 1) / 2

    ranks(body)


@pytest.mark.every_size
def test_groups_keep_the_nodes_of_their_ranks(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_nodes(monkeypatch, 2)

    def body(comm: Communicator) -> None:
        within, across = comm.by_node()
        assert (within.num_nodes, within.node_size) == (1, within.size)
        assert (across.num_nodes, across.node_size) == (across.size, 1)
        backwards = comm.split(0, -comm.rank)
        nodes = backwards.all_gather_object(comm.node_index)
        assert backwards.num_nodes == comm.num_nodes
        assert backwards.node_size == nodes.count(nodes[backwards.rank])
        middle = comm.split(0 if comm.rank in (1, 2) else 1)  # ranks 1 and 2 are on different nodes
        if comm.size >= 3 and comm.rank in (1, 2):
            assert (middle.num_nodes, middle.node_size) == (2, 1)

    ranks(body)


# Disagreement


MISMATCHES: dict[str, tuple[Callable[[Communicator], object], Callable[[Communicator], object]]] = {
    "op": (lambda c: c.allreduce(torch.ones(3), "sum"), lambda c: c.allreduce(torch.ones(3), "mean")),
    "shape": (lambda c: c.allreduce(torch.ones(4)), lambda c: c.allreduce(torch.ones(6))),
    "dimensions": (lambda c: c.allreduce(torch.ones(4)), lambda c: c.allreduce(torch.ones(2, 2))),
    "empty": (lambda c: c.allreduce(torch.ones(4)), lambda c: c.allreduce(torch.ones(0))),
    "dtype": (lambda c: c.allreduce(torch.ones(4)), lambda c: c.allreduce(torch.ones(4).int())),
    "half type": (lambda c: c.allreduce(torch.ones(4).half()), lambda c: c.allreduce(torch.ones(4).bfloat16())),
    "root": (lambda c: c.broadcast(torch.ones(4), 0), lambda c: c.broadcast(torch.ones(4), 1)),
    "object root": (lambda c: c.broadcast_object(1, 0), lambda c: c.broadcast_object(1, 1)),
    "gathered shape": (lambda c: c.all_gather(torch.ones(4)), lambda c: c.all_gather(torch.ones(5))),
    "scattered op": (
        lambda c: c.reduce_scatter(torch.ones(c.size), "max"),
        lambda c: c.reduce_scatter(torch.ones(c.size), "min"),
    ),
    "call": (lambda c: c.allreduce(torch.ones(4)), lambda c: c.all_gather(torch.ones(4))),
    "handle": (lambda c: c.allreduce_async(torch.ones(4)).wait(), lambda c: c.broadcast_async(torch.ones(4)).wait()),
    "barrier": (lambda c: c.barrier(), lambda c: c.all_gather_object(1)),
    "split": (lambda c: c.split(0), lambda c: c.barrier()),
    "split and tensor": (lambda c: c.allreduce(torch.ones(1)), lambda c: c.split(0)),
    "duplicate": (lambda c: c.duplicate(), lambda c: c.barrier()),
    "agreement": (lambda c: c.agree_on([1, 2], "load()"), lambda c: c.agree_on([1, 3], "load()")),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_disagreement_is_named_on_all_ranks(ranks: Ranks, kind: str) -> None:
    usual, other = MISMATCHES[kind]

    def body(comm: Communicator) -> str:
        # One rank differs: each of them in turn, so that rank 0 may be the odd one.
        messages = []
        for odd in range(comm.size):
            with pytest.raises(RankMismatchError) as caught:
                (other if comm.rank == odd else usual)(comm)
            message = str(caught.value)
            assert "rank 0" in message
            assert f"rank {odd or 1}" in message
            messages.append(message)
            assert_usable(comm)
        return "\n".join(messages)

    assert len(set(ranks(body, min_size=2))) == 1


def test_disagreement_says_what_differs(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        own = torch.ones(2, 3 if comm.rank else 4, dtype=torch.float64)
        with pytest.raises(RankMismatchError, match=r"rank 0 .*\(2, 4\).*float64.*rank 1 .*\(2, 3\).*float64"):
            comm.allreduce(own, "max")
        with pytest.raises(RankMismatchError, match=r"rank 0 .*broadcast.*rank 1 .*allreduce"):
            comm.allreduce(own) if comm.rank else comm.broadcast(own)

    ranks(body, min_size=2)


# Wrong arguments, found before anything travels


def _sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


WRONG_TYPES: dict[str, Callable[[Communicator], object]] = {
    "list": lambda c: c.allreduce([1.0]),  # type: ignore[arg-type]
    "number": lambda c: c.allreduce(1.0),  # type: ignore[arg-type]
    "gathered list": lambda c: c.all_gather([1.0]),  # type: ignore[arg-type]
    "broadcast list": lambda c: c.broadcast([1.0]),  # type: ignore[arg-type]
    "scattered list": lambda c: c.reduce_scatter([1.0]),  # type: ignore[arg-type]
    "sparse": lambda c: c.allreduce(_sparse()),
    "gathered sparse": lambda c: c.all_gather(_sparse()),
    "broadcast sparse": lambda c: c.broadcast(_sparse()),
    "handle of sparse": lambda c: c.allreduce_async(_sparse()),
    "unsigned": lambda c: c.allreduce(torch.ones(3).to(torch.uint16)),
    "eight bits": lambda c: c.allreduce(torch.ones(3).to(torch.float8_e4m3fn)),
    "mean of integers": lambda c: c.allreduce(torch.ones(3).int(), "mean"),
    "mean of bools": lambda c: c.allreduce(torch.ones(3).bool(), "mean"),
    "scattered mean of integers": lambda c: c.reduce_scatter(torch.ones(c.size).int(), "mean"),
    "largest complex": lambda c: c.allreduce(torch.ones(3) + 0j, "max"),
    "smallest complex": lambda c: c.allreduce(torch.ones(3) + 0j, "min"),
}
WRONG_VALUES: dict[str, Callable[[Communicator], object]] = {
    "op": lambda c: c.allreduce(torch.ones(3), "product"),
    "handle's op": lambda c: c.allreduce_async(torch.ones(3), "avg"),
    "scattered op": lambda c: c.reduce_scatter(torch.ones(c.size), "SUM"),
    "no op": lambda c: c.allreduce(torch.ones(3), None),  # type: ignore[arg-type]
    "root beyond": lambda c: c.broadcast(torch.ones(3), c.size),
    "root below": lambda c: c.broadcast(torch.ones(3), -1),
    "handle's root": lambda c: c.broadcast_async(torch.ones(3), c.size),
    "object's root": lambda c: c.broadcast_object(1, c.size),
}


@pytest.mark.parametrize("kind", WRONG_TYPES)
def test_wrong_type(ranks: Ranks, kind: str) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(TypeError) as caught:
            WRONG_TYPES[kind](comm)
        assert str(caught.value)
        assert_usable(comm)

    ranks(body)


@pytest.mark.parametrize("kind", WRONG_VALUES)
def test_wrong_value(ranks: Ranks, kind: str) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="must be"):
            WRONG_VALUES[kind](comm)
        assert_usable(comm)

    ranks(body)


# Copies


def test_a_copy_talks_to_the_same_ranks(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(0)
        for original in (comm, group):
            assert copy.deepcopy(original) is original
            assert copy.deepcopy({"comm": original})["comm"] is original
            with pytest.raises(TypeError, match=r"heatopt\.world\(\)"):
                pickle.dumps(original)

    ranks(body)
