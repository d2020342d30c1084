"""Ranks with unequal numbers of samples: ``weight(n)`` and ``step(weight=n)`` give the mean over all samples.

The reference is one process with all samples in one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import ThreadWorld
from heatopt.sharding import check_shardable
from tests.ranks._training import (
    ALGORITHMS,
    TINY,
    Algorithm,
    Batch,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    fill,
    gradients,
    loss_of,
    net,
    sgd,
    words,
    wrap,
)
from tests.ranks._weights import COUNTS, SHARDS, own, rows_of, weighted_backward, whole
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

MANNERS = {
    "blocking": {"blocking": True},
    "overlapped": {"blocking": False},
    "one bucket": {"bucket_mb": 8},
    "reproducible": {"reproducible": True},
    "fused": {"fuse": True},
    "wire": {"wire_dtype": torch.bfloat16},
}


def shards_of(algorithm: Algorithm) -> list[str]:
    found = ["none"]
    for shard in SHARDS[1:]:
        try:
            check_shardable(algorithm.optimizer(algorithm.model()), shard)
        except ValueError:
            continue
        found.append(shard)
    return found


def update(optimizer: Any, algorithm: Algorithm, model: nn.Module, data: Batch) -> Any:
    """One step with the weight of the batch; returns what ``step`` does. An empty batch has a loss of NaN."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, data)
        with optimizer.weight(len(data[0])):
            loss.backward()
        return loss.detach()

    if algorithm.closure:
        return optimizer.step(closure)
    closure()
    return optimizer.step()


@pytest.mark.parametrize(
    ("algorithm", "shard"), [pytest.param(a, s, id=f"{a.name}-{s}") for a in ALGORITHMS for s in shards_of(a)]
)
def test_unequal_batches_equal_one_process(ranks: Ranks, algorithm: Algorithm, shard: str) -> None:
    def body(comm: Communicator) -> None:
        model, expected = algorithm.model(), algorithm.model()
        optimizer: Any = wrap(comm, algorithm.optimizer, model, shard=shard)
        plain = algorithm.optimizer(expected)
        for step in range(3):
            ours = update(optimizer, algorithm, model, own(step, comm.rank))
            theirs = algorithm.update(plain, expected, whole(step, comm.size))
            if algorithm.closure:
                assert float(ours) == pytest.approx(theirs, rel=1e-9, nan_ok=True)
        assert_close(model, expected)
        assert_close(optimizer.state_dict()["state"], plain.state_dict()["state"], rtol=1e-8)
        assert_ranks_equal(comm, model, optimizer.state_dict()["state"])

    ranks(body)


@pytest.mark.parametrize("manner", MANNERS)
def test_gradients_are_final_after_backward(ranks: Ranks, manner: str) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, adamw, model, **MANNERS[manner])
        for step in range(3):
            optimizer.zero_grad()
            weighted_backward(optimizer, model, own(step, comm.rank))
            expected.zero_grad()
            loss_of(expected, whole(step, comm.size)).backward()
            assert_close(gradients(model), gradients(expected))
            optimizer.step()
            assert_ranks_equal(comm, model)
            expected.load_state_dict(model.state_dict())

    ranks(body)


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("weight", [1, 5, 0.3])
def test_equal_weights_give_the_plain_mean(ranks: Ranks, weight: float, shard: str) -> None:
    """Bit for bit, and the weights' unit does not matter."""

    def body(comm: Communicator) -> None:
        models = []
        for weighted in (False, True):
            model = net(torch.float32)
            optimizer = wrap(comm, sgd, model, shard=shard)
            for step in range(2):
                optimizer.zero_grad()
                with optimizer.weight(weight) if weighted else nullcontext():
                    loss_of(model, batch(step, comm.rank, dtype=torch.float32)).backward()
                optimizer.step()
            models.append(model)
        assert_equal(models[1], models[0])

    ranks(body)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_dtypes(ranks: Ranks, dtype: torch.dtype) -> None:
    """Large weights neither overflow nor lose the count; odd sizes, no dimension and no element."""

    def body(comm: Communicator) -> None:
        shapes = [(3,), (), (0, 2), (5, 7)]
        parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
        inner = torch.optim.SGD(parameters, lr=1.0)
        optimizer = heatopt.DataParallelOptimizer(inner, comm=comm, bucket_mb=TINY)
        count = [60001, 20001, 0, 5][comm.rank]
        with optimizer.weight(count):
            sum((p * (comm.rank + 1)).real.sum() for p in parameters).backward()
        counts = [60001, 20001, 0, 5][: comm.size]
        mean = sum(n * (rank + 1) for rank, n in enumerate(counts)) / sum(counts)
        for parameter in parameters:
            assert_close([parameter.grad], [torch.full_like(parameter, mean).detach()], rtol=3 * torch.finfo(dtype).eps)

    ranks(body)


@pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")
@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("settings", [{}, {"reproducible": True}, {"wire_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_several_nodes(settings: dict[str, Any], shard: str, shared: bool) -> None:
    """Three ranks on two nodes, and four on two; weights that would overflow a half type on the wire."""

    def body(comm: Communicator) -> None:
        model, expected = net(torch.float32), net(torch.float32)
        optimizer, plain = wrap(comm, sgd, model, shard=shard, **settings), sgd(expected)
        for step in range(2):
            optimizer.zero_grad()
            data = batch(step, comm.rank, rows_of(step, comm.rank), torch.float32)
            with optimizer.weight(100_000 * len(data[0])):
                loss_of(model, data).backward()
            optimizer.step()
            plain.zero_grad()
            x, y = whole(step, comm.size)
            loss_of(expected, (x.float(), y.float())).backward()
            plain.step()
        tolerance = 2**-7 if "wire_dtype" in settings else 1e-5
        assert_close(model, expected, rtol=tolerance, atol=tolerance / 10)
        assert_ranks_equal(comm, model)

    for size in (3, 4):
        ThreadWorld(size, ranks_per_node=2, shared_memory=shared, timeout=20).run(body)


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("to_none", [True, False], ids=["None", "zeros"])
def test_a_rank_without_samples_may_leave_backward_out(ranks: Ranks, shard: str, to_none: bool) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model, shard=shard), adamw(expected)
        for step in range(3):
            optimizer.zero_grad(set_to_none=to_none)
            data = own(step, comm.rank)
            if len(data[0]):
                weighted_backward(optimizer, model, data)
            optimizer.step()
            plain.zero_grad(set_to_none=to_none)
            loss_of(expected, whole(step, comm.size)).backward()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body, min_size=2)


@pytest.mark.parametrize("manner", ["weight", "step", "no context"])
@pytest.mark.parametrize("make", [net, words], ids=["dense", "sparse"])
@pytest.mark.parametrize("shard", SHARDS[::2])
def test_what_is_no_number_does_not_count(ranks: Ranks, shard: str, make: Any, manner: str) -> None:
    """The gradients of a rank without samples, the last one, may be anything; later ones come on top of zeros."""

    def body(comm: Communicator) -> None:
        model, expected = make(), make()
        make_optimizer = lambda module: torch.optim.SGD(module.parameters(), lr=0.1)  # noqa: E731
        optimizer, plain = wrap(comm, make_optimizer, model, shard=shard), make_optimizer(expected)
        empty = comm.rank == comm.size - 1
        weight = 0 if empty else comm.rank + 1
        loss = loss_of(model, batch(0, comm.rank)) * (float("nan") if empty else 1.0)
        if manner == "step":
            with optimizer.no_sync():
                loss.backward()
            optimizer.step(weight=weight)
        elif empty and manner == "no context":
            for parameter in model.parameters():
                parameter.grad = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
            optimizer.step()
        else:
            with optimizer.weight(weight):
                loss.backward()
            optimizer.step()
        total = comm.size * (comm.size - 1) / 2
        for rank in range(comm.size - 1):
            (loss_of(expected, batch(0, rank)) * (rank + 1) / total).backward()
        plain.step()
        assert_close(model, expected)

    ranks(body, min_size=2)


def test_nobody_has_samples(ranks: Ranks) -> None:
    """Gradients are zeros, where ``backward()`` was called; on top of others they change nothing."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        weighted_backward(optimizer, model, batch(0, comm.rank, 0))
        assert_equal(gradients(model), [torch.zeros_like(p) for p in model.parameters()])
        weighted_backward(optimizer, model, own(1, comm.rank))
        weighted_backward(optimizer, model, batch(0, comm.rank, 0))
        loss_of(expected, whole(1, comm.size)).backward()
        assert_close(gradients(model), gradients(expected))
        optimizer.zero_grad()
        with optimizer.weight(0):
            pass
        optimizer.step()
        assert gradients(model) == [None] * 6

    ranks(body)


@pytest.mark.parametrize("shard", SHARDS)
def test_step_weight(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model, shard=shard), adamw(expected)
        for step in range(3):
            optimizer.zero_grad()
            found = torch.autograd.grad(loss_of(model, own(step, comm.rank)), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), found, strict=True):
                parameter.grad = gradient
            optimizer.step(weight=rows_of(step, comm.rank))
            plain.zero_grad()
            loss_of(expected, whole(step, comm.size)).backward()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    # Someone must have samples: in one process rank 0 has none at step 2.
    ranks(body, min_size=2)


def test_step_weight_of_local_gradients(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        with optimizer.no_sync():
            loss_of(model, own(0, comm.rank)).backward()
        optimizer.step(weight=rows_of(0, comm.rank))
        loss_of(expected, whole(0, comm.size)).backward()
        plain.step()
        assert_close(model, expected)

    ranks(body)


def test_closure_loss_is_weighted(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = fill(nn.Linear(4, 3).double())
        optimizer: Any = wrap(comm, sgd, model)
        counts = COUNTS[: comm.size]

        def closure(weight: Callable[[], Any]) -> Callable[[], float]:
            def evaluate() -> float:
                optimizer.zero_grad()
                with weight():
                    loss_of(model, own(0, comm.rank)).backward()
                return float("nan") if not counts[comm.rank] else float(comm.rank + 1)

            return evaluate

        expected = sum(n * (r + 1) for r, n in enumerate(counts)) / sum(counts)
        assert optimizer.step(closure(lambda: optimizer.weight(counts[comm.rank]))) == pytest.approx(
            expected, rel=1e-15
        )

    ranks(body)
