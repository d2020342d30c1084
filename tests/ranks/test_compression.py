"""Compressed gradients: what is sent, what stays behind, and that nothing of it is lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import ThreadWorld
from heatopt.errors import HeatoptError, RankMismatchError
from tests.ranks._compression import Reference, Signs, at_least, every_other, gradients_of, largest
from tests.ranks._training import (
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    fill,
    gradients,
    loss_of,
    net,
    reference,
    sgd,
    train,
    words,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

STEPS = 5
TOP = heatopt.TopK(0.2)

POLICIES: dict[str, tuple[Callable[[], heatopt.Compression], Callable[[], Reference]]] = {
    "top": (lambda: heatopt.TopK(0.2), lambda: Reference(largest(0.2))),
    "one": (lambda: heatopt.TopK(1e-6), lambda: Reference(largest(1e-6))),
    "top, forgets": (lambda: heatopt.TopK(0.2, error_feedback=False), lambda: Reference(largest(0.2), feedback=False)),
    "threshold": (lambda: heatopt.Threshold(0.02), lambda: Reference(at_least(0.02))),
    "threshold, forgets": (
        lambda: heatopt.Threshold(0.02, error_feedback=False),
        lambda: Reference(at_least(0.02), feedback=False),
    ),
    "own": (Signs, lambda: Reference(every_other, signs=True)),
}
MANNERS: dict[str, dict[str, Any]] = {
    "blocking": {"blocking": True},
    "overlapped": {"blocking": False},
    "one bucket": {"bucket_mb": 8, "shard": "state"},
    "reproducible": {"reproducible": True, "fuse": True},
}


def residuals(optimizer: heatopt.DataParallelOptimizer) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = optimizer.state_dict().get("residuals", {})
    return found


def batches(comm: Communicator, steps: range = range(STEPS)) -> list[Any]:
    return [batch(step, comm.rank) for step in steps]


# What is computed


@pytest.mark.parametrize("name", POLICIES)
def test_training_is_that_of_the_definition(ranks: Ranks, name: str) -> None:
    """Parameters, and each rank's residuals; to the same bits however gradients travel."""
    policy, expect = POLICIES[name]

    def body(comm: Communicator) -> None:
        expected, reference = net(), expect()
        reference.train(expected, sgd(expected), comm.size, range(STEPS))
        first: nn.Module | None = None
        for manner in MANNERS.values():
            model = net()
            optimizer = wrap(comm, sgd, model, compression=policy(), **manner)
            train(optimizer, model, batches(comm))
            assert_close(model, expected)
            assert_close(residuals(optimizer), reference.residuals_of(comm.rank, model))
            assert_ranks_equal(comm, model)
            first = first or model
            assert_equal(model, first)
            del optimizer

    ranks(body, min_size=2)


def test_one_process_has_nothing_to_compress() -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model, compression=heatopt.TopK(0.01))
        train(optimizer, model, [batch(0, 0)])
        reference(sgd, expected, 1, 1)
        assert_equal(model, expected)
        assert residuals(optimizer) == {}

    ThreadWorld(1).run(body)


@pytest.mark.parametrize("policy", [heatopt.TopK(1.0), heatopt.Threshold(0.0)], ids=repr)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64], ids=str
)
def test_everything_is_the_exact_mean(ranks: Ranks, dtype: torch.dtype, policy: heatopt.Compression) -> None:
    """Bit for bit, of odd, empty and 0-dimensional parameters, -0 included, and on several nodes."""
    shapes = [(7, 3), (), (0, 2), (1,), (130,)]

    def body(comm: Communicator) -> None:
        results = []
        for compression in (None, policy):
            model = fill(nn.ParameterList([torch.zeros(shape, dtype=dtype) for shape in shapes]))
            optimizer = wrap(comm, lambda m: torch.optim.SGD(m.parameters(), lr=0.5), model, compression=compression)
            for step in range(3):
                source = torch.Generator().manual_seed(10 * step + comm.rank)
                for p in model.parameters():
                    real = torch.randn(p.shape, generator=source, dtype=torch.float64)
                    p.grad = (real * (torch.rand(p.shape, generator=source) > 0.3)).mul(-1).to(dtype)
                optimizer.step()
            results.append([model, gradients(model)])
            assert not any(found.count_nonzero() for found in residuals(optimizer).values())
            del optimizer
        assert_equal(*results)
        assert_ranks_equal(comm, *results[1])

    ranks(body)
    if dtype is torch.float32 and ranks.size == 4:
        for shared_memory in (True, False):
            ThreadWorld(4, ranks_per_node=2, shared_memory=shared_memory).run(body)


