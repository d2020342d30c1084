"""Ranks with unequal numbers of samples: averages of local updates are those of federated averaging."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import ThreadWorld
from heatopt.errors import RankMismatchError
from heatopt.local._fragments import cut
from heatopt.local._samples import PLAIN, Samples, shares_of
from heatopt.sync import NO_WEIGHT
from tests.ranks._local import Replica, Values, minus, plus, replicas, zeros
from tests.ranks._training import (
    Make,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    loss_of,
    net,
    sgd,
    train,
)
from tests.support.launch import LAUNCH

if TYPE_CHECKING:
    from heatopt.comm import Communicator
    from tests.support.ranks import Ranks

COUNTS = (5, 2, 0, 3)
"""Samples of each rank at the first update; with three ranks 5, 2 and 0."""
PERIOD, STEPS = 3, 9


def rows(step: int, rank: int) -> int:
    """The counts go round, but rank 2 has no samples in the whole first period."""
    return 0 if rank == 2 and step < PERIOD else COUNTS[(rank + step) % 4]


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def learn(optimizer: Any, model: nn.Module, rank: int, steps: Sequence[int] = range(STEPS)) -> None:
    """The mean over an empty batch is no number; rank 3 then leaves everything out."""
    for step in steps:
        optimizer.zero_grad()
        count = rows(step, rank)
        if count or rank != 3:
            with optimizer.weight(count):
                loss_of(model, batch(step, rank, count)).backward()
        optimizer.step()


def gradient(model: nn.Module, step: int, ranks: Sequence[int]) -> None:
    """Of the mean over the samples of some ranks; zeros if these are none, or nothing for rank 3 alone."""
    model.zero_grad()
    parts = [batch(step, rank, rows(step, rank)) for rank in ranks]
    data = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    if len(data[0]):
        loss_of(model, data).backward()
    elif list(ranks) != [3]:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)


def update(replica: Replica, step: int) -> None:
    gradient(replica.model, step, [replica.rank])
    replica.optimizer.step()


def mean(everyone: Sequence[Replica], first: int, last: int, values: Sequence[Values] | None = None) -> Values:
    """The mean of the replicas, or of what they had, weighted by their samples in ``first <= step < last``."""
    counts = [sum(rows(step, replica.rank) for step in range(first, last)) for replica in everyone]
    if not any(counts):
        counts = [1] * len(everyone)
    found = [replica.values for replica in everyone] if values is None else values
    return [sum(n * v for n, v in zip(counts, each, strict=True)) / sum(counts) for each in zip(*found, strict=True)]


def run(ranks: Ranks, method: Any, make: Make = sgd, **options: Any) -> list[Values]:
    def body(comm: Communicator) -> Values:
        model = net()
        optimizer = method(make(model), model=model, comm=comm, **options)
        learn(optimizer, model, comm.rank)
        return [p.detach() for p in model.parameters()]

    return ranks(body, min_size=2)


def compare(found: list[Values], expected: list[Replica]) -> None:
    for values, replica in zip(found, expected, strict=True):
        assert_close(values, replica.values, rtol=1e-12, atol=1e-12)


# Against one process, and obvious loops

EXACT: dict[str, Callable[..., Any]] = {
    "LocalSGD": lambda o, **k: heatopt.LocalSGD(o, sync_every=1, **k),
    "post-local": lambda o, **k: heatopt.LocalSGD(o, sync_every=1, warmup_steps=2, **k),
    "outer": lambda o, **k: heatopt.DiLoCo(o, sync_every=1, outer_lr=1.0, outer_momentum=0.0, **k),
    "SlowMo": lambda o, **k: heatopt.SlowMo(o, sync_every=1, slow_momentum=0.0, **k),
    "within": lambda o, comm, **k: heatopt.LocalSGD(o, sync_every=1, comm=comm, within=comm.split(comm.rank // 2), **k),
    "DASO": lambda o, **k: heatopt.DASO(o, 1, downcast_type=torch.float32, **k),
}


@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
@pytest.mark.every_size
def test_averaged_after_each_update_it_is_one_process_with_all_samples(ranks: Ranks, method: Any) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = method(plain_sgd(model), model=model, comm=comm), plain_sgd(expected)
        for step in range(4):
            learn(optimizer, model, comm.rank, [step])
            gradient(expected, step, range(comm.size))
            plain.step()
            assert_ranks_equal(comm, model)
            assert_close(model, expected)

    ranks(body)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
def test_local_sgd_is_federated_averaging(ranks: Ranks, make: Make, delay: int) -> None:
    found = run(ranks, heatopt.LocalSGD, make, sync_every=PERIOD, delay=delay)
    expected = replicas(make, ranks.size)
    flight: dict[int, tuple[Values, list[Values]]] = {}
    for step in range(1, STEPS + 1):
        for replica in expected:
            update(replica, step - 1)
        if step % PERIOD == 0:
            flight[step + delay] = mean(expected, step - PERIOD, step), [replica.values for replica in expected]
        if step in flight:
            average, sent = flight.pop(step)
            for replica, before in zip(expected, sent, strict=True):
                replica.values = plus(average, minus(replica.values, before))
    compare(found, expected)


@pytest.mark.parametrize("method", ["SlowMo", "CO2"])
def test_outer_momentum(ranks: Ranks, method: str) -> None:
    found = run(ranks, getattr(heatopt, method), sync_every=PERIOD)
    expected = replicas(sgd, ranks.size)
    start = expected[0].values
    u, sent = zeros(start), None
    for step in range(1, STEPS + 1):
        for replica in expected:
            update(replica, step - 1)
        if step % PERIOD == 0:
            done = minus(start, mean(expected, step - PERIOD, step))
            if method == "SlowMo":
                u = plus([0.5 * v for v in u], done, 1 / 0.1)
                start = plus(start, u, -0.1)
            elif sent is not None:
                u = plus([0.2 * v for v in u], sent, 0.5)
                start = plus(start, u, -1.0)
            for replica in expected:
                replica.values = start
            sent = done
    compare(found, expected)


@pytest.mark.parametrize("fragments", [1, 3])
def test_each_fragment_counts_the_samples_since_it_was_sent(ranks: Ranks, fragments: int) -> None:
    """Also when all of them are averaged at once, in synchronize()."""
    steps = 5

    def body(comm: Communicator) -> Values:
        model = net()
        optimizer = heatopt.LocalSGD(sgd(model), model=model, comm=comm, sync_every=PERIOD, fragments=fragments)
        learn(optimizer, model, comm.rank, range(steps))
        optimizer.synchronize()
        assert_ranks_equal(comm, model)
        return [p.detach() for p in model.parameters()]

    expected = replicas(sgd, ranks.size)
    parts = cut([value.numel() for value in expected[0].values], fragments)
    last = [0] * fragments

    def average(fragment: int, step: int) -> None:
        values = mean(expected, last[fragment], step)
        for replica in expected:
            own = replica.values
            for i in parts[fragment]:
                own[i] = values[i]
            replica.values = own
        last[fragment] = step

    for step in range(1, steps + 1):
        for replica in expected:
            update(replica, step - 1)
        for fragment in range(fragments):
            if step % PERIOD == (fragment + 1) * PERIOD // fragments % PERIOD:
                average(fragment, step)
    for fragment in range(fragments):
        average(fragment, steps)
    compare(ranks(body, min_size=2), expected)


def test_replicas_of_several_ranks_count_all_their_samples(ranks: Ranks) -> None:
    """Ranks 0, 1 and 2, 3 average gradients, weighted; then the pairs count the samples of both."""

    def body(comm: Communicator) -> Values:
        model = net()
        within = comm.split(comm.rank // 2)
        optimizer = heatopt.LocalSGD(sgd(model), model=model, comm=comm, sync_every=PERIOD, within=within)
        learn(optimizer, model, comm.rank)
        return [p.detach() for p in model.parameters()]

    everyone = replicas(sgd, ranks.size)  # each pair has as many equal ones as it has ranks
    pairs = [[r for r in range(ranks.size) if r // 2 == rank // 2] for rank in range(ranks.size)]
    for step in range(1, STEPS + 1):
        for replica in everyone:
            gradient(replica.model, step - 1, pairs[replica.rank])
            replica.optimizer.step()
        if step % PERIOD == 0:
            average = mean(everyone, step - PERIOD, step)
            for replica in everyone:
                replica.values = average
    compare(ranks(body, min_size=2), everyone)


@pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")
@pytest.mark.parametrize("size", [3, 4])
def test_daso_where_ranks_of_a_node_train_alone(size: int) -> None:
    """B = L = S = 2: within nodes of two ranks by samples since that was done last, among nodes since the sending."""

    def body(comm: Communicator) -> Values:
        model = net()
        optimizer = heatopt.DASO(
            sgd(model), 40, comm=comm, model=model, warmup_epochs=0, max_global_skips=2, local_skip_factor=1,
            downcast_type=torch.float32,
        )  # fmt: skip
        while optimizer.local_skip < 2:
            optimizer.epoch_loss_logic(1.0)
        assert (optimizer.global_skip, optimizer.local_skip, optimizer.batches_to_wait) == (2, 2, 2)
        learn(optimizer, model, comm.rank)
        return [p.detach() for p in model.parameters()]

    everyone = replicas(sgd, size)
    nodes = [everyone[:2], everyone[2:]]
    flight: dict[int, tuple[Values, list[Values]]] = {}
    for step in range(STEPS):
        for replica in everyone:
            update(replica, step)
        if step in flight:
            average, sent = flight.pop(step)
            for replica, before in zip(everyone, sent, strict=True):
                replica.values = plus(average, minus(replica.values, before))
        if step % 2 == 0:
            for node in nodes:
                average = mean(node, max(step - 1, 0), step + 1)
                for replica in node:
                    replica.values = average
            flight[step + 2] = mean(everyone, max(step - 1, 0), step + 1), [replica.values for replica in everyone]
    compare(ThreadWorld(size, ranks_per_node=2, timeout=20).run(body), everyone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [heatopt.LocalSGD, heatopt.DiLoCo], ids=["LocalSGD", "DiLoCo"])
def test_equal_weights_are_as_none_bit_for_bit(ranks: Ranks, method: Any, dtype: torch.dtype) -> None:
    def body(comm: Communicator) -> None:
        models = [net(dtype), net(dtype)]
        for model, weighted in zip(models, (True, False), strict=True):
            optimizer = method(sgd(model), model=model, comm=comm, sync_every=2)
            for step in range(5):
                optimizer.zero_grad()
                with optimizer.weight(7) if weighted else optimizer.no_sync():
                    loss_of(model, batch(step, comm.rank, dtype=dtype)).backward()
                optimizer.step()
            optimizer.synchronize()
        assert_equal(*models)

    ranks(body)


def test_narrow_parameters_and_a_weight_that_is_the_mean_weight(ranks: Ranks) -> None:
    """All ranks send the same dtype, whatever each of them counts; what has no samples may be no number."""

    def body(comm: Communicator) -> None:
        weight = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        optimizer = heatopt.LocalSGD(torch.optim.SGD([weight], lr=1.0), comm=comm, sync_every=1)
        weight.grad = torch.full_like(weight, -float(comm.rank))
        optimizer.step(weight=comm.rank)
        expected = sum(r * r for r in range(comm.size)) / max(1, sum(range(comm.size)))
        assert torch.equal(weight.detach(), torch.full((5,), expected, dtype=torch.bfloat16))
        weight.grad = torch.full_like(weight, 0.0)
        with torch.no_grad():
            weight.fill_(float("nan") if comm.rank == 0 else 1.0)
        optimizer.step(weight=float(comm.rank > 0))
        assert torch.equal(weight.detach(), torch.ones(5, dtype=torch.bfloat16))

    ranks(body, min_size=2)


# How samples are counted


def test_micro_batches_and_steps_add_up(ranks: Ranks) -> None:
    """Several contexts, gradients by hand, a closure: the same mean."""

    def body(comm: Communicator) -> Values:
        found = []
        for how in ("micro-batches", "by hand", "closure"):
            model = net()
            optimizer: Any = heatopt.LocalSGD(sgd(model), model=model, comm=comm, sync_every=2)
            for step in range(2):
                x, y = batch(step, comm.rank, 6 + comm.rank)
                optimizer.zero_grad()
                if how == "micro-batches":
                    for part in (slice(0, 1), slice(1, None)):
                        with optimizer.weight(len(x[part])):
                            loss_of(model, (x[part], y[part])).backward()
                    optimizer.step()
                elif how == "by hand":
                    loss_of(model, (x, y)).backward()
                    optimizer.step(weight=len(x))
                else:

                    def closure(data: Any = (x, y), model: nn.Module = model, optimizer: Any = optimizer) -> Any:
                        optimizer.zero_grad()
                        with optimizer.weight(len(data[0])):
                            loss = loss_of(model, data)
                            loss.backward()
                        return loss

                    optimizer.step(closure)
            assert_ranks_equal(comm, model)
            found.append([p.detach() for p in model.parameters()])
        assert_close(found[0], found[1])
        assert_equal(found[1], found[2])
        return found[1]

    found = ranks(body, min_size=2)[-1]
    everyone = replicas(sgd, ranks.size)
    for replica in everyone:
        train(replica.optimizer, replica.model, [batch(step, replica.rank, 6 + replica.rank) for step in range(2)])
    counts = [6 + r for r in range(ranks.size)]
    expected = [
        sum(n * v for n, v in zip(counts, values, strict=True)) / sum(counts)
        for values in zip(*(replica.values for replica in everyone), strict=True)
    ]
    assert_close(found, expected)


def test_join_and_skipped_updates(ranks: Ranks) -> None:
    """A rank without batches counts for nothing, and neither do samples of an update that overflowed."""

    def body(comm: Communicator) -> None:
        weight = nn.Parameter(torch.zeros(3))
        optimizer = heatopt.LocalSGD(torch.optim.SGD([weight], lr=1.0), comm=comm, sync_every=2)
        scaler = heatopt.GradScaler("cpu", init_scale=2.0)
        with optimizer.join():
            for step in range((4, 1, 0, 2)[comm.rank]):
                optimizer.zero_grad()
                overflow = comm.rank == 0 and step == 1
                with optimizer.weight(100 if overflow else 1 + comm.rank):
                    scaler.scale(-weight.sum() * (1e30 if overflow else 1.0) * (1e30 if overflow else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
        # Two updates: rank 0 has come to 1 by 1 sample, 1 to 1 by 2, 3 to 2 by 8. Two more: rank 0 alone.
        seen, done = sum((1, 2, 0, 8)[: comm.size]), sum((1, 2, 0, 16)[: comm.size])
        assert_close(weight, torch.full((3,), done / seen + 2), rtol=1e-6)
        assert_ranks_equal(comm, weight)

    ranks(body)


@pytest.mark.parametrize("saved_after", [1, 4])
def test_resumed_within_a_period_it_is_bit_equal(ranks: Ranks, saved_after: int, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = Path(comm.broadcast_object(str(tmp_path))) / "checkpoint"

        def make(seed: int) -> tuple[nn.Module, Any]:
            model = net(seed=seed)
            return model, heatopt.DiLoCo(adamw(model), model=model, comm=comm, sync_every=3, fragments=2, delay=1)

        model, optimizer = make(0)
        learn(optimizer, model, comm.rank, range(saved_after))
        heatopt.save(path, model=model, optimizer=optimizer, comm=comm)
        twin, its_optimizer = copy.deepcopy((model, optimizer))
        learn(optimizer, model, comm.rank, range(saved_after, STEPS))
        learn(its_optimizer, twin, comm.rank, range(saved_after, STEPS))
        assert_equal(twin, model)
        again, resumed = make(1)
        heatopt.load(path, model=again, optimizer=resumed, comm=comm)
        learn(resumed, again, comm.rank, range(saved_after, STEPS))
        assert_equal(again, model)

    ranks(body)


def test_words() -> None:
    samples = Samples(2)
    samples.note(3.0)
    assert (samples.take(0), samples.words) == (3.0, [NO_WEIGHT, 3.0])
    samples.note(NO_WEIGHT)
    samples.note(0.0)
    assert samples.words == [0.0, 3.0]
    samples.note(PLAIN)
    assert samples.words[0] == samples.words[1] < PLAIN


@pytest.mark.parametrize(
    ("words", "idle", "shares"),
    [
        ([5.0, 2.0, 0.0], [0.0] * 3, (15 / 7, 6 / 7, 0.0)),
        ([5.0, 2.0, NO_WEIGHT], [0.0, 0.5, 1.0], (15 / 7, 6 / 7, 0.0)),
        ([4.0, 4.0], [0.0, 0.5], None),
        ([0.0, NO_WEIGHT], [0.0, 1.0], (2.0, 0.0)),
        ([PLAIN, NO_WEIGHT, PLAIN], [0.0, 1.0, 0.5], (1.5, 0.0, 1.5)),
        ([PLAIN, NO_WEIGHT], [1.0, 1.0], None),
    ],
)
def test_shares(words: list[float], idle: list[float], shares: tuple[float, ...] | None) -> None:
    assert shares_of(words, idle) == (shares if shares is None else pytest.approx(shares, rel=1e-15))


# What cannot be


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda step: None, "has made updates without a weight since the last average; use .*n = 0 where"),
        (lambda step: 2 if step else None, "has made some updates with a weight and others without"),
    ],
    ids=["one rank", "one update"],
)
def test_ranks_disagree(ranks: Ranks, odd: Callable[[int], int | None], message: str) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = heatopt.DiLoCo(sgd(model), model=model, comm=comm, sync_every=2)

        def update(step: int) -> None:
            optimizer.zero_grad()
            loss_of(model, batch(step, comm.rank)).backward()
            optimizer.step(weight=odd(step) if comm.rank == comm.size - 1 else 3)

        update(0)
        with pytest.raises(RankMismatchError, match=f"rank {comm.size - 1} {message}"):
            update(1)

    ranks(body, min_size=2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda o, c: heatopt.LocalSGD(o, comm=c, wire_dtype=torch.bfloat16, error_feedback=True), "error_feedback"),
        (lambda o, c: heatopt.LocalSGD(o, comm=c, nested=[(c, 2)]), "LocalSGD takes no weights .* nested groups"),
        (lambda o, c: heatopt.DASO(o, 3, comm=c, merge="daso"), "DASO takes no weights .* use merge=.delta"),
    ],
    ids=["error feedback", "nested", "DASO as published"],
)
def test_where_they_are_refused(ranks: Ranks, make: Any, reason: str) -> None:
    def body(comm: Communicator) -> None:
        optimizer = make(sgd(net()), comm)
        for call in (lambda: optimizer.weight(3), lambda: optimizer.step(weight=3)):
            with pytest.raises(ValueError, match=reason):
                call()

    ranks(body)


@pytest.mark.parametrize(("weight", "error"), [(-1, ValueError), (float("nan"), ValueError), ("5", TypeError)])
def test_wrong_weights(ranks: Ranks, weight: Any, error: type[Exception]) -> None:
    def body(comm: Communicator) -> None:
        optimizer = heatopt.CO2(sgd(net()), comm=comm)
        for call in (lambda: optimizer.weight(weight), lambda: optimizer.step(weight=weight)):
            with pytest.raises(error, match="number of samples or tokens"):
                call()
        with pytest.raises(ValueError, match="inside the closure"):
            optimizer.step(lambda: torch.zeros(()), weight=3)

    ranks(body)


# What Hetu's users know


@pytest.mark.parametrize("method", ["LocalSGD", "SlowMo", "DiLoCo", "CO2", "DASO", "sharded"])
def test_minimize_and_states(ranks: Ranks, method: str) -> None:
    def body(comm: Communicator) -> None:
        model, other = net(), net()

        def make(model: nn.Module) -> Any:
            if method == "DASO":
                return heatopt.DASO(sgd(model), 3, comm=comm, model=model)
            if method == "sharded":
                return heatopt.LocalSGD(sgd(model), comm=comm, model=model, within=comm, shard="state")
            return getattr(heatopt, method)(sgd(model), comm=comm, model=model, sync_every=2)

        optimizer, by_hand = make(model), make(other)
        first = next(model.parameters())
        for step in range(3):
            loss = loss_of(model, batch(step, comm.rank))
            assert optimizer.minimize(loss).equal(loss.detach())
            train(by_hand, other, [batch(step, comm.rank)])
        assert_equal(model, other)
        ours = optimizer.get_states(first)["momentum_buffer"]
        assert_equal(ours, by_hand.get_states(next(other.parameters()))["momentum_buffer"])
        optimizer.set_states(first, "momentum_buffer", np.ones(first.shape))
        assert_equal(optimizer.get_states(first)["momentum_buffer"], torch.ones_like(first))
        assert not ours.equal(torch.ones_like(first))
        with pytest.raises(ValueError, match="has shape"):
            optimizer.set_states(first, "momentum_buffer", np.ones(2))
        with pytest.raises(ValueError, match="not a parameter of this optimizer"):
            optimizer.get_states(torch.ones(2))

    ranks(body)
