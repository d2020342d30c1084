"""Ranks with unequal numbers of samples: ``weight(n)`` and ``step(weight=n)`` give the mean over all samples.

The reference is one process with all samples in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import heatopt
from heatopt.comm import ThreadWorld
from heatopt.errors import HeatoptError, RankMismatchError
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
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

SHARDS = ["none", "state", "gradients"]
COUNTS = (5, 2, 0, 3)
"""Samples of each rank; with three ranks 5, 2 and 0."""
MANNERS = {
    "blocking": {"blocking": True},
    "overlapped": {"blocking": False},
    "one bucket": {"bucket_mb": 8},
    "reproducible": {"reproducible": True},
    "fused": {"fuse": True},
    "wire": {"wire_dtype": torch.bfloat16},
}


def rows_of(step: int, rank: int) -> int:
    """Samples of a rank at a step: the counts go round, so that each rank has none at some step."""
    return COUNTS[(rank + step) % len(COUNTS)] if step else COUNTS[rank]


def own(step: int, rank: int) -> Batch:
    return batch(step, rank, rows_of(step, rank))


def together(batches: Sequence[Batch]) -> Batch:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def whole(step: int, size: int) -> Batch:
    return together([own(step, rank) for rank in range(size)])


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
            with optimizer.weight(rows_of(step, comm.rank)):
                loss_of(model, own(step, comm.rank)).backward()
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


@pytest.mark.parametrize("local", [True, False], ids=["no_sync", "each synchronised"])
@pytest.mark.parametrize("shard", SHARDS)
def test_accumulation_is_the_mean_of_all_samples(ranks: Ranks, shard: str, local: bool) -> None:
    """Also where a rank has fewer micro-batches than others, or empty ones, and an update comes in between."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model, shard=shard), adamw(expected)
        for step in range(2):
            micro = [[batch(10 * step + k, r, COUNTS[(r + k) % 4]) for k in range(3 + r % 2)] for r in range(comm.size)]
            optimizer.zero_grad()
            for number, data in enumerate(micro[comm.rank]):
                last = number == len(micro[comm.rank]) - 1
                with optimizer.weight(len(data[0])), nullcontext() if last or not local else optimizer.no_sync():
                    loss_of(model, data).backward()
            optimizer.step()
            plain.zero_grad()
            loss_of(expected, together([data for each in micro for data in each])).backward()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("shard", SHARDS)
def test_accumulation_steps(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, shard=shard, accumulation_steps=3), sgd(expected)
        for data in (own(step, comm.rank) for step in range(3)):
            with optimizer.weight(len(data[0])):
                loss_of(model, data).backward()
        optimizer.step()
        loss_of(expected, together([whole(step, comm.size) for step in range(3)])).backward()
        plain.step()
        assert_close(model, expected)

    ranks(body)