def test_half_types_keep_what_rounding_takes(ranks: Ranks) -> None:
    """One element of 1 and one of 2^-10 a step: in bfloat16 their sum is 1, and the small ones are not lost."""

    def body(comm: Communicator) -> None:
        model = nn.ParameterList([torch.zeros(3, dtype=torch.bfloat16)])
        optimizer = wrap(comm, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), model, compression=heatopt.TopK(0.3))
        given = torch.tensor([1 + 2.0**-7, 2.0**-10, 0.0], dtype=torch.bfloat16)
        for _ in range(2):
            model[0].grad = given.clone()
            optimizer.step()
        assert_equal(residuals(optimizer), [torch.tensor([0.0, 2.0**-9, 0.0])])
        model[0].grad = torch.tensor([2.0**-10, 1.0, 0.0], dtype=torch.bfloat16)
        optimizer.step()  # 1 + 2^-9 is sent as 1
        assert_equal(residuals(optimizer), [torch.tensor([2.0**-10, 2.0**-9, 0.0])])
        assert_equal(model[0].grad, torch.tensor([0.0, 1.0, 0.0], dtype=torch.bfloat16))

    ranks(body, min_size=2)


def test_complex_elements_travel_whole(ranks: Ranks) -> None:
    """The largest absolute values, of real and imaginary part together."""

    def given(step: int, rank: int) -> torch.Tensor:
        source = torch.Generator().manual_seed(10 * step + rank)
        return torch.randn(5, 3, generator=source, dtype=torch.complex128)

    def body(comm: Communicator) -> None:
        model, source = nn.ParameterList([torch.zeros(5, 3, dtype=torch.complex128)]), Reference(largest(0.2))
        optimizer = wrap(comm, still, model, compression=TOP)
        for step in range(STEPS):
            (average,) = source.average([[given(step, rank)] for rank in range(comm.size)])
            model[0].grad = given(step, comm.rank)
            optimizer.step()
            assert_close(model[0].grad, average)
            assert_close(residuals(optimizer), source.residuals_of(comm.rank, model))

    ranks(body, min_size=2)


# Convergence


@pytest.mark.parametrize("feedback", [True, False])
def test_quadratic(ranks: Ranks, feedback: bool) -> None:
    """1 % of 100 elements: one, and on each rank it is always that which cancels in the mean.

    Without feedback the other 99 never move. With it the distance falls to a hundredth.
    """
    target = torch.linspace(-1, 1, 100, dtype=torch.float64)

    def body(comm: Communicator) -> None:
        signs = [0.0 if rank == comm.size - 1 and comm.size % 2 else (-1.0) ** rank for rank in range(comm.size)]
        pulls = [torch.zeros(100, dtype=torch.float64) for _ in signs]
        for pull, sign in zip(pulls, signs, strict=True):
            pull[0] = 8 * sign
        x = nn.Parameter(torch.full((100,), 2.0, dtype=torch.float64))
        start, expected = x.detach().clone(), x.detach().clone()
        policy = heatopt.TopK(0.01, error_feedback=feedback)
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([x], lr=0.01), comm=comm, compression=policy)
        source = Reference(largest(0.01), feedback)
        for step in range(500):
            optimizer.zero_grad()
            (0.5 * (x - target).square().sum() + (x * pulls[comm.rank]).sum()).backward()
            optimizer.step()
            if step < 50:
                (average,) = source.average([[expected - target + pull] for pull in pulls])
                assert average is not None
                expected -= 0.01 * average
                assert_close(x, expected)
        distance = float((x.detach() - target).norm() / (start - target).norm())
        if feedback:
            assert distance < 0.01
        elif comm.size % 2 == 0:  # with an odd number the last rank's own largest element moves
            assert_equal(x[1:], start[1:])
            assert abs(x[0] - target[0]) < 0.1
        assert_ranks_equal(comm, x)

    ranks(body, min_size=2)


