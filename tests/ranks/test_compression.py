"""Compressed gradients: what is computed, how it converges, what is sent, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import SimulatedCommunicator, SimulatedWorld, ThreadWorld
from heatopt.errors import HeatoptError, RankMismatchError
from tests.ranks._compression import (
    STEPS,
    TOP,
    Reference,
    Signs,
    at_least,
    batches,
    every_other,
    largest,
    residuals,
    still,
)
from tests.ranks._training import (
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    fill,
    gradients,
    net,
    reference,
    sgd,
    train,
    wrap,
)
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

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


DISTANCES = 2 - torch.linspace(-1, 1, 100, dtype=torch.float64)
"""From the start to the optimum, which is 0."""
RATE = 0.01
ENOUGH = 1200
"""Steps to a millionth of the distance."""


def couplings(size: int) -> list[float]:
    """Of the first element with the others, by rank; their sum is 0."""
    return [0.05 * sign for sign in ([1, 1, -2] if size % 2 else []) + [1, -1] * ((size - 2 * (size % 2)) // 2)]


def quadratic(x: torch.Tensor, coupling: float) -> torch.Tensor:
    """One rank's part of half the square of the distance, which is the mean of them."""
    return 0.5 * x.square().sum() + coupling * (x[0] * x[1:].sum())


def gradient_of_quadratic(x: torch.Tensor, coupling: float) -> torch.Tensor:
    gradient = x.clone()
    gradient[0] += coupling * x[1:].sum()
    gradient[1:] += coupling * x[0]
    return gradient


# Processes, which may be more than cores, have the bits of threads, and need no more steps to show that.
@pytest.mark.parametrize(
    ("feedback", "steps"), [(True, 100 if LAUNCH.launched else ENOUGH), (False, 100)], ids=["feedback", "forgets"]
)
def test_quadratic(ranks: Ranks, feedback: bool, steps: int) -> None:
    """1 % of 100 elements, one, is on each rank that which the couplings make the largest.

    Without feedback the other 99 never move, while the first one shrinks by 1 - lr in each step, as in an exact run:
    its couplings cancel in the mean. With feedback the optimum is reached, where the gradients of all ranks are zero.
    """

    def body(comm: Communicator) -> torch.Tensor:
        x = nn.Parameter(DISTANCES.clone())
        policy = heatopt.TopK(0.01, error_feedback=feedback)
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([x], lr=RATE), comm=comm, compression=policy)
        for _ in range(steps):
            optimizer.zero_grad()
            quadratic(x, couplings(comm.size)[comm.rank]).backward()
            optimizer.step()
        assert_ranks_equal(comm, x)
        return x.detach()

    found = ranks(body, min_size=2)[-1]
    x, source = DISTANCES.clone(), Reference(largest(0.01), feedback)
    for _ in range(steps):
        (average,) = source.average([[gradient_of_quadratic(x, each)] for each in couplings(ranks.size)])
        assert average is not None
        x.add_(average, alpha=-RATE)
    assert_equal(found, x)
    if feedback:
        assert steps < ENOUGH or x.norm() < 1e-6 * DISTANCES.norm()
    else:
        assert_equal(x[1:], DISTANCES[1:])
        assert x[0].item() == pytest.approx(DISTANCES[0].item() * (1 - RATE) ** steps, rel=1e-12)


# What is sent


