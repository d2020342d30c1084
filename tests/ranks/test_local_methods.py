"""Each local-update method against a slow, obvious implementation of its equations, in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._local import Replica, Values, mean, minus, plus, replicas, zeros
from tests.ranks._training import (
    Make,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    net,
    reference,
    sgd,
    tensors_of,
    train,
    whole,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

STEPS = 12
both = pytest.mark.parametrize("make", [sgd, adamw], ids=["sgd", "adamw"])
Method = Callable[..., torch.optim.Optimizer]


def run(ranks: Ranks, method: Method, make: Make, steps: int = STEPS, **options: Any) -> list[Values]:
    """Train with ``method``; the parameters of each rank at the end."""

    def body(comm: Communicator) -> Values:
        model = net()
        optimizer = method(make(model), model=model, comm=comm, **options)
        train(optimizer, model, [batch(step, comm.rank) for step in range(steps)])
        return [p.detach() for p in model.parameters()]

    return ranks(body, min_size=2)


def compare(found: list[Values], expected: list[Replica]) -> None:
    for values, replica in zip(found, expected, strict=True):
        assert_close(values, replica.values, rtol=1e-12, atol=1e-12)


@both
def test_local_sgd(ranks: Ranks, make: Make) -> None:
    found = run(ranks, heatopt.LocalSGD, make, sync_every=3, steps=STEPS + 1)
    expected = replicas(make, ranks.size)
    for step in range(STEPS + 1):
        for replica in expected:
            replica.update(step)
        if (step + 1) % 3 == 0:
            average = mean([replica.values for replica in expected])
            for replica in expected:
                replica.values = average
    compare(found, expected)


@pytest.mark.parametrize("outer", [None, lambda params: torch.optim.SGD(params, lr=1)], ids=["none", "sgd"])
@both
def test_every_update_averaged_is_the_exact_average_bit_for_bit(ranks: Ranks, make: Make, outer: Any) -> None:
    def body(comm: Communicator) -> None:
        model, plain = net(torch.float32), net(torch.float32)
        optimizer = heatopt.LocalSGD(make(model), model=model, comm=comm, sync_every=1, outer=outer)
        own = make(plain)
        for step in range(5):
            data = [batch(step, comm.rank, dtype=torch.float32)]
            train(optimizer, model, data)
            train(own, plain, data)
            for parameter in plain.parameters():
                comm.allreduce(parameter, "mean")
            assert_equal(list(model.parameters()), list(plain.parameters()))

    ranks(body)


def test_warm_up_is_data_parallel_training(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net(seed=comm.rank)
        optimizer = heatopt.LocalSGD(adamw(model), model=model, comm=comm, sync_every=2, warmup_steps=4)
        train(optimizer, model, [batch(step, comm.rank) for step in range(4)])
        expected = net()
        plain = reference(adamw, expected, comm.size, 4)
        assert_close(model, expected)
        assert_close(optimizer.torch_optimizer, plain)
        assert_ranks_equal(comm, model, optimizer.torch_optimizer)
        train(optimizer, model, [batch(4, comm.rank)])
        if comm.size > 1:
            own = comm.all_gather_object([t.sum().item() for t in tensors_of(model)])
            assert own[0] != own[-1]  # it has begun to train alone
        train(optimizer, model, [batch(5, comm.rank)])
        assert_ranks_equal(comm, model)

    ranks(body)


def slow_momentum(
    size: int,
    make: Make,
    period: int,
    combine: Callable[[Values, Values, Values], tuple[Values, Values]],
    warmup: int = 0,
) -> list[Replica]:
    """Every ``period`` updates: (anchor, momentum) = combine(anchor, momentum, mean of the replicas)."""
    expected = replicas(make, size)
    for replica in expected:
        train(replica.optimizer, replica.model, [whole(step, size) for step in range(warmup)])
    anchor = expected[0].values
    momentum = zeros(anchor)
    for step in range(warmup, warmup + STEPS):
        for replica in expected:
            replica.update(step)
        if (step + 1 - warmup) % period == 0:
            anchor, momentum = combine(anchor, momentum, mean([replica.values for replica in expected]))
            for replica in expected:
                replica.values = anchor
    return expected


@both
def test_diloco(ranks: Ranks, make: Make) -> None:
    def combine(theta: Values, velocity: Values, average: Values) -> tuple[Values, Values]:
        delta = minus(theta, average)
        velocity = plus(delta, velocity, 0.9)
        return plus(theta, plus(delta, velocity, 0.9), -0.7), velocity

    settings = {"sync_every": 4, "outer_momentum": 0.9}
    compare(run(ranks, heatopt.DiLoCo, make, **settings), slow_momentum(ranks.size, make, 4, combine))
    found = run(ranks, heatopt.DiLoCo, make, **settings, warmup_steps=3, steps=STEPS + 3)
    for values, replica in zip(found, slow_momentum(ranks.size, make, 4, combine, warmup=3), strict=True):
        assert_close(values, replica.values, rtol=1e-9, atol=1e-9)  # the warm-up adds up in another order


def test_a_model_that_is_converted_after_wrapping_has_anchors_of_its_precision(ranks: Ranks) -> None:
    def body(comm: Communicator, convert: bool) -> Values:
        model = net(torch.float32 if convert else torch.float64)
        optimizer = heatopt.DiLoCo(sgd(model), model=model, comm=comm, sync_every=2)
        model.double()
        if not convert:
            model.load_state_dict({name: value.float().double() for name, value in model.state_dict().items()})
        train(optimizer, model, [batch(step, comm.rank) for step in range(4)])
        return tensors_of(model)

    assert_equal(ranks(lambda comm: body(comm, True))[-1], ranks(lambda comm: body(comm, False))[-1])


def test_anchors_that_are_loaded_have_the_models_precision(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, wide = net(torch.float32), net(torch.float64)
        optimizer = heatopt.DiLoCo(sgd(model), comm=comm, sync_every=2)
        train(optimizer, model, [batch(step, comm.rank, dtype=torch.float32) for step in range(3)])
        its_optimizer = heatopt.DiLoCo(sgd(wide), comm=comm, sync_every=2)
        its_optimizer.load_state_dict(optimizer.state_dict())
        anchors = its_optimizer.outer.param_groups[0]["params"]
        assert [anchor.dtype for anchor in anchors] == [torch.float64] * len(anchors)
        assert_equal([anchor.float() for anchor in anchors], optimizer.outer.param_groups[0]["params"])

    ranks(body, min_size=2)


@both
def test_slowmo(ranks: Ranks, make: Make) -> None:
    rate = 0.1 if make is sgd else 0.01

    def combine(before: Values, u: Values, average: Values) -> tuple[Values, Values]:
        u = [0.5 * v + (x - m) / rate for v, x, m in zip(u, before, average, strict=True)]
        return plus(before, u, -0.8 * rate), u

    found = run(ranks, heatopt.SlowMo, make, sync_every=4, slow_lr=0.8)
    compare(found, slow_momentum(ranks.size, make, 4, combine))


def test_slowmo_follows_the_learning_rate(ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[float]:
        model = net()
        optimizer = heatopt.SlowMo(sgd(model), model=model, comm=comm, sync_every=2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        rates = []
        for step in range(4):
            train(optimizer, model, [batch(step, comm.rank)])
            assert optimizer.outer is not None
            rates.append(optimizer.outer.param_groups[0]["inner_lr"])
            scheduler.step()
        return rates

    assert ranks(body, min_size=2)[-1] == [0.1, 0.05, 0.025, 0.0125]


def test_heavy_ball_is_slowmo_with_a_constant_learning_rate(ranks: Ranks) -> None:
    slow = run(ranks, heatopt.SlowMo, sgd, sync_every=3)
    heavy = run(
        ranks,
        heatopt.LocalSGD,
        sgd,
        sync_every=3,
        outer=lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.5),
    )
    assert_close(slow, heavy)


@pytest.mark.parametrize("limit", [None, 0.01])
@both
def test_co2(ranks: Ranks, make: Make, limit: float | None) -> None:
    found = run(ranks, heatopt.CO2, make, sync_every=3, outer_lr=0.9, outer_momentum=0.3, gap=1.5, clip=limit)
    expected = replicas(make, ranks.size)
    start = expected[0].values
    u = zeros(start)
    sent: Values | None = None  # what all ranks did in the period before, on average
    for step in range(STEPS):
        for replica in expected:
            replica.update(step)
        if (step + 1) % 3 == 0:
            done = minus(start, mean([replica.values for replica in expected]))
            if sent is not None:
                u = [0.3 * v + d / 1.5 for v, d in zip(u, sent, strict=True)]
                if limit is not None:
                    u = [v.clamp(-limit, limit) for v in u]
                start = plus(start, u, -0.9)
            for replica in expected:
                replica.values = start
            sent = done
    compare(found, expected)


@pytest.mark.parametrize("steps", [2, 3, 4, 6, 8])
def test_each_update_counts_once_with_co2(ranks: Ranks, steps: int) -> None:
    """A constant gradient, no momentum and no penalty; synchronize() in the middle and at the end."""

    def body(comm: Communicator) -> list[float]:
        weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        plain: dict[str, Any] = {"sync_every": 3, "outer_momentum": 0.0, "gap": 1.0}
        optimizer = heatopt.CO2(torch.optim.SGD([weight], lr=1.0), comm=comm, **plain)
        found = []
        for _ in range(2):
            for _ in range(steps):
                weight.grad = torch.ones_like(weight)
                optimizer.step()
            optimizer.synchronize()
            found.append(-weight.item())
        return found

    assert ranks(body)[-1] == pytest.approx([steps, 2 * steps])


@pytest.mark.parametrize("mix", [0.0, 0.5, "delta"])
@both
def test_streaming_diloco(ranks: Ranks, make: Make, mix: float | str) -> None:
    """Three fragments of the six parameters, each sent every 6 updates and merged 2 updates later."""
    found = run(ranks, heatopt.DiLoCo, make, steps=20, sync_every=6, fragments=3, delay=2, mix=mix)
    expected = replicas(make, ranks.size)
    theta = expected[0].values
    velocity = zeros(theta)
    parts = heatopt.local._fragments.cut([value.numel() for value in theta], 3)
    flight: dict[int, tuple[int, Values, list[Values]]] = {}
    for step in range(1, 21):
        for replica in expected:
            replica.update(step - 1)
        if step in flight:
            part, average, sent = flight.pop(step)
            for i in parts[part]:
                delta = theta[i] - average[i]
                velocity[i] = 0.5 * velocity[i] + delta
                theta[i] = theta[i] - 0.7 * (delta + 0.5 * velocity[i])
                for replica, before in zip(expected, sent, strict=True):
                    values = replica.values
                    share = mix if isinstance(mix, float) else 0.0
                    merged = (1 - share) * theta[i] + share * values[i]
                    values[i] = theta[i] + values[i] - before[i] if mix == "delta" else merged
                    replica.values = values
        if step % 2 == 0:
            everything = [replica.values for replica in expected]
            flight[step + 2] = ((step // 2 - 1) % 3, mean(everything), everything)
    compare(found, expected)


@both
def test_delayed_average_keeps_what_was_done_since(ranks: Ranks, make: Make) -> None:
    found = run(ranks, heatopt.LocalSGD, make, sync_every=3, delay=2, steps=STEPS)
    expected = replicas(make, ranks.size)
    sent: list[Values] = []
    for step in range(1, STEPS + 1):
        for replica in expected:
            replica.update(step - 1)
        if step > 3 and step % 3 == 2:
            average = mean(sent)
            for replica, before in zip(expected, sent, strict=True):
                replica.values = plus(average, minus(replica.values, before))
        if step % 3 == 0:
            sent = [replica.values for replica in expected]
    compare(found, expected)


@pytest.mark.parametrize("method", [heatopt.LocalSGD, heatopt.SlowMo, heatopt.DiLoCo, heatopt.CO2])
def test_defaults_find_the_optimum(ranks: Ranks, method: Method) -> None:
    """Each period alone reaches this rank's optimum; all together must settle in the middle of these."""

    def body(comm: Communicator) -> float:
        weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = method(torch.optim.SGD([weight], lr=0.1), comm=comm)
        for _ in range(4800):
            weight.grad = 2 * (weight.detach() - comm.rank)
            optimizer.step()
        optimizer.synchronize()  # type: ignore[attr-defined]
        return weight.item()

    assert ranks(body, min_size=2) == pytest.approx([(ranks.size - 1) / 2] * ranks.size, abs=0.01)