# What is sent


@pytest.mark.parametrize("policy", [heatopt.TopK(0.01), heatopt.Threshold(2.0)], ids=repr)
def test_bytes_on_the_wire(policy: heatopt.Compression) -> None:
    """One message per bucket: k (4 + itemsize) bytes, and one for each parameter. No other but headers.

    Where ranks do not know k it is in the message, 8 bytes for each parameter, and the length travels first.
    """
    world = ThreadWorld(3)

    def body(comm: Communicator) -> None:
        model = nn.ParameterList([torch.zeros(20_000), torch.zeros(30, dtype=torch.float64)])
        optimizer = wrap(comm, sgd, model, compression=policy, bucket_mb=8, blocking=False)
        for p in model.parameters():
            given = torch.randn(p.shape, generator=torch.Generator().manual_seed(comm.rank), dtype=torch.float64)
            p.grad = given.to(p.dtype)
        large = [int((p.grad.abs() >= 2.0).sum()) for p in model.parameters() if p.grad is not None]
        before = len([event for event in list(world.events) if event.rank == comm.rank])
        optimizer.step()
        events = [event for event in list(world.events) if event.rank == comm.rank][before:]
        assert {event.kind for event in events} == {"all_gather", "words"}
        found = [event.bytes for event in events if event.kind == "all_gather"]
        if isinstance(policy, heatopt.TopK):
            assert found == [1 * (4 + 8) + 1, 200 * (4 + 4) + 1]
            assert optimizer.report()["sent_bytes"] == sum(found)
        else:
            longest = [max(column) for column in zip(*comm.all_gather_object(large), strict=True)]
            assert sorted(found) == sorted([8, 8, longest[0] * (4 + 4) + 8 + 1, longest[1] * (4 + 8) + 8 + 1])
            assert optimizer.report()["sent_bytes"] == large[0] * (4 + 4) + large[1] * (4 + 8) + 2 * (8 + 1)

    world.run(body)


def test_ties_go_to_the_lowest_index() -> None:
    indices, values = heatopt.TopK(0.5).compress(torch.tensor([1.0, -2.0, 2.0, 1.0, -1.0, 0.0, 1.0]))
    assert sorted(indices.tolist()) == [0, 1, 2, 3]
    assert sorted(values.tolist()) == [-2, 1, 1, 2]
    assert heatopt.TopK(0.5).compress(torch.zeros(0))[0].tolist() == []
    assert heatopt.TopK(0.3).count(10) == 3
    assert heatopt.TopK(0.31).count(10) == 4


# Nothing is lost


def lacking(optimizer: heatopt.DataParallelOptimizer, comm: Communicator) -> list[torch.Tensor]:
    """The mean of the residuals over all ranks."""
    return [comm.allreduce(residual.clone(), "mean") for residual in residuals(optimizer).values()]


def use_average(optimizer: heatopt.DataParallelOptimizer, model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.total += p.grad  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()


def micro_batches(optimizer: heatopt.DataParallelOptimizer, model: nn.Module, comm: Communicator) -> None:
    """Two for each update; whether the first synchronises is the optimizer's affair."""
    for step in range(4):
        loss_of(model, batch(step, comm.rank)).backward()
        if step % 2:
            use_average(optimizer, model)


def weighted(optimizer: heatopt.DataParallelOptimizer, model: nn.Module, comm: Communicator) -> None:
    for step in range(3):
        with optimizer.weight((comm.rank + step) % 3):
            loss_of(model, batch(step, comm.rank)).backward()
        use_average(optimizer, model)


def weighted_twice(optimizer: heatopt.DataParallelOptimizer, model: nn.Module, comm: Communicator) -> None:
    """Ranks weigh differently within each of two micro-batches; the first is not synchronised."""
    for step in range(4):
        with optimizer.weight((comm.rank + step) % 3), nullcontext() if step % 2 else optimizer.no_sync():
            loss_of(model, batch(step, comm.rank)).backward()
        if step % 2:
            use_average(optimizer, model)
    with optimizer.weight(1):
        loss_of(model, batch(0, comm.rank)).backward()
    if residuals(optimizer):
        with pytest.raises(HeatoptError, match="put all micro-batches but the last into"), optimizer.weight(1):
            pass
    optimizer.zero_grad()


def joined(optimizer: heatopt.DataParallelOptimizer, model: nn.Module, comm: Communicator) -> None:
    with optimizer.join():
        for step in range(2 if comm.rank else 4):
            loss_of(model, batch(step, comm.rank)).backward()
            use_average(optimizer, model)


MEANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "accumulated": (micro_batches, {"accumulation_steps": 2}),
    "weighted": (weighted, {}),
    "weighted twice": (weighted_twice, {}),
    "twice": (micro_batches, {}),
    "joined": (joined, {}),
}


