"""DASO: phases, merges, topologies, and what the ranks exchange in which order."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import ThreadWorld
from tests.ranks._local import Replica, mean, plus, replicas
from tests.ranks._training import (
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    fill,
    generator,
    loss_of,
    net,
    sgd,
    tensors_of,
    train,
    whole,
)
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

# Ranks, and ranks per node: one node, one rank per node, equal nodes, unequal nodes.
TOPOLOGIES = [(1, 1), (2, 2), (2, 1), (4, 1), (4, 2), (3, 2), (5, 3), (5, 2)]
topologies = pytest.mark.parametrize(("size", "per_node"), TOPOLOGIES)
one_process = pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")


@pytest.fixture(autouse=True)
def nodes_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests say themselves which ranks share a node."""
    monkeypatch.delenv("HEATOPT_RANKS_PER_NODE", raising=False)


def world(size: int, per_node: int) -> ThreadWorld:
    return ThreadWorld(size, timeout=20.0, ranks_per_node=per_node)


def daso(comm: Communicator, model: nn.Module, epochs: int = 4, **options: Any) -> heatopt.DASO:
    chosen = {"warmup_epochs": 1, "cooldown_epochs": 1, "downcast_type": torch.float32} | options
    return heatopt.DASO(sgd(model), epochs, model=model, comm=comm, **chosen)


@one_process
@pytest.mark.parametrize("merge", ["delta", "daso"])
@topologies
def test_any_topology(size: int, per_node: int, merge: str) -> None:
    def body(comm: Communicator) -> list[torch.Tensor]:
        model = net(seed=comm.rank)
        within = comm.by_node().within
        optimizer = daso(comm, model, merge=merge)
        for step in range(4 * 7):
            train(optimizer, model, [batch(step, comm.rank)])
            assert_ranks_equal(within, model, optimizer.torch_optimizer)
            if optimizer.phase != "cycling":
                assert_ranks_equal(comm, model)
            if step % 7 == 6:
                optimizer.epoch_loss_logic(1.0)
                assert_ranks_equal(comm, model)
        return tensors_of(model)

    found = world(size, per_node).run(body)
    assert all(torch.isfinite(t).all() for t in found[-1])


@one_process
@topologies
def test_blocking_phases_are_the_mean_of_the_nodes_weighted_by_their_ranks(size: int, per_node: int) -> None:
    """With SGD without momentum that is one process with the whole batch."""

    def body(comm: Communicator) -> list[torch.Tensor]:
        model = net()
        optimizer = heatopt.DASO(
            torch.optim.SGD(model.parameters(), lr=0.1), 1, model=model, comm=comm, downcast_type=torch.float32
        )
        train(optimizer, model, [batch(step, comm.rank) for step in range(5)])
        return tensors_of(model)

    model = net()
    train(torch.optim.SGD(model.parameters(), lr=0.1), model, [whole(step, size) for step in range(5)])
    for found in world(size, per_node).run(body):
        assert_close(found, tensors_of(model))


def cycle_by_hand(size: int, skip: int, wait: int, steps: int, merge: str) -> list[Replica]:
    """One epoch of cycling, each rank a node: send after every ``skip``-th batch, merge ``wait`` later."""
    expected = replicas(sgd, size)
    flight: list[tuple[int, int, list[list[torch.Tensor]]]] = []  # due after, S, what was sent
    last = steps - 1
    for step in range(steps):
        for replica in expected:
            replica.update(step)
        while flight and flight[0][0] == step:
            _, delay, sent = flight.pop(0)
            for replica, before in zip(expected, sent, strict=True):
                now = replica.values
                total = [sum(parts) for parts in zip(*sent, strict=True)]
                if merge == "daso":
                    replica.values = [(2 * delay * x + t) / (2 * delay + size) for x, t in zip(now, total, strict=True)]
                else:
                    replica.values = plus(mean(sent), [x - b for x, b in zip(now, before, strict=True)])
        if step == last:
            average = mean([replica.values for replica in expected])
            for replica in expected:
                replica.values = average
        elif step % skip == 0:
            delay = min(wait, last - step)
            flight.append((step + delay, delay, [replica.values for replica in expected]))
    return expected


