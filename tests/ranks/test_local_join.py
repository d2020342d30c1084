"""Local-update methods inside join(): ranks with unequal numbers of batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import ThreadWorld
from heatopt.local._fragments import cut
from tests.ranks._local import Replica, Values, mean, minus, plus, replicas, zeros
from tests.ranks._training import assert_close, assert_equal, assert_ranks_equal, batch, net, sgd, train

if TYPE_CHECKING:
    from heatopt.comm import Communicator
    from tests.support.ranks import Ranks

PERIOD = 3


def batches_of(rank: int) -> int:
    """Rank 0 has most, and is alone for more than a period; rank 2 has none."""
    return (11, 5, 0, 7)[rank % 4]


def run(ranks: Ranks, method: Any, **options: Any) -> list[Values]:
    """The parameters of each rank after an epoch of unequal numbers of batches; another epoch follows."""

    def body(comm: Communicator) -> Values:
        model = net()
        optimizer = method(sgd(model), model=model, comm=comm, sync_every=PERIOD, **options)
        with optimizer.join():
            train(optimizer, model, [batch(step, comm.rank) for step in range(batches_of(comm.rank))])
        assert_ranks_equal(comm, model)
        found = [p.detach().clone() for p in model.parameters()]
        counts = [optimizer.report()["updates"]]  # the meeting at which nobody trained any more
        with optimizer.join():
            train(optimizer, model, [batch(step, comm.rank) for step in range(comm.rank % 2)])
        assert_ranks_equal(comm, model)
        counts.append(optimizer.report()["updates"])
        assert comm.all_gather_object(counts) == [counts] * comm.size
        return found

    return ranks(body, min_size=2)


def trained(everyone: list[Replica], step: int) -> list[Values]:
    """Of those that have made an update in the period that ends with ``step``."""
    return [replica.values for replica in everyone if step - batches_of(replica.rank) < PERIOD]


def busy_means(size: int, delay: int = 0) -> list[Values]:
    """Local SGD whose averages are over the ranks that still have batches."""
    everyone = replicas(sgd, size)
    flight: dict[int, tuple[Values, list[Values]]] = {}
    for step in range(1, 12):
        for replica in everyone:
            if step <= batches_of(replica.rank):
                replica.update(step - 1)
        if step in flight:
            average, sent = flight.pop(step)
            for replica, before in zip(everyone, sent, strict=True):
                replica.values = plus(average, minus(replica.values, before))
        if step % PERIOD == 0:
            average = mean(trained(everyone, step))
            if delay:
                flight[step + delay] = average, [r.values for r in everyone]
                continue
            for replica in everyone:
                replica.values = average
    last = mean([r.values for r in everyone if batches_of(r.rank) > 9])
    return [last] * size


@pytest.mark.parametrize("delay", [0, 2])
def test_means_are_over_the_ranks_that_still_train(ranks: Ranks, delay: int) -> None:
    for values, expected in zip(run(ranks, heatopt.LocalSGD, delay=delay), busy_means(ranks.size, delay), strict=True):
        assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_outer_optimizers_move_by_the_mean_of_those_that_train(ranks: Ranks) -> None:
    found = run(ranks, heatopt.DiLoCo)
    everyone = replicas(sgd, ranks.size)
    theta = everyone[0].values
    velocity = zeros(theta)
    for step in range(1, 12):
        for replica in everyone:
            if step <= batches_of(replica.rank):
                replica.update(step - 1)
        if step % PERIOD == 0:
            delta = minus(theta, mean(trained(everyone, step)))
            velocity = plus(delta, velocity, 0.5)
            theta = plus(theta, plus(delta, velocity, 0.5), -0.7)
            for replica in everyone:
                replica.values = theta
    last = mean([r.values for r in everyone if batches_of(r.rank) > 9])
    for values in found:
        assert_close(values, last, rtol=1e-12, atol=1e-12)


def test_the_end_counts_those_that_have_trained_since_each_fragment_was_sent(ranks: Ranks) -> None:
    """Rank 0 stops after the first fragment's average, before the second one's."""

    def body(comm: Communicator) -> Values:
        model = net()
        optimizer = heatopt.LocalSGD(sgd(model), comm=comm, sync_every=8, fragments=2)
        with optimizer.join():
            train(optimizer, model, [batch(step, comm.rank) for step in range(6 if comm.rank else 3)])
        return [p.detach() for p in model.parameters()]

    everyone = replicas(sgd, ranks.size)
    first, second = cut([value.numel() for value in everyone[0].values], 2)
    for step in range(1, 7):
        for replica in everyone:
            if step <= (6 if replica.rank else 3):
                replica.update(step - 1)
        if step == 4:
            average = mean([replica.values for replica in everyone])
            for replica in everyone:
                replica.values = [average[i] if i in first else value for i, value in enumerate(replica.values)]
    last, all_of_them = mean([r.values for r in everyone if r.rank]), mean([r.values for r in everyone])
    for values in ranks(body, min_size=2):
        assert_close([values[i] for i in first], [last[i] for i in first], rtol=1e-12, atol=1e-12)
        assert_close([values[i] for i in second], [all_of_them[i] for i in second], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (heatopt.SlowMo, {}),
        (heatopt.CO2, {}),
        (heatopt.DiLoCo, {"fragments": 3, "delay": 1, "wire_dtype": torch.bfloat16, "error_feedback": True}),
        (heatopt.LocalSGD, {"average_moments": (1, 1)}),
    ],
    ids=["SlowMo", "CO2", "streaming", "moments"],
)
def test_every_method_comes_to_an_end_with_equal_ranks(ranks: Ranks, method: Any, options: dict[str, Any]) -> None:
    run(ranks, method, **options)


def test_equal_numbers_are_trained_as_without(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, plain = net(torch.float32), net(torch.float32)
        data = [batch(step, comm.rank, dtype=torch.float32) for step in range(7)]
        for thing, joins in ((model, True), (plain, False)):
            optimizer = heatopt.LocalSGD(sgd(thing), model=thing, comm=comm, sync_every=PERIOD)
            if joins:
                with optimizer.join():
                    train(optimizer, thing, data)
            else:
                train(optimizer, thing, data)
                optimizer.synchronize()
        assert_equal(model, plain)

    ranks(body)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda model, comm: heatopt.DASO(sgd(model), 3, comm=comm), "DASO.*replicas of several ranks"),
        (lambda model, comm: heatopt.LocalSGD(sgd(model), comm=comm, within="node"), "replicas of several ranks"),
        (lambda model, comm: heatopt.LocalSGD(sgd(model), comm=comm, warmup_steps=2), "updates of the warm-up"),
        (lambda model, comm: heatopt.LocalSGD(sgd(model), comm=comm, nested=[(comm, 2)]), "nested groups"),
    ],
    ids=["DASO", "within", "warm-up", "nested"],
)
def test_where_it_is_refused(make: Any, reason: str) -> None:
    def body(comm: Communicator) -> None:
        model: nn.Module = net()
        optimizer = make(model, comm)
        with pytest.raises(ValueError, match=reason), optimizer.join():
            raise AssertionError("the loop has begun")

    ThreadWorld(2).run(body)


def test_an_error_in_the_loop_is_raised_at_once() -> None:
    def body(comm: Communicator) -> None:
        optimizer = heatopt.LocalSGD(sgd(net()), comm=comm)
        with pytest.raises(OSError, match="no data"), optimizer.join():
            raise OSError("no data")

    ThreadWorld(2).run(body)