@pytest.mark.parametrize("clear", [True, False], ids=["zero_grad", "None"])
@pytest.mark.parametrize("shard", SHARDS)
def test_a_context_around_the_whole_step(ranks: Ranks, shard: str, clear: bool) -> None:
    """Clearing and updating inside of it do not end it, and what was there before is gone."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, shard=shard), sgd(expected)
        with optimizer.weight(9 - comm.rank), optimizer.no_sync():
            loss_of(model, batch(9, comm.rank)).backward()
        for step in range(3):
            if not clear:
                optimizer.zero_grad()
            with optimizer.weight(rows_of(step, comm.rank)):
                for _ in range(2):  # updates
                    (optimizer if clear else model).zero_grad()
                    loss_of(model, own(step, comm.rank)).backward()
                    optimizer.step()
            for _ in range(2):
                plain.zero_grad()
                loss_of(expected, whole(step, comm.size)).backward()
                plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_several_losses_of_the_same_samples_add_up(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        for first in (True, False):  # the second time on top of another micro-batch
            data = own(int(first), comm.rank)
            with optimizer.weight(len(data[0])):
                loss_of(model, data).backward()
                (2 * loss_of(model, data)).backward()
        (3 * loss_of(expected, together([whole(step, comm.size) for step in range(2)]))).backward()
        assert_close(gradients(model), gradients(expected))

    ranks(body)


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
                with optimizer.weight(len(data[0])):
                    loss_of(model, data).backward()
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
        with optimizer.weight(0):
            loss_of(model, batch(0, comm.rank, 0)).backward()
        assert_equal(gradients(model), [torch.zeros_like(p) for p in model.parameters()])
        with optimizer.weight(rows_of(1, comm.rank)):
            loss_of(model, own(1, comm.rank)).backward()
        with optimizer.weight(0):
            loss_of(model, batch(0, comm.rank, 0)).backward()
        loss_of(expected, whole(1, comm.size)).backward()
        assert_close(gradients(model), gradients(expected))
        optimizer.zero_grad()
        with optimizer.weight(0):
            pass
        optimizer.step()
        assert gradients(model) == [None] * 6

    ranks(body)


@pytest.mark.parametrize("clear", ["optimizer", "module", "step"])
def test_cleared_gradients_have_no_weight(ranks: Ranks, clear: str) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        with optimizer.weight(7 + comm.rank), optimizer.no_sync():
            loss_of(model, batch(7, comm.rank)).backward()
        if clear == "step":
            optimizer.step()
            expected.load_state_dict(model.state_dict())
            model.zero_grad()
        else:
            (optimizer if clear == "optimizer" else model).zero_grad()
        with optimizer.weight(rows_of(0, comm.rank)):
            loss_of(model, own(0, comm.rank)).backward()
        loss_of(expected, whole(0, comm.size)).backward()
        assert_close(gradients(model), gradients(expected))

    ranks(body)


def test_sparse_gradients_accumulate(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = words(), words()
        optimizer = wrap(comm, lambda module: torch.optim.SGD(module.parameters(), lr=0.1), model)
        for step in range(2):
            with optimizer.weight(rows_of(step, comm.rank)), nullcontext() if step else optimizer.no_sync():
                loss_of(model, own(step, comm.rank)).backward()
        loss_of(expected, together([whole(step, comm.size) for step in range(2)])).backward()
        assert_close(gradients(model), gradients(expected))

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


def test_autograd_grad_is_left_alone(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        parameters = list(model.parameters())
        expected = torch.autograd.grad(loss_of(model, batch(0, comm.rank)), parameters)
        for weight in (3, 0):
            with optimizer.weight(weight):
                assert_equal(torch.autograd.grad(loss_of(model, batch(0, comm.rank)), parameters), expected)

    ranks(body)


def test_join(ranks: Ranks) -> None:
    """Those that still train weigh; the others do not count."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model), adamw(expected)
        with optimizer.join():
            for step in range(comm.rank + 1):
                optimizer.zero_grad()
                with optimizer.weight(rows_of(step, comm.rank)):
                    loss_of(model, own(step, comm.rank)).backward()
                optimizer.step()
        for step in range(comm.size):
            data = together([own(step, rank) for rank in range(step, comm.size)])
            plain.zero_grad()
            if len(data[0]):
                loss_of(expected, data).backward()
            else:
                for parameter in expected.parameters():
                    parameter.grad = torch.zeros_like(parameter)
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_grad_scaler(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        scaler = heatopt.GradScaler("cpu", init_scale=64.0)
        for step in range(2):
            optimizer.zero_grad()
            with optimizer.weight(rows_of(step, comm.rank)):
                scaler.scale(loss_of(model, own(step, comm.rank))).backward()
            scaler.step(optimizer)
            scaler.update()
            plain.zero_grad()
            loss_of(expected, whole(step, comm.size)).backward()
            plain.step()
        assert scaler.get_scale() == 64.0
        assert_close(model, expected)

    ranks(body)


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "each rank another order"])
def test_two_optimizers(ranks: Ranks, order: int) -> None:
    """Each has weights of its own, also where ranks come to their reductions in different orders."""

    def body(comm: Communicator) -> None:
        models, expected = [net(seed=1), net(seed=2)], [net(seed=1), net(seed=2)]
        optimizers = [wrap(comm, sgd, model) for model in models]
        steps = [0, 1][:: order if comm.rank % 2 else 1]
        counts = [[rows_of(k, r) for r in range(comm.size)] for k in range(2)]
        with ExitStack() as stack:
            for k in range(2):
                stack.enter_context(optimizers[k].weight(counts[k][comm.rank]))
            for k in steps:
                loss_of(models[k], own(k, comm.rank)).backward()
        for k in range(2):
            loss_of(expected[k], whole(k, comm.size)).backward()
            assert_close(gradients(models[k]), gradients(expected[k]))

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