@one_process
@pytest.mark.parametrize("merge", ["delta", "daso"])
@pytest.mark.parametrize(("skips", "wait"), [(4, 1), (2, 1), (1, 1), (8, 2)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_cycling_against_the_formulas(size: int, skips: int, wait: int, merge: str) -> None:
    def body(comm: Communicator) -> list[list[torch.Tensor]]:
        model = net()
        optimizer = daso(comm, model, warmup_epochs=0, merge=merge)
        optimizer._cycle.global_skip, optimizer._cycle.batches_to_wait = skips, wait
        optimizer.last_batch = 18
        found = []
        for step in range(19):
            train(optimizer, model, [batch(step, comm.rank)])
            if step in (10, 18):
                found.append([t.clone() for t in tensors_of(model)])
        return found

    found = world(size, 1).run(body)
    for values, replica in zip(found, cycle_by_hand(size, skips, wait, 19, merge), strict=True):
        assert_close(values[1], replica.values, rtol=1e-12, atol=1e-12)
    # In the middle of the epoch too, where the ranks differ.
    assert any(not torch.equal(a, b) for a, b in zip(found[0][0], found[-1][0], strict=True))


@one_process
@pytest.mark.parametrize(("merge", "factor"), [("delta", -5.0), ("daso", -5.0 + 1 / 3)])
def test_a_single_node_averages_with_nobody(merge: str, factor: float) -> None:
    """P = 1, B = 4, S = 1, a constant gradient: "daso" then makes (2 x + x^s) / 3 of x, "delta" changes nothing."""

    def body(comm: Communicator) -> list[float]:
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        options: dict[str, Any] = {"warmup_epochs": 0, "merge": merge, "downcast_type": torch.float32}
        optimizer = heatopt.DASO(torch.optim.SGD([weight], lr=1.0), 9, comm=comm, **options)
        for _ in range(4):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        optimizer.zero_grad()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return weight.tolist()

    assert world(3, 3).run(body)[-1] == pytest.approx([factor] * 3)


@one_process
@pytest.mark.parametrize(("merge", "kept"), [("delta", 1.0), ("daso", 0.875)])
def test_local_progress_with_a_constant_gradient(merge: str, kept: float) -> None:
    """Two nodes, B = 4, S = 1: the published merge loses an eighth of all updates."""

    def body(comm: Communicator) -> float:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        options: dict[str, Any] = {"warmup_epochs": 0, "merge": merge, "downcast_type": torch.float32}
        optimizer = heatopt.DASO(torch.optim.SGD([weight], lr=1.0), 9, comm=comm, **options)
        optimizer.last_batch = 10**6
        for _ in range(400):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return -weight.item() / 400

    assert world(2, 1).run(body)[0] == pytest.approx(kept, abs=2e-3)


@one_process
def test_rounded_messages_reach_the_loss_of_unrounded_ones() -> None:
    """Least squares with the learning rate dropped half-way: weights rounded to bfloat16 would end far above."""
    features, steps = 64, 600

    def body(comm: Communicator, downcast: torch.dtype) -> float:
        source = generator(5)
        truth = torch.randn(features, generator=source)
        own = generator(100 + comm.rank)
        weight = nn.Parameter(torch.zeros(features))
        inner = torch.optim.SGD([weight], lr=0.02)
        optimizer = heatopt.DASO(inner, 6, comm=comm, warmup_epochs=2, cooldown_epochs=2, downcast_type=downcast)
        for step in range(steps):
            if step == steps // 2:
                inner.param_groups[0]["lr"] /= 10
            x = torch.randn(32, features, generator=own)
            y = x @ truth + 0.01 * torch.randn(32, generator=own)
            optimizer.zero_grad()
            loss = (x @ weight - y).square().mean()
            loss.backward()
            optimizer.step()
            if step % 100 == 99:
                optimizer.epoch_loss_logic(loss)
        return float((weight.detach() - truth).square().sum())

    exact, rounded = (world(4, 2).run(body, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert rounded == pytest.approx(exact, rel=0.01)


def operations(events: list[Any], rank: int) -> list[str]:
    """What a rank sent besides headers: agreements and announcements of a few words."""
    return [event.kind for event in events if event.rank == rank and event.kind not in ("words", "objects")]


@one_process
def test_number_and_order_of_exchanges() -> None:
    """Two nodes of two ranks: one rank of each averages among nodes, in turn, and passes the result on."""
    ring = world(4, 2)

    def agreements(rank: int) -> int:
        return sum(event.kind == "words" for event in ring.events if event.rank == rank)

    def body(comm: Communicator) -> list[list[str]]:
        weight = nn.Parameter(torch.zeros(3))
        optimizer = heatopt.DASO(
            torch.optim.SGD([weight], lr=1.0),
            3,
            comm=comm,
            warmup_epochs=1,
            cooldown_epochs=1,
            downcast_type=torch.float32,
        )
        found = []
        for _ in range(2):
            for _ in range(7):
                weight.grad = None  # so nothing is averaged within the node
                comm.barrier()
                before, agreed = len(operations(ring.events, comm.rank)), agreements(comm.rank)
                optimizer.step()
                found.append(operations(ring.events, comm.rank)[before:])
                # The node's and the world's header; what follows them is agreed.
                assert optimizer.epoch == 1 or agreements(comm.rank) - agreed == 2
            optimizer.epoch_loss_logic(1.0)
        return found

    found = ring.run(body)
    send, receive = ["all_gather", "broadcast"], ["broadcast"]
    for rank, exchanges in enumerate(found):
        node_rank = rank % 2
        assert exchanges[:7] == [send if turn % 2 == node_rank else receive for turn in range(7)]
        # Average number 7 is sent after batch 0 and merged after batch 1, number 8 after 4 and 5, number 9 at the end.
        first, second, third = (["all_gather"] if turn % 2 == node_rank else [] for turn in (7, 8, 9))
        assert exchanges[7:] == [first, receive, [], [], second, receive, [*third, "broadcast"]]


def cycling_alone(comm: Communicator, model: nn.Module, local: int, skips: int, wait: int, last: int) -> heatopt.DASO:
    """In a cycling phase whose ranks train alone for ``local`` updates."""
    optimizer = daso(comm, model, warmup_epochs=0)
    optimizer._cycle.global_skip, optimizer._cycle.local_skip, optimizer._cycle.batches_to_wait = skips, local, wait
    optimizer._choose_stepper()
    optimizer.last_batch = last
    return optimizer


@one_process
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_nodes_that_differ_come_together_once(wire: torch.dtype) -> None:
    """Sent anew before it is merged, the difference would be taken away twice, and would grow in the end."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = daso(comm, model, warmup_epochs=0, downcast_type=wire)
        optimizer._cycle._set_skips(2, 1, 3)
        optimizer.param_groups[0]["lr"] = 0.0
        start = tensors_of(net())
        train(optimizer, model, [batch(0, comm.rank)])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(comm.rank - 1.0)
        train(optimizer, model, [batch(step, comm.rank) for step in range(8)])
        assert_close(tensors_of(model), start, rtol=0, atol=1e-12)

    world(3, 1).run(body)


@one_process
@pytest.mark.parametrize(("local", "skips", "wait"), [(2, 8, 2), (3, 4, 1)])
def test_ranks_of_a_node_train_alone_between_local_averages(local: int, skips: int, wait: int) -> None:
    """Two nodes of two ranks, each rank with a momentum of its own, against the formulas."""
    last = 10

    def body(comm: Communicator) -> list[list[torch.Tensor]]:
        model = net()
        optimizer = cycling_alone(comm, model, local, skips, wait, last)
        found = []
        for step in range(last + 1):
            train(optimizer, model, [batch(step, comm.rank)])
            found.append([p.detach().clone() for p in model.parameters()])
        return found

    expected = replicas(sgd, 4)
    nodes = [expected[:2], expected[2:]]
    history = []
    flight: list[tuple[int, list[list[torch.Tensor]]]] = []
    for step in range(last + 1):
        for replica in expected:
            replica.update(step)
        if flight and flight[0][0] == step:
            _, sent = flight.pop(0)
            for rank, replica in enumerate(expected):
                done = [x - b for x, b in zip(replica.values, sent[rank // 2], strict=True)]
                replica.values = plus(mean(sent), done)
        sends = step % skips == 0 and step != last
        if sends or step == last or step % local == 0:
            for node in nodes:
                average = mean([replica.values for replica in node])
                for replica in node:
                    replica.values = average
        if sends:
            flight.append((step + min(wait, last - step), [node[0].values for node in nodes]))
        if step == last:
            average = mean([node[0].values for node in nodes])
            for replica in expected:
                replica.values = average
        history.append([replica.values for replica in expected])
    for rank, found in enumerate(world(4, 2).run(body)):
        for step, values in enumerate(found):
            assert_close(values, history[step][rank], rtol=1e-12, atol=1e-12)
        assert not torch.equal(history[1][0][0], history[1][1][0])


@one_process
def test_number_and_order_of_exchanges_where_ranks_train_alone() -> None:
    ring = world(4, 2)

    def body(comm: Communicator) -> list[tuple[list[str], int]]:
        model = nn.Linear(4, 3).double()
        optimizer = cycling_alone(comm, model, 2, 4, 2, 6)
        optimizer.set_model(nn.Module())  # no buffers
        found = []
        for step in range(7):
            comm.barrier()
            before, events = len(operations(ring.events, comm.rank)), len(ring.events)
            train(optimizer, model, [batch(step, comm.rank)])
            own = [event for event in ring.events[events:] if event.rank == comm.rank]
            found.append((operations(ring.events, comm.rank)[before:], len(own)))
            comm.barrier()
        return found

    for rank, exchanges in enumerate(ring.run(body)):
        node = ["all_gather"]
        first, second = (["all_gather"] if turn % 2 == rank % 2 else [] for turn in range(2))
        merge = ["broadcast"]
        kinds = [kinds for kinds, _ in exchanges]
        # What is sent after batch 4 would be merged after the last one.
        assert kinds == [node + first, [], merge + node, [], node, [], node + second + merge]
        # Backward and step exchange nothing at all where nothing is due; a local average asks the node alone.
        assert [number for _, number in exchanges][1::2] == [0, 0, 0]


@one_process
def test_from_training_alone_to_averaged_gradients_and_back() -> None:
    """The published cycle, all of it: (4, 1, 1), (2, 1, 1), (1, 1, 1), (8, 2, 2), (4, 1, 1)."""

    def body(comm: Communicator) -> list[tuple[int, int, bool]]:
        model, unused = net(), nn.Parameter(torch.zeros(3, dtype=torch.float64))
        inner = torch.optim.SGD([*model.parameters(), unused], lr=0.01, momentum=0.9)
        optimizer = heatopt.DASO(inner, 30, comm=comm, model=model, warmup_epochs=0, downcast_type=torch.float32)
        within = comm.by_node().within
        found = []
        for epoch in range(14):
            alone = isinstance(optimizer.stepper, torch.optim.SGD)
            found.append((optimizer.global_skip, optimizer.local_skip, alone))
            for step in range(3):
                optimizer.zero_grad()
                loss = loss_of(model, batch(3 * epoch + step, comm.rank))
                (loss + unused.sum() if comm.rank == 1 and alone else loss).backward()  # states of rank 1 alone
                optimizer.step()
                if not alone:
                    assert_ranks_equal(within, model, unused, optimizer.torch_optimizer)
            optimizer.epoch_loss_logic(1.0)
            assert_ranks_equal(comm, model, unused)
        return found

    phases = [(4, 1, False)] * 4 + [(2, 1, False)] * 3 + [(1, 1, False)] * 3 + [(8, 2, True)] * 3 + [(4, 1, False)]
    assert world(4, 2).run(body)[-1] == phases


@one_process
def test_a_checkpoint_where_ranks_train_alone() -> None:
    def body(comm: Communicator) -> None:
        model, resumed = net(), net(seed=1)
        optimizer = cycling_alone(comm, model, 2, 8, 2, 20)
        train(optimizer, model, [batch(step, comm.rank) for step in range(4)])
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        its_optimizer = daso(comm, resumed, warmup_epochs=0)
        resumed.load_state_dict(saved["model"])
        its_optimizer.load_state_dict(saved["optimizer"])
        for one, other in ((optimizer, model), (its_optimizer, resumed)):
            train(one, other, [batch(4, comm.rank), batch(5, comm.rank)])
            one.synchronize()
            assert_ranks_equal(comm, other)
        assert_equal(resumed, model)

    world(4, 2).run(body)


@one_process
def test_messages_are_no_longer_than_the_chunk_size() -> None:
    ring = world(2, 1)

    def body(comm: Communicator) -> None:
        model = net(torch.float32)
        optimizer = daso(comm, model, sending_chunk_size=10)
        train(optimizer, model, [batch(0, comm.rank, dtype=torch.float32)])

    ring.run(body)
    sizes = [event.bytes for event in ring.events if event.kind == "all_gather"]
    elements = sum(p.numel() for p in net().parameters())
    assert max(sizes) == 40
    assert sum(sizes) == 2 * 4 * elements


def test_phases_follow_the_mean_loss_of_all_ranks(ranks: Ranks) -> None:
    def body(comm: Communicator, averaged: bool) -> list[tuple[str, int, int]]:
        model = net()
        optimizer = daso(comm, model, epochs=12)
        found = []
        for epoch in range(12):
            train(optimizer, model, [batch(epoch, comm.rank)])
            # One rank's loss falls, the others' stay: no rank may decide by its own.
            optimizer.epoch_loss_logic(torch.tensor(0.5**epoch if comm.rank == 0 else 1.0), averaged)
            found.append((optimizer.phase, optimizer.global_skip, optimizer.batches_to_wait))
        assert comm.all_gather_object(found) == [found] * comm.size
        return found

    for averaged in (False, True):
        found = ranks(lambda comm, averaged=averaged: body(comm, averaged))[0]
        assert found[0] == ("cycling", 4, 1)
        assert found[-1] == ("cool-down", 0, 0)
        # Rank 0's loss falls all the time; the mean does not once the others' weigh more.
        assert ((4, 1) in {f[1:] for f in found[5:10]}) or not averaged


def test_the_first_epoch_tells_the_last_batch(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = daso(comm, model, warmup_epochs=0)
        assert optimizer.last_batch is None
        train(optimizer, model, [batch(step, comm.rank) for step in range(6)])
        optimizer.epoch_loss_logic(1.0)
        assert_ranks_equal(comm, model)
        assert optimizer.last_batch == 5
        train(optimizer, model, [batch(step, comm.rank) for step in range(6, 12)])
        assert_ranks_equal(comm, model)  # before epoch_loss_logic: a model to evaluate

    ranks(body)


@pytest.mark.parametrize("batches", [1, 4, 9])
def test_an_epoch_may_be_shorter_or_longer(ranks: Ranks, batches: int) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = daso(comm, model, warmup_epochs=0)
        optimizer.last_batch = 5
        for epoch in range(3):
            train(optimizer, model, [batch(10 * epoch + step, comm.rank) for step in range(batches)])
            optimizer.epoch_loss_logic(1.0)
            assert_ranks_equal(comm, model)
            assert optimizer.current_batch == 0

    ranks(body)


@one_process
def test_the_last_batch_may_be_told_while_averages_are_on_their_way() -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = cycling_alone(comm, model, local=1, skips=4, wait=2, last=9)
        train(optimizer, model, [batch(step, comm.rank) for step in range(5)])
        optimizer.last_batch = 5
        train(optimizer, model, [batch(5, comm.rank)])
        assert_ranks_equal(comm, model)
        optimizer.epoch_loss_logic(1.0)
        assert_ranks_equal(comm, model)

    world(3, 1).run(body)


def test_ranks_with_other_numbers_of_batches_are_named() -> None:
    def body(comm: Communicator) -> str:
        model = net()
        optimizer = daso(comm, model)
        try:
            train(optimizer, model, [batch(step, comm.rank) for step in range(3 + (comm.rank == 1))])
            optimizer.epoch_loss_logic(1.0)
        except heatopt.RankMismatchError as error:
            return str(error)
        return "nothing was noticed"

    for message in world(2, 1).run(body):
        assert "rank 0 is in epoch_loss_logic()" in message
        assert "rank 1 is in an average of local updates" in message


def test_reset_begins_anew(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = daso(comm, model, warmup_epochs=0)
        train(optimizer, model, [batch(step, comm.rank) for step in range(5)])
        optimizer.epoch_loss_logic(1.0)
        train(optimizer, model, [batch(5, comm.rank)])
        optimizer.reset()
        assert_ranks_equal(comm, model)
        assert (optimizer.epoch, optimizer.last_batch, optimizer.current_batch) == (0, None, 0)
        assert (optimizer.phase, optimizer.global_skip) == ("cycling", 4)
        assert all(p.grad is None for p in model.parameters())
        train(optimizer, model, [batch(6, comm.rank)])

    ranks(body)


def test_scheduler_and_scaler_are_stepped_with_the_optimizer(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net(torch.float32)
        inner = sgd(model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
        optimizer = heatopt.DASO(inner, 3, comm=comm, model=model, scheduler=scheduler)
        for kind in (heatopt.GradScaler, torch.amp.GradScaler):
            scaler = kind("cpu", init_scale=8.0)
            optimizer.add_scaler(scaler)
            before = [t.clone() for t in tensors_of(model)]
            updates = optimizer.report()["updates"]
            for factor in (float("inf"), 1.0):
                optimizer.zero_grad()
                (scaler.scale(loss_of(model, batch(0, comm.rank, dtype=torch.float32))) * factor).backward()
                optimizer.step()
                if factor != 1.0:
                    assert_equal(tensors_of(model), before)
                    assert scaler.get_scale() == 4.0
            assert optimizer.report()["updates"] == updates + 2
            assert any(not torch.equal(a, b) for a, b in zip(tensors_of(model), before, strict=True))
            assert_ranks_equal(comm, model)
        assert inner.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4)

    ranks(body)


def test_a_copy_has_a_scheduler_and_a_scaler_of_its_own(ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[float]:
        model = net(torch.float32)
        inner = sgd(model)
        optimizer = heatopt.DASO(
            inner, 3, comm=comm, model=model, scheduler=torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
        )
        scaler = heatopt.GradScaler("cpu", init_scale=8.0)
        train(optimizer, model, [batch(0, comm.rank, dtype=torch.float32)])
        optimizer.add_scaler(scaler)
        twin, its_optimizer, its_scaler = copy.deepcopy((model, optimizer, scaler))
        its_optimizer.zero_grad()
        its_scaler.scale(loss_of(twin, batch(0, comm.rank, dtype=torch.float32)) * float("inf")).backward()
        its_optimizer.step()
        assert (scaler.get_scale(), its_scaler.get_scale()) == (8.0, 4.0)
        return [found.param_groups[0]["lr"] for found in (optimizer, its_optimizer)]

    assert ranks(body)[-1] == pytest.approx([0.05, 0.025])


def test_a_plateau_scheduler_gets_the_mean_loss(ranks: Ranks) -> None:
    def body(comm: Communicator) -> float:
        model = net()
        inner = sgd(model)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(inner, patience=0, factor=0.5)
        optimizer = heatopt.DASO(inner, 9, comm=comm, scheduler=scheduler)
        optimizer.set_model(model)
        for _ in range(2):
            train(optimizer, model, [batch(0, comm.rank)])
            optimizer.epoch_loss_logic(float(comm.rank))
        return float(inner.param_groups[0]["lr"])

    assert ranks(body) == [0.05] * ranks.size


def test_decisions_are_logged_where_wanted(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = daso(comm, model, verbose=True)
        train(optimizer, model, [batch(0, comm.rank)])
        optimizer.epoch_loss_logic(1.0)

    with caplog.at_level(logging.INFO, logger="heatopt"):
        ranks(body)
    lines = [record.getMessage() for record in caplog.records if "DASO" in record.getMessage()]
    assert set(lines) <= {"DASO: epoch 1 ended with loss 1; next is cycling with B = 4, L = 1, S = 1"}


@one_process
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_parameters_and_groups(frozen: int) -> None:
    def body(comm: Communicator) -> None:
        model = net(seed=comm.rank)
        parameters = list(model.parameters())
        parameters[frozen].requires_grad_(False)
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.05}]
        optimizer = heatopt.DASO(
            torch.optim.SGD(groups, lr=0.1), 3, comm=comm, warmup_epochs=0, sending_chunk_size=7, merge="daso"
        )
        before = parameters[frozen].detach().clone()
        train(optimizer, model, [batch(step, comm.rank) for step in range(6)])
        optimizer.epoch_loss_logic(1.0)
        assert torch.equal(parameters[frozen].detach(), before)
        assert_ranks_equal(comm, model)

    world(4, 2).run(body)


@one_process
def test_normalisation_statistics_are_equal_after_an_epoch() -> None:
    def body(comm: Communicator) -> None:
        model = fill(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double())
        optimizer = daso(comm, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(3)])
        optimizer.epoch_loss_logic(1.0)
        assert_ranks_equal(comm, model)

    world(4, 2).run(body)


Wrong = tuple[dict[str, Any], type[Exception], str]
WRONG: list[Wrong] = [
    ({"total_epochs": 0}, ValueError, "total_epochs must be an integer >= 1, got 0"),
    ({"total_epochs": 2.5}, TypeError, r"total_epochs must be an integer >= 1, got 2\.5"),
    ({"warmup_epochs": -1}, ValueError, "warmup_epochs must be an integer >= 0, got -1"),
    ({"cooldown_epochs": "4"}, TypeError, "cooldown_epochs must be an integer >= 0, got '4'"),
    ({"stability_level": 2}, ValueError, "stability_level must be a number >= 0 and <= 1, got 2"),
    ({"max_global_skips": -8}, ValueError, "max_global_skips must be an integer >= 0, got -8"),
    ({"sending_chunk_size": 0}, ValueError, "sending_chunk_size must be an integer >= 1, got 0"),
    ({"skip_reduction_factor": 0}, ValueError, "skip_reduction_factor must be an integer >= 1, got 0"),
    ({"local_skip_factor": 0}, ValueError, "local_skip_factor must be an integer >= 1, got 0"),
    ({"downcast_type": None}, TypeError, r"downcast_type must be torch\.bfloat16, torch\.half or torch\.float"),
    ({"downcast_type": torch.int8}, ValueError, r"downcast_type must be .*, got torch\.int8"),
    ({"use_mpi_groups": 1}, TypeError, "use_mpi_groups must be True or False, got 1"),
    ({"verbose": "yes"}, TypeError, "verbose must be True or False, got 'yes'"),
    ({"merge": "mean"}, ValueError, "merge must be 'delta' or 'daso', got 'mean'"),
    ({"scheduler": torch.optim.lr_scheduler.StepLR}, TypeError, "the class: make an instance of it first"),
    ({"scheduler": 3}, TypeError, "scheduler must be a torch learning-rate scheduler or None, got int"),
    ({"model": "net"}, TypeError, "model must be"),
    ({"wait": 1}, TypeError, "unexpected keyword argument 'wait'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    make: Callable[..., Any] = heatopt.DASO
    with pytest.raises(error, match=message):
        make(sgd(net()), **({"total_epochs": 3} | arguments))


def test_wrong_calls() -> None:
    optimizer = heatopt.DASO(sgd(net()), 3)
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler, got int"):
        optimizer.add_scaler(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_globally_averaged must be True or False, got 1"):
        optimizer.epoch_loss_logic(1.0, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be"):
        optimizer.set_model("net")  # type: ignore[arg-type]