def test_what_synchronize_has_merged_is_not_merged_again(ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[int]:
        model = net()
        optimizer = heatopt.CO2(sgd(model), model=model, comm=comm, sync_every=3)
        on_their_way = []
        for step in range(9):
            train(optimizer, model, [batch(step, comm.rank)])
            if step == 3:
                optimizer.synchronize()
                assert_ranks_equal(comm, model)
            on_their_way.append(len(optimizer.state_dict()["local"]["flight"]))
        return on_their_way

    # Sent after updates 3, 6 and 9; the first is merged by synchronize() after 4, the second after 9.
    assert ranks(body, min_size=2)[-1] == [0, 0, 1, 0, 0, 1, 1, 1, 1]


def test_muon_inside(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = nn.Linear(4, 3, bias=False, dtype=torch.float64)
        nn.init.ones_(model.weight)
        optimizer = heatopt.DiLoCo(torch.optim.Muon(model.parameters(), lr=0.1), model=model, comm=comm, sync_every=2)
        train(optimizer, model, [batch(step, comm.rank) for step in range(4)])
        assert_ranks_equal(comm, model)

    ranks(body)


@both
def test_moments_are_averaged_in_their_periods(ranks: Ranks, make: Make) -> None:
    def body(comm: Communicator) -> list[tuple[bool, ...]]:
        model = net()
        optimizer = heatopt.LocalSGD(make(model), model=model, comm=comm, sync_every=1, average_moments=(2, 3))
        equal = []
        for step in range(6):
            train(optimizer, model, [batch(step, comm.rank)])
            states = [optimizer.state[p] for p in model.parameters()]
            names = ("momentum_buffer",) if make is sgd else ("exp_avg", "exp_avg_sq")
            own = [[state[name].sum().item() for state in states] for name in names]
            everyone = comm.all_gather_object(own)
            equal.append(tuple(all(found[n] == own[n] for found in everyone) for n in range(len(names))))
        return equal

    first, second = [step % 2 == 1 for step in range(6)], [step % 3 == 2 for step in range(6)]
    expected = [(one,) if make is sgd else (one, two) for one, two in zip(first, second, strict=True)]
    assert ranks(body, min_size=2)[-1] == expected


def test_moments_that_some_ranks_do_not_have_are_left_alone(ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[bool]:
        used, unused = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = heatopt.LocalSGD(sgd_of([used, unused]), comm=comm, sync_every=1, average_moments=(1, 1))
        (used.sum() * (comm.rank + 1)).backward()
        if comm.rank == 0:
            unused.sum().backward()
        optimizer.step()
        assert_ranks_equal(comm, used, unused, optimizer.state[used]["momentum_buffer"])
        return [unused in optimizer.state and "momentum_buffer" in optimizer.state[unused]]

    assert ranks(body, min_size=2)[-1] == [False]


def sgd_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def test_nested_groups_average_more_often(ranks: Ranks) -> None:
    def body(comm: Communicator) -> list[tuple[bool, bool]]:
        pair = comm.split(comm.rank // 2)
        model = net()
        optimizer = heatopt.LocalSGD(sgd(model), model=model, comm=comm, sync_every=4, nested=[(pair, 2)])
        equal = []
        for step in range(4):
            train(optimizer, model, [batch(step, comm.rank)])
            own = [t.sum().item() for t in tensors_of(model)]
            equal.append(
                (all(x == own for x in pair.all_gather_object(own)), all(x == own for x in comm.all_gather_object(own)))
            )
        return equal

    found = ranks(body, min_size=2)[0]
    world = ranks.size == 2
    assert found == [(False, False), (True, world), (False, False), (True, True)]


@pytest.mark.parametrize("feedback", [False, True])
def test_rounding_on_the_wire_is_of_changes_alone(ranks: Ranks, feedback: bool) -> None:
    """A change of 2^-12 is lost beside a weight of 1 in bfloat16, but not by itself."""

    def body(comm: Communicator) -> None:
        weight = nn.Parameter(torch.ones(5))
        optimizer = heatopt.LocalSGD(
            torch.optim.SGD([weight], lr=1.0),
            comm=comm,
            sync_every=1,
            wire_dtype=torch.bfloat16,
            error_feedback=feedback,
        )
        for _ in range(4):
            weight.grad = torch.full((5,), 2.0**-12)
            optimizer.step()
        assert torch.equal(weight.detach(), torch.full((5,), 1 - 4 * 2.0**-12))

    ranks(body)


def test_error_feedback_returns_what_was_rounded_away(ranks: Ranks) -> None:
    def body(comm: Communicator) -> tuple[float, float]:
        errors = []
        for feedback in (False, True):
            weight = nn.Parameter(torch.zeros(1))
            optimizer = heatopt.LocalSGD(
                torch.optim.SGD([weight], lr=1.0),
                comm=comm,
                sync_every=1,
                wire_dtype=torch.bfloat16,
                error_feedback=feedback,
            )
            for _ in range(64):
                weight.grad = torch.full((1,), -(1 + 2.0**-9))  # halfway between two numbers of bfloat16
                optimizer.step()
            errors.append(abs(weight.item() - 64 * (1 + 2.0**-9)))
        return errors[0], errors[1]

    without, with_feedback = ranks(body, min_size=2)[-1]
    assert without == pytest.approx(64 * 2.0**-9)
    assert with_feedback < 0.01


def test_buffers_are_averaged_with_the_parameters(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = nn.BatchNorm1d(4, dtype=torch.float64)
        optimizer = heatopt.LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, comm=comm, sync_every=2)
        own = []
        for step in range(2):
            optimizer.zero_grad()
            model(batch(step, comm.rank)[0]).square().sum().backward()
            own.append(model.running_mean.clone())
            optimizer.step()
        expected = torch.stack(comm.all_gather(own[-1])).sum(0) / comm.size
        assert_close(model.running_mean, expected)
        assert_ranks_equal(comm, model)
        assert model.num_batches_tracked.item() == 2

    ranks(body)


def test_frozen_parameters_do_not_travel_and_do_once_they_learn(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        first = next(model.parameters()).requires_grad_(False)
        optimizer = heatopt.LocalSGD(sgd(model), model=model, comm=comm, sync_every=2)
        before = first.detach().clone()
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        assert torch.equal(first.detach(), before)
        assert_ranks_equal(comm, model)
        first.requires_grad_(True)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2, 3)])
        first.requires_grad_(False)
        first.grad = None
        train(optimizer, model, [batch(3, comm.rank)])
        assert not torch.equal(first.detach(), before)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_co2_begins_a_period_at_the_anchor_with_parameters_that_were_not_sent_before(ranks: Ranks) -> None:
    """What is on its way is without them."""

    def body(comm: Communicator) -> Values:
        model = net()
        last = list(model.parameters())[-1].requires_grad_(False)
        optimizer = heatopt.CO2(sgd(model), model=model, comm=comm, sync_every=2, gap=1.0, outer_momentum=0.0)
        for step in range(8):
            last.requires_grad_(step >= 2)
            train(optimizer, model, [batch(step, comm.rank)])
        return [p.detach() for p in model.parameters()]

    expected = replicas(sgd, ranks.size)
    start = expected[0].values
    sent = zeros(start)
    for step in range(8):
        for replica in expected:
            list(replica.model.parameters())[-1].requires_grad_(step >= 2)
            replica.update(step)
        if step % 2:
            done = minus(mean([replica.values for replica in expected]), start)
            start, sent = plus(start, sent), done
            for replica in expected:
                replica.values = start
    compare(ranks(body, min_size=2), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("method", [heatopt.LocalSGD, heatopt.DiLoCo], ids=["LocalSGD", "DiLoCo"])
def test_dtypes_and_shapes(ranks: Ranks, dtype: torch.dtype, method: Method) -> None:
    def body(comm: Communicator) -> None:
        parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((7,), (), (0, 3), (2, 3))]
        optimizer = method(torch.optim.SGD(parameters, lr=1.0), comm=comm, sync_every=2, delay=1)
        for step in range(5):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, (comm.rank + step) / 8)
            optimizer.step()
        optimizer.synchronize()  # type: ignore[attr-defined]
        assert_ranks_equal(comm, parameters)
        assert all(p.dtype == dtype for p in parameters)
        assert all(torch.isfinite(torch.view_as_real(p) if p.is_complex() else p).all() for p in parameters)

    ranks(body)


def test_replicas_of_several_ranks_train_as_one(ranks: Ranks) -> None:
    """Ranks 0, 1 and 2, 3 average their gradients; the two pairs average their parameters."""

    def body(comm: Communicator) -> None:
        within = comm.split(comm.rank // 2)
        model = net()
        optimizer = heatopt.LocalSGD(sgd(model), model=model, comm=comm, sync_every=3, within=within)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        assert_ranks_equal(within, model, optimizer.torch_optimizer)
        expected = net()
        pair = [r for r in range(comm.size) if r // 2 == comm.rank // 2]
        plain = sgd(expected)
        train(plain, expected, [whole(step, pair) for step in range(2)])
        assert_close(model, expected)
        train(optimizer, model, [batch(2, comm.rank)])
        train(plain, expected, [whole(2, pair)])
        for parameter in expected.parameters():
            comm.allreduce(parameter, "mean")  # each rank's copy of its pair: weighted by the ranks of the pair
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_sharded_states_within_a_replica(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        within = comm.split(comm.rank // 2)
        found = []
        for shard in ("none", "state", "gradients"):
            model = net()
            optimizer = heatopt.LocalSGD(
                adamw(model), model=model, comm=comm, sync_every=3, within=within, shard=shard, warmup_steps=2
            )
            train(optimizer, model, [batch(step, comm.rank) for step in range(8)])
            found.append(tensors_of([model, optimizer.state_dict()["state"]]))
        assert_equal(found[1], found[0])
        assert_equal(found[2], found[0])

    ranks(body)