@pytest.mark.parametrize("layer", [0, 4], ids=["last hook", "first hook"])
@pytest.mark.parametrize("shard", SHARDS)
def test_a_new_plan_between_micro_batches(ranks: Ranks, shard: str, layer: int) -> None:
    """A parameter that is unfrozen gets a place: what has been reduced already keeps its weight."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        for module in (model, expected):
            module[layer].requires_grad_(False)  # type: ignore[index]
        optimizer = wrap(comm, sgd, model, shard=shard)
        plain = sgd(expected)
        size = sum(rows_of(step, rank) for step in range(2) for rank in range(comm.size))
        for step in range(2):
            with optimizer.weight(rows_of(step, comm.rank)):
                loss_of(model, own(step, comm.rank)).backward()
            data = whole(step, comm.size)
            (loss_of(expected, data) * len(data[0]) / size).backward()
            for module in (model, expected):
                module[layer].requires_grad_(True)  # type: ignore[index]
        optimizer.step()
        plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_micro_batch_of_one_rank_that_touches_one_parameter(ranks: Ranks, shard: str) -> None:
    """Its samples count for all parameters, on all ranks, though it stays local until ``step()``."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, shard=shard), sgd(expected)
        with optimizer.weight(rows_of(0, comm.rank)):
            loss_of(model, own(0, comm.rank)).backward()
        if comm.rank == comm.size - 1:
            with optimizer.weight(4), optimizer.no_sync():
                (3 * model[4].bias.sum()).backward()  # type: ignore[index]
        optimizer.step()
        data = whole(0, comm.size)
        loss = loss_of(expected, data) * len(data[0]) + 4 * 3 * expected[4].bias.sum()  # type: ignore[index]
        (loss / (len(data[0]) + 4)).backward()
        plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_a_micro_batch_of_one_rank_that_touches_no_sparse_gradient(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = words(), words()
        other = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        inner = torch.optim.SGD([*model.parameters(), other], lr=0.1)
        optimizer = heatopt.DataParallelOptimizer(inner, comm=comm, model=model)
        with optimizer.weight(rows_of(0, comm.rank)):
            loss_of(model, own(0, comm.rank)).backward()
        if comm.rank == 0:
            with optimizer.weight(4), optimizer.no_sync():
                other.sum().backward()
        optimizer.synchronize()
        data = whole(0, comm.size)
        (loss_of(expected, data) * len(data[0]) / (len(data[0]) + 4)).backward()
        assert_close(gradients(model), gradients(expected))
        assert_close([other.grad], [torch.full_like(other, 4 / (len(data[0]) + 4)).detach()])

    ranks(body)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_gradient_that_comes_twice(ranks: Ranks, blocking: bool) -> None:
    """Re-entrant checkpointing of a shared module fires a hook twice, the second time after its bucket has left."""

    def body(comm: Communicator) -> None:
        def loss(model: Any, data: Batch) -> torch.Tensor:
            x = data[0].clone().requires_grad_()
            hidden = checkpoint(model[0], x, use_reentrant=True)
            return (model[2](torch.tanh(hidden + checkpoint(model[0], 2 * x, use_reentrant=True)))).square().mean()

        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model, blocking=blocking)
        for step in range(2):
            with optimizer.weight(rows_of(step, comm.rank)):
                loss(model, own(step, comm.rank)).backward()
        loss(expected, together([whole(step, comm.size) for step in range(2)])).backward()
        assert_close(gradients(model), gradients(expected))

    ranks(body)


# Gradients set by hand


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


def test_step_weight_comes_too_late(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        before = [p.detach().clone() for p in model.parameters()]
        loss_of(model, batch(0, comm.rank)).backward()
        with pytest.raises(ValueError, match=r"no effect.*with optimizer\.weight"):
            optimizer.step(weight=3)
        assert_equal(list(model.parameters()), before)
        optimizer.step()
        assert_ranks_equal(comm, model)

    ranks(body, min_size=2)


# Errors


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (-1, ValueError),
        (-0.5, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        (None, TypeError),
        ("5", TypeError),
        (torch.tensor(5.0), TypeError),
        (2j, TypeError),
    ],
)
def test_wrong_weights(ranks: Ranks, weight: Any, error: type[Exception]) -> None:
    def body(comm: Communicator) -> None:
        optimizer = wrap(comm, sgd, net())
        with pytest.raises(error, match="number of samples or tokens"):
            optimizer.weight(weight)
        if weight is not None:
            with pytest.raises(error, match="number of samples or tokens"):
                optimizer.step(weight=weight)

    ranks(body)


def test_wrong_uses(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        with pytest.raises(ValueError, match="inside the closure"):
            optimizer.step(lambda: None, weight=3)
        with optimizer.weight(2), pytest.raises(HeatoptError, match="nested"), optimizer.weight(3):
            pass
        with pytest.raises(HeatoptError, match="have a weight already"):
            optimizer.step(weight=3)
        optimizer.zero_grad()
        loss_of(model, batch(0, comm.rank)).backward()
        optimizer.step()
        assert_ranks_equal(comm, model)

    ranks(body)


def test_backward_without_weight_on_top(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        with optimizer.weight(2):
            loss_of(model, batch(0, comm.rank)).backward()
        with pytest.raises(HeatoptError, match=r"without a weight.*zero_grad"):
            loss_of(model, batch(0, comm.rank)).backward()
        optimizer.zero_grad()
        loss_of(model, batch(0, comm.rank)).backward()
        optimizer.step()
        assert_ranks_equal(comm, model)

    ranks(body, min_size=2)


@pytest.mark.parametrize("odd", ["first", "last"])
@pytest.mark.parametrize("at", ["backward", "local", "step"])
def test_ranks_disagree(ranks: Ranks, at: str, odd: str) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        is_odd = comm.rank == (0 if odd == "first" else comm.size - 1)
        if at == "step":
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with pytest.raises(RankMismatchError, match=r"step\(weight=n\)"):
                optimizer.step(**({} if is_odd else {"weight": 2}))
            return

        def train() -> None:
            with (
                nullcontext() if is_odd else optimizer.weight(2),
                optimizer.no_sync() if at == "local" else nullcontext(),
            ):
                loss_of(model, batch(0, comm.rank)).backward()
            optimizer.step()

        with pytest.raises(RankMismatchError, match=r"gave its gradients a weight, rank . called backward\(\) without"):
            train()

    ranks(body, min_size=2)


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