@pytest.mark.parametrize("name", MEANS)
def test_averages_and_residuals_add_up(ranks: Ranks, name: str) -> None:
    """All averages, and what is still to be sent, are together all exact means."""
    loop, options = MEANS[name]

    def body(comm: Communicator) -> None:
        totals = []
        for compression in (None, TOP):
            model = net()
            for p in model.parameters():
                p.total = torch.zeros_like(p, requires_grad=False)  # type: ignore[attr-defined]
            optimizer = wrap(comm, still, model, compression=compression, **options)
            loop(optimizer, model, comm)
            total = [p.total for p in model.parameters()]  # type: ignore[attr-defined]
            if compression is not None:
                total = [a + b for a, b in zip(total, lacking(optimizer, comm), strict=True)]
            totals.append([comm.broadcast(t) for t in total])
            del optimizer
        assert_close(*totals)

    ranks(body, min_size=2)


def still(model: nn.Module) -> torch.optim.Optimizer:
    """Gradients do not depend on what was sent before."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def test_accumulation_compresses_once(ranks: Ranks) -> None:
    """The sum of the micro-batches, not each of them."""

    def body(comm: Communicator) -> None:
        model, source = net(), Reference(largest(0.2))
        optimizer = wrap(comm, sgd, model, compression=TOP, accumulation_steps=2)
        found = [
            [a + b for a, b in zip(gradients_of(model, 0, rank), gradients_of(model, 1, rank), strict=True)]
            for rank in range(comm.size)
        ]
        for step in range(2):
            loss_of(model, batch(step, comm.rank)).backward()
        averages = source.average(found)
        assert_close(gradients(model), averages)
        norm = optimizer.clip_grad_norm_(1e-3)
        assert_close(norm, torch.cat([a.view(-1) for a in averages if a is not None]).norm())
        assert_close(gradients(model), [a * 1e-3 / (norm + 1e-6) for a in averages if a is not None])
        optimizer.step()
        assert_close(residuals(optimizer), source.residuals_of(comm.rank, model))  # of what was there before clipping

    ranks(body, min_size=2)


# Gradients that are missing, sparse, or no numbers


def test_missing_and_frozen_gradients(ranks: Ranks) -> None:
    """A gradient that no rank has is None, and its residual waits; a rank without one sends its residual."""

    def body(comm: Communicator) -> None:
        model = nn.ParameterList([torch.zeros(4), torch.zeros(4)])
        optimizer = wrap(comm, still, model, compression=heatopt.TopK(0.25), bucket_mb=8)  # one bucket for both
        first, second = model
        first.grad = torch.tensor([4.0, 3.0, 2.0, 1.0])
        second.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
        optimizer.step()
        optimizer.zero_grad()
        second.requires_grad_(False)
        if comm.rank == 0:
            first.grad = torch.tensor([0.0, 0.0, 0.5, 0.0])
        optimizer.step()
        assert second.grad is None
        assert_equal(first.grad, torch.tensor([0.0, 3.0, 0.0, 0.0]))
        found = residuals(optimizer)
        assert_equal(found["0"], torch.tensor([0.0, 0.0, 2.0 + 0.5 * (comm.rank == 0), 1.0]))
        assert_equal(found["1"], torch.tensor([1.0, 2.0, 3.0, 0.0]))
        optimizer.zero_grad()
        second.requires_grad_(True)
        second.grad = torch.zeros(4)
        optimizer.step()
        assert first.grad is None
        assert_equal(second.grad, torch.tensor([0.0, 0.0, 3.0, 0.0]))

    ranks(body, min_size=2)


def test_sparse_gradients_are_exact(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = words(), words()
        optimizer = wrap(comm, still, model, compression=TOP)
        exact = wrap(comm, still, expected)
        for optimizer_, model_ in ((optimizer, model), (exact, expected)):
            loss_of(model_, batch(0, comm.rank)).backward()
            optimizer_.synchronize()
        assert_equal(gradients(model), gradients(expected))
        assert residuals(optimizer) == {}

    ranks(body, min_size=2)


@pytest.mark.parametrize("policy", [TOP, heatopt.Threshold(20.0)], ids=repr)
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_overflow_leaves_no_trace(ranks: Ranks, number: float, policy: heatopt.Compression) -> None:
    """All ranks skip the step that one rank spoils; what is not sent is as before, in the unit of the new scale."""

    def body(comm: Communicator) -> None:
        results = []
        for spoil in (False, True):
            model = net(torch.float32)
            optimizer = wrap(comm, sgd, model, compression=copy.copy(policy))
            scaler = heatopt.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
            for step in range(3):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, batch(step, comm.rank, dtype=torch.float32))).backward()
                scaler.step(optimizer)
                scaler.update()
            assert scaler.get_scale() == 2048
            before = {name: residual.clone() for name, residual in residuals(optimizer).items()}
            assert any(residual.count_nonzero() for residual in before.values())
            if spoil:
                optimizer.zero_grad()
                scaler.scale(loss_of(model, batch(3, comm.rank, dtype=torch.float32))).backward()
                if comm.rank == comm.size - 1:
                    next(model.parameters()).grad = torch.full((6, 4), number)
                scaler.step(optimizer)
                scaler.update()
                assert scaler.get_scale() == 1024
                assert_equal(residuals(optimizer), {name: residual / 2 for name, residual in before.items()})
            results.append(model)
            del optimizer
        assert_equal(*results)

    ranks(body, min_size=2)


def test_scale_of_the_loss_changes_nothing(ranks: Ranks) -> None:
    """Scales are powers of 2, so the bits are those of training without them, while the scale grows."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model, compression=TOP)
        scaler = heatopt.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        for data in batches(comm):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, data)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 8.0 * 2**STEPS
        train(wrap(comm, sgd, expected, compression=TOP), expected, batches(comm))
        assert_equal(model, expected)
        assert "_compressing" not in pickle.loads(pickle.dumps(scaler)).__dict__

    ranks(body, min_size=2)