def set_random_gradients(model: nn.Module, rank: int) -> None:
    for p in model.parameters():
        given = torch.randn(p.shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        p.grad = given.to(p.dtype)


def messages(model: nn.Module, comm: Communicator, policy: heatopt.Compression) -> list[int]:
    """Bytes that each rank hands over for each of the others, by bucket, of which each parameter has one.

    k (4 + itemsize), and one. Where ranks do not know k it is in the message, 8 bytes, which is as long as the longest,
    and the length travels first, in 8 bytes.
    """
    found = []
    for p in model.parameters():
        assert p.grad is not None
        if isinstance(policy, heatopt.TopK):
            found.append(math.ceil(policy.ratio * p.numel()) * (4 + p.itemsize) + 1)
        else:
            counts = comm.all_gather_object(int((p.grad.abs() >= 2.0).sum()))
            found += [8, max(counts) * (4 + p.itemsize) + 8 + 1]
    return found


ONE_PER_CENT = [heatopt.TopK(0.01), heatopt.Threshold(2.0)]


@pytest.mark.parametrize("policy", ONE_PER_CENT, ids=repr)
def test_messages(policy: heatopt.Compression) -> None:
    """One per bucket, or two, and no other but headers."""
    world = ThreadWorld(3)

    def body(comm: Communicator) -> None:
        model = nn.ParameterList([torch.zeros(20_000), torch.zeros(30, dtype=torch.float64)])
        optimizer = wrap(comm, sgd, model, compression=policy, bucket_mb=8, blocking=False)
        set_random_gradients(model, comm.rank)
        expected = messages(model, comm, policy)
        large = [int((p.grad.abs() >= 2.0).sum()) for p in model.parameters() if p.grad is not None]
        before = len([event for event in list(world.events) if event.rank == comm.rank])
        optimizer.step()
        events = [event for event in list(world.events) if event.rank == comm.rank][before:]
        assert {event.kind for event in events} == {"all_gather", "words"}
        assert sorted(event.bytes for event in events if event.kind == "all_gather") == sorted(expected)
        if isinstance(policy, heatopt.TopK):
            assert optimizer.report()["sent_bytes"] == sum(expected)
        else:
            assert optimizer.report()["sent_bytes"] == large[0] * (4 + 4) + large[1] * (4 + 8) + 2 * (8 + 1)

    world.run(body)


@pytest.mark.parametrize("policy", ONE_PER_CENT, ids=repr)
def test_bytes_between_nodes(policy: heatopt.Compression) -> None:
    """Each of two nodes receives three messages of four ranks, whoever has memory in common; headers are within 3 %."""
    world = SimulatedWorld(4, ranks_per_node=2)
    steps = 2

    def body(comm: SimulatedCommunicator) -> tuple[float, int]:
        model = nn.ParameterList([torch.zeros(300, 200), torch.zeros(70_000, dtype=torch.float64), torch.zeros(3)])
        optimizer = wrap(comm, still, model, compression=policy, blocking=True)
        comm.barrier()
        start, expected = comm.now, 0
        for _ in range(steps):
            set_random_gradients(model, comm.rank)
            expected = sum(messages(model, comm, policy))
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict() | {"residuals": {}})  # the same again
        return start, expected

    start, expected = world.run(body)[-1]
    passages = [passage for passage in world.trace if passage.start >= start]
    nodes, received = 2, (world.size - 1) * expected
    tensors = sum(passage.sent for passage in passages if passage.kind == "all_gather")
    assert tensors == nodes * steps * received
    words = sum(passage.sent for passage in passages if passage.kind == "words")
    assert tensors + words == pytest.approx(nodes * steps * received, rel=0.03)
    assert {passage.kind for passage in passages} <= {"all_gather", "words", "objects"}


def test_ties_go_to_the_lowest_index() -> None:
    indices, values = heatopt.TopK(0.5).compress(torch.tensor([1.0, -2.0, 2.0, 1.0, -1.0, 0.0, 1.0]))
    assert sorted(indices.tolist()) == [0, 1, 2, 3]
    assert sorted(values.tolist()) == [-2, 1, 1, 2]
    assert heatopt.TopK(0.5).compress(torch.zeros(0))[0].tolist() == []
    assert heatopt.TopK(0.3).count(10) == 3
    assert heatopt.TopK(0.31).count(10) == 4


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

    ranks(body, min_size=2)


def test_a_policy_that_fails_takes_its_rank_out(ranks: Ranks) -> None:
    """Other ranks may have gone on: whoever catches the error cannot."""

    def body(comm: Communicator) -> None:
        own, model = comm.split(0), net()  # its own, since it becomes unusable
        optimizer = wrap(own, sgd, model, compression=Crooked())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=r"compress\(\) must return indices .* 2 of 3; it returned"):
            optimizer.step()
        with pytest.raises(HeatoptError, match=rf"rank {comm.rank} was interrupted in step\(\) of SGD"):
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
