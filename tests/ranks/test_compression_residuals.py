"""Compressed gradients: what is not sent is not lost, whatever gradients come."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.errors import HeatoptError
from tests.ranks._compression import (
    STEPS,
    TOP,
    Reference,
    batches,
    gradients_of,
    lacking,
    largest,
    residuals,
    still,
)
from tests.ranks._training import (
    assert_close,
    assert_equal,
    batch,
    gradients,
    loss_of,
    net,
    sgd,
    train,
    words,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


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