def test_no_number_is_kept(ranks: Ranks) -> None:
    """Without a scaler the update has it, as without compression; the residual of that parameter stays as it was."""

    def body(comm: Communicator) -> None:
        model = nn.ParameterList([torch.zeros(4)])
        optimizer = wrap(comm, still, model, compression=heatopt.TopK(0.25))
        model[0].grad = torch.tensor([4.0, 3.0, 2.0, 1.0])
        optimizer.step()
        model[0].grad = torch.tensor([0.0, float("nan"), float("inf"), -float("inf")])
        optimizer.step()
        assert not model[0].grad.isfinite().all()
        assert_equal(residuals(optimizer), [torch.tensor([0.0, 3.0, 2.0, 1.0])])

    ranks(body, min_size=2)


def test_gradients_that_are_cleared_leave_no_trace(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, adamw, model, compression=TOP)
        for step in range(STEPS):
            loss_of(model, batch(step + 100, comm.rank)).backward()
            optimizer.zero_grad()
            train(optimizer, model, [batch(step, comm.rank)])
        train(wrap(comm, adamw, expected, compression=TOP), expected, batches(comm))
        assert_equal(model, expected)

    ranks(body, min_size=2)


# State dicts, checkpoints, copies


@pytest.mark.parametrize("shard", ["none", "state"])
@pytest.mark.parametrize("how", ["state_dict", "checkpoint", "deepcopy"])
def test_training_goes_on_with_the_same_bits(ranks: Ranks, tmp_path: Path, how: str, shard: str) -> None:
    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(str(tmp_path))
        model, again = net(), net(seed=1)
        optimizer = wrap(comm, adamw, model, compression=TOP, shard=shard)
        train(optimizer, model, batches(comm))
        other = None if how == "deepcopy" else wrap(comm, adamw, again, compression=TOP, shard=shard)
        if how == "state_dict":
            again.load_state_dict(model.state_dict())
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif how == "checkpoint":
            heatopt.save(f"{path}/c", model=model, optimizer=optimizer)
            heatopt.load(f"{path}/c", model=again, optimizer=other)
        else:
            again, other = copy.deepcopy((model, optimizer))
        assert_equal(residuals(other), residuals(optimizer))
        assert any(residual.count_nonzero() for residual in residuals(other).values())
        for pair in ((optimizer, model), (other, again)):
            train(*pair, batches(comm, range(STEPS, 2 * STEPS)))
        assert_equal(again, model)
        assert_equal(residuals(other), residuals(optimizer))
        assert_ranks_equal(comm, again)

    ranks(body, min_size=2)


@pytest.mark.parametrize("keeps_gradients", [False, True])
def test_copies_between_backward_and_step(ranks: Ranks, keeps_gradients: bool) -> None:
    """torch copies no gradient of an nn.Parameter: what was sent of it is not used there, so it still waits."""

    def body(comm: Communicator) -> None:
        start = torch.zeros(7, dtype=torch.float64, requires_grad=True)
        if not keeps_gradients:
            start = nn.Parameter(start.detach())
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([start], lr=1.0), comm=comm, compression=TOP)
        total = torch.zeros(7, dtype=torch.float64)
        for step in range(4):
            optimizer.zero_grad()
            given = [torch.arange(7.0, dtype=torch.float64).roll(3 * step + rank) for rank in range(comm.size)]
            (start * given[comm.rank]).sum().backward()
            if step == 2:
                start, optimizer = copy.deepcopy((start, optimizer))
            if start.grad is not None:
                total += sum(given) / comm.size
            optimizer.step()
        (own,) = residuals(optimizer).values()
        assert_close([sum(comm.all_gather_object(own)) / comm.size - start.detach()], [total])

    ranks(body, min_size=2)


def test_plain_optimizers_take_the_state_dict(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, plain = net(), net()
        optimizer = wrap(comm, adamw, model, compression=TOP)
        train(optimizer, model, batches(comm))
        state_dict = optimizer.state_dict()
        assert set(state_dict["residuals"]) == {name for name, _ in model.named_parameters()}
        adamw(plain).load_state_dict(state_dict)
        optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "residuals"})
        assert not any(residual.count_nonzero() for residual in residuals(optimizer).values())

    ranks(body, min_size=2)


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_checkpoint_at_another_number_of_ranks(tmp_path: Path, readers: int) -> None:
    """What the averages lack is the mean of the residuals: it stays what it was."""

    def write(comm: Communicator) -> list[torch.Tensor]:
        model = net()
        optimizer = wrap(comm, adamw, model, compression=TOP, shard="state")
        train(optimizer, model, batches(comm))
        heatopt.save(tmp_path / "c", model=model, optimizer=optimizer)
        return lacking(optimizer, comm)

    expected = ThreadWorld(3).run(write)[0]

    def read(comm: Communicator, shard: str) -> None:
        model = net(seed=1)
        optimizer = wrap(comm, adamw, model, compression=TOP, shard=shard)
        heatopt.load(tmp_path / "c", model=model, optimizer=optimizer)
        if comm.size > 1:
            assert_close(list(residuals(optimizer).values()), expected)
        train(optimizer, model, batches(comm))

    for shard in ("none", "state"):
        ThreadWorld(readers).run(lambda comm, shard=shard: read(comm, shard))


@pytest.mark.parametrize("readers", [2, 3, 4])
def test_checkpoint_of_a_layer_that_was_frozen(tmp_path: Path, readers: int) -> None:
    """A rank may have sent all of it and another one not; it is frozen from the start where training goes on."""

    def freeze(model: nn.Module) -> None:
        for parameter in list(model.parameters())[:2]:
            parameter.requires_grad_(False)

    def write(comm: Communicator) -> list[torch.Tensor]:
        model = net()
        optimizer = wrap(comm, sgd, model, compression=heatopt.Threshold(0.5))
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * comm.rank)  # of which nothing waits on rank 0
        optimizer.step()
        freeze(model)
        heatopt.save(tmp_path / "c", model=model, optimizer=optimizer)
        return mean_of_all(comm, optimizer, model)

    def mean_of_all(comm: Communicator, optimizer: Any, model: nn.Module) -> list[torch.Tensor]:
        found = residuals(optimizer)
        own = [found.get(name, torch.zeros_like(p.detach())) for name, p in model.named_parameters()]
        return [torch.stack(each).mean(0) for each in zip(*comm.all_gather_object(own), strict=True)]

    expected = ThreadWorld(3).run(write)[0]
    assert expected[0].count_nonzero()

    def read(comm: Communicator) -> None:
        model = net(seed=1)
        freeze(model)
        optimizer = wrap(comm, sgd, model, compression=heatopt.Threshold(0.5))
        heatopt.load(tmp_path / "c", model=model, optimizer=optimizer)
        assert_close(mean_of_all(comm, optimizer, model), expected)

    ThreadWorld(readers).run(read)


# What is refused


class Crooked(heatopt.Compression):
    """A policy that does not keep its word."""

    def count(self, numel: int) -> int:
        return 2

    def compress(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, dtype=torch.int64), flat[:1]


def test_refusals(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        with pytest.raises(RankMismatchError, match="setting compression: rank 0 has TopK"):
            wrap(comm, sgd, model, compression=heatopt.TopK(0.1 * (comm.rank + 1)))
        optimizer = wrap(comm, sgd, model, compression=TOP)
        saved = optimizer.state_dict()
        with pytest.raises(ValueError, match=r"a residual of 'weight', which is none of the parameters"):
            optimizer.load_state_dict({**saved, "residuals": {"weight": torch.zeros(2)}})
        with pytest.raises(ValueError, match=r"the residual of '0.bias' has shape \(2,\), but the parameter \(6,\)"):
            optimizer.load_state_dict({**saved, "residuals": {"0.bias": torch.zeros(2)}})
        optimizer.step()
        other = net()
        optimizer = wrap(comm, sgd, other, compression=Crooked())
        for p in other.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=r"compress\(\) must return indices .* 2 of 3; it returned"):
            optimizer.step()

    ranks(body, min_size=2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: heatopt.TopK(0.0), ValueError, "ratio must be a number > 0 and <= 1, got 0.0"),
        (lambda: heatopt.TopK(1.5), ValueError, "ratio must be a number > 0 and <= 1, got 1.5"),
        (lambda: heatopt.TopK(float("nan")), ValueError, "ratio must be a number > 0 and <= 1, got nan"),
        (lambda: heatopt.TopK("1%"), TypeError, "ratio must be a number, got '1%'"),
        (lambda: heatopt.TopK(True), TypeError, "ratio must be a number, got True"),
        (lambda: heatopt.TopK(0.1, error_feedback=1), TypeError, "error_feedback must be True or False, got 1"),
        (lambda: heatopt.Threshold(-1.0), ValueError, "value must be a finite number >= 0, got -1.0"),
        (lambda: heatopt.Threshold(float("inf")), ValueError, "value must be a finite number >= 0, got inf"),
        (lambda: heatopt.Threshold(None), TypeError, "value must be a number, got None"),
        (lambda: made(compression=0.01), TypeError, "compression must be a heatopt.Compression, .* got 0.01"),
        (lambda: made(compression=heatopt.TopK), TypeError, "got the class TopK: make an instance of it"),
        (lambda: made(compression=TOP, shard="gradients"), ValueError, "use shard='state' with compression"),
        (
            lambda: made(compression=TOP, wire_dtype=torch.bfloat16),
            ValueError,
            "choose one of them, or round the values",
        ),
        (lambda: made(torch.optim.LBFGS, compression=TOP), ValueError, "compression is not for LBFGS: its line search"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def made(kind: Any = torch.optim.SGD, **options: Any) -> heatopt.DataParallelOptimizer:
    return heatopt.DataParallelOptimizer(kind(net().parameters(), lr=0.1), **options)
