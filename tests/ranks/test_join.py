"""Ranks with unequal numbers of batches (T28).

The rule: at each step gradients are means over the ranks that still train. The reference is one process that knows
which ranks those are.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt import lr_scheduler as schedulers
from tests.ranks._training import (
    TINY,
    adamw,
    assert_close,
    assert_ranks_equal,
    batch,
    by_name,
    loss_of,
    net,
    reference,
    sgd,
    train,
    whole,
    words,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

Counts = Callable[[int, int], int]

COUNTS: dict[str, Counts] = {
    "3 and 5": lambda rank, size: 3 if rank % 2 == 0 else 5,
    "5 and 3": lambda rank, size: 5 if rank % 2 == 0 else 3,
    "each another": lambda rank, size: rank + 1,
    "each another, downwards": lambda rank, size: size - rank,
    "first has none": lambda rank, size: 0 if rank == 0 else 3,
    "last has none": lambda rank, size: 0 if rank == size - 1 else 3,
    "only the last has any": lambda rank, size: 3 if rank == size - 1 else 0,
    "all equal": lambda rank, size: 2,
    "none": lambda rank, size: 0,
}


def active(counts: Counts, step: int, size: int) -> list[int]:
    return [rank for rank in range(size) if counts(rank, size) > step]


def steps_of(counts: Counts, size: int) -> range:
    return range(max(counts(rank, size) for rank in range(size)))


def plain_run(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    counts: Counts,
    size: int,
    each: Callable[[torch.optim.Optimizer, nn.Module], None] = lambda optimizer, model: optimizer.step(),
    model: nn.Module | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net() if model is None else model
    optimizer = make(model)
    for step in steps_of(counts, size):
        optimizer.zero_grad()
        loss_of(model, whole(step, active(counts, step, size))).backward()
        each(optimizer, model)
    return model, optimizer


@pytest.mark.parametrize("bucket_mb", [TINY, 8], ids=["many-buckets", "one-bucket"])
@pytest.mark.parametrize("name", COUNTS)
def test_t28_unequal_numbers_of_batches(ranks: Ranks, name: str, bucket_mb: float) -> None:
    counts = COUNTS[name]

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, adamw, model, bucket_mb=bucket_mb, blocking=bucket_mb == TINY)
        with optimizer.join():
            train(optimizer, model, [batch(step, comm.rank) for step in range(counts(comm.rank, comm.size))])
        expected, plain = plain_run(adamw, counts, comm.size)
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

        # Afterwards all train together again, with the divisor of all.
        train(optimizer, model, [batch(9, comm.rank)])
        train(plain, expected, [whole(9, comm.size)])
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@pytest.mark.parametrize("own", [True, False], ids=["clip_grad_norm_", "torch's"])
def test_t28_with_clipping(ranks: Ranks, own: bool) -> None:
    counts = COUNTS["each another"]

    def clipped(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        if own and isinstance(optimizer, heatopt.DataParallelOptimizer):
            optimizer.clip_grad_norm_(0.05)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        with optimizer.join():
            for step in range(counts(comm.rank, comm.size)):
                optimizer.zero_grad()
                loss_of(model, batch(step, comm.rank)).backward()
                clipped(optimizer, model)
        expected, _ = plain_run(sgd, counts, comm.size, clipped)
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t28_with_a_scheduler_inside(ranks: Ranks) -> None:
    """The learning rate at the end is that of the ranks that trained last, on all."""
    counts = COUNTS["each another"]

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        scheduler, plain_scheduler = schedulers.ExponentialLR(optimizer, 0.5), schedulers.ExponentialLR(plain, 0.5)
        with optimizer.join():
            for step in range(counts(comm.rank, comm.size)):
                train(optimizer, model, [batch(step, comm.rank)])
                scheduler.step()
        for step in steps_of(counts, comm.size):
            train(plain, expected, [whole(step, active(counts, step, comm.size))])
            plain_scheduler.step()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        assert_close(model, expected)
        train(optimizer, model, [batch(9, comm.rank)])  # all have the same options
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t28_several_epochs_with_a_scheduler_outside(ranks: Ranks) -> None:
    counts = COUNTS["5 and 3"]

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        scheduler, plain_scheduler = schedulers.StepLR(optimizer, 1, 0.5), schedulers.StepLR(plain, 1, 0.5)
        for epoch in range(2):
            with optimizer.join():
                own = range(counts(comm.rank, comm.size))
                train(optimizer, model, [batch(10 * epoch + step, comm.rank) for step in own])
            scheduler.step()
            for step in steps_of(counts, comm.size):
                train(plain, expected, [whole(10 * epoch + step, active(counts, step, comm.size))])
            plain_scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.025
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@pytest.mark.parametrize("common", [False, True], ids=["separate-losses", "common-loss"])
@pytest.mark.parametrize("name", ["3 and 5", "each another, downwards", "first has none", "last has none"])
def test_t28_several_optimizers(ranks: Ranks, name: str, common: bool) -> None:
    """Nested contexts: a rank that has left serves all of them, also with gradients of its last step still there."""
    counts = COUNTS[name]

    def step_both(
        optimizers: Sequence[torch.optim.Optimizer], models: Sequence[nn.Module], data: Any, clear_first: bool
    ) -> None:
        for number, (optimizer, model) in enumerate(zip(optimizers, models, strict=True)):
            if clear_first:
                optimizer.zero_grad()
            loss = loss_of(model, data)
            if number == 1 and common:
                loss = loss + loss_of(models[0], data)  # gradients of both in one backward
            loss.backward()
            optimizer.step()
            if not clear_first:
                for one in optimizers:
                    one.zero_grad()

    def body(comm: Communicator) -> None:
        for clear_first in (True, False):
            models, expected = [net(), net(seed=1)], [net(), net(seed=1)]
            optimizers = [wrap(comm, adamw, models[0]), wrap(comm, sgd, models[1])]
            plain = [adamw(expected[0]), sgd(expected[1])]
            with contextlib.ExitStack() as stack:
                for optimizer in optimizers:
                    stack.enter_context(optimizer.join())
                for step in range(counts(comm.rank, comm.size)):
                    step_both(optimizers, models, batch(step, comm.rank), clear_first)
            for step in steps_of(counts, comm.size):
                step_both(plain, expected, whole(step, active(counts, step, comm.size)), clear_first)
            for found, wanted in zip([*models, *optimizers], [*expected, *plain], strict=True):
                assert_close(found, wanted)
            assert_ranks_equal(comm, *models, *optimizers)

    ranks(body)


def test_t28_accumulation_inside(ranks: Ranks) -> None:
    """Two backward calls for each step, the first of them local."""
    counts = COUNTS["each another"]

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        with optimizer.join():
            for step in range(counts(comm.rank, comm.size)):
                optimizer.zero_grad()
                with optimizer.no_sync():
                    loss_of(model, batch(step, comm.rank)).backward()
                loss_of(model, batch(step + 50, comm.rank)).backward()
                optimizer.step()
        for step in steps_of(counts, comm.size):
            plain.zero_grad()
            for number in (step, step + 50):
                loss_of(expected, whole(number, active(counts, step, comm.size))).backward()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@pytest.mark.parametrize("name", ["SGD", "LBFGS"])
def test_t28_closures_inside(ranks: Ranks, name: str) -> None:
    counts = COUNTS["3 and 5"]
    algorithm = by_name[name]

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, algorithm.optimizer, model), algorithm.optimizer(expected)
        losses = []

        def closure_of(one: torch.optim.Optimizer, module: nn.Module, data: Any) -> Callable[[], torch.Tensor]:
            def closure() -> torch.Tensor:
                one.zero_grad()
                loss = loss_of(module, data)
                loss.backward()
                return loss.detach()

            return closure

        with optimizer.join():
            for step in range(counts(comm.rank, comm.size)):
                losses.append(optimizer.step(closure_of(optimizer, model, batch(step, comm.rank))).item())
        wanted = []
        for step in steps_of(counts, comm.size):
            data = whole(step, active(counts, step, comm.size))
            wanted.append(plain.step(closure_of(plain, expected, data)).item())
        assert losses == pytest.approx(wanted[: len(losses)], rel=1e-9)
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's Adagrad
@pytest.mark.parametrize("name", ["SGD", "SparseAdam", "Adagrad"])
def test_t28_sparse_gradients(ranks: Ranks, name: str) -> None:
    counts = COUNTS["each another"]

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return sgd(model) if name == "SGD" else getattr(torch.optim, name)(model.parameters(), lr=0.01)

    def body(comm: Communicator) -> None:
        model = words()
        optimizer = wrap(comm, make, model)
        with optimizer.join():
            train(optimizer, model, [batch(step, comm.rank) for step in range(counts(comm.rank, comm.size))])
        expected, plain = plain_run(make, counts, comm.size, model=words())
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t28_parameter_unfrozen_while_a_rank_has_left(ranks: Ranks) -> None:
    """A new plan is made together with ranks that only serve, and do not follow the others' schedule."""
    counts = COUNTS["first has none"]

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range, data: Callable[[int], Any]) -> None:
        for step in steps:
            if step == 1:
                model[2].weight.requires_grad_(True)
            train(optimizer, model, [data(step)])
            optimizer.param_groups[0]["lr"] *= 0.5

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        for module in (model, expected):
            module[2].weight.requires_grad_(False)
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        with optimizer.join():
            run(optimizer, model, range(counts(comm.rank, comm.size)), lambda step: batch(step, comm.rank))
        run(
            plain,
            expected,
            steps_of(counts, comm.size),
            lambda step: whole(step, active(counts, step, comm.size)),
        )
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t28_scaler_inside(ranks: Ranks) -> None:
    """The ranks that still train agree on their overflow; what has left does not vote."""
    counts = COUNTS["each another"]

    def body(comm: Communicator) -> None:
        model = net(torch.float32)
        optimizer = wrap(comm, sgd, model)
        scaler = heatopt.GradScaler("cpu", init_scale=1024.0)
        bad = max(steps_of(counts, comm.size))
        with optimizer.join():
            for step in range(counts(comm.rank, comm.size)):
                optimizer.zero_grad()
                loss = loss_of(model, batch(step, comm.rank, dtype=torch.float32))
                scaler.scale(loss * torch.inf if step == bad else loss).backward()
                scaler.step(optimizer)
                scaler.update()
        expected = net(torch.float32)
        plain = sgd(expected)
        for step in range(bad):
            train(plain, expected, [whole(step, active(counts, step, comm.size), dtype=torch.float32)])
        assert_close(model, expected, rtol=1e-4, atol=1e-5)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t28_rank_without_a_backward_is_not_one_that_has_left(ranks: Ranks) -> None:
    """It calls step(), so it counts in the divisor; only after its last step it does not."""

    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
        with optimizer.join():
            if comm.rank != comm.size - 1 or comm.size == 1:
                parameter.sum().backward()
            optimizer.step()
        share = 1.0 if comm.size == 1 else (comm.size - 1) / comm.size
        assert_close(parameter, torch.full((2,), -share, dtype=torch.float64))

    ranks(body)


def test_t28_add_param_group_inside_is_refused(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        if comm.rank == 0:
            with pytest.raises(heatopt.RankMismatchError, match=r"join\(\)"), optimizer.join():
                optimizer.add_param_group({"params": net(seed=2).parameters()})
        else:
            with pytest.raises(heatopt.RankMismatchError, match=r"join\(\)"), optimizer.join():
                pass

    ranks(body, min_size=2)


def test_t28_states_are_loaded_and_made_while_a_rank_has_left(ranks: Ranks, tmp_path: Path) -> None:
    """Afterwards all ranks have the same states in the same order, with which they train and save."""
    counts = COUNTS["first has none"]

    def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            torch.stack([p.square().sum() for p in parameters[-1 - step :]]).sum().backward()
            optimizer.step()
            if step == 1:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def body(comm: Communicator) -> None:
        parameters, expected = ([nn.Parameter(torch.full((2,), i + 1.0)) for i in range(3)] for _ in range(2))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.Adam(parameters), comm=comm)
        plain = torch.optim.Adam(expected)
        with optimizer.join():
            run(optimizer, parameters, range(counts(comm.rank, comm.size)))
        run(plain, expected, steps_of(counts, comm.size))
        assert list(optimizer.state_dict()["state"]) == list(plain.state_dict()["state"])
        heatopt.save(tmp_path / "checkpoint", optimizer=optimizer, comm=comm)
        run(optimizer, parameters, range(1))
        run(plain, expected, range(1))
        assert_close(parameters, expected)
        assert_ranks_equal(comm, parameters, optimizer)

    ranks(body)


def test_t28_weights_of_the_last_steps_are_not_those_of_a_rank_that_has_left(ranks: Ranks) -> None:
    """It has no gradients that a backward without weights could be added to."""
    counts = COUNTS["first has none"]

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        with optimizer.join():
            for step in range(counts(comm.rank, comm.size)):
                with optimizer.weight(1 + comm.rank):
                    loss_of(model, batch(step, comm.rank)).backward()
                optimizer.step()
                optimizer.zero_grad()
        loss_of(model, batch(9, comm.rank)).backward()
        optimizer.step()
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t28_exception_inside_leaves_at_once(ranks: Ranks) -> None:
    """All ranks fail: nobody serves anybody, and the error is the user's own."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        with pytest.raises(LookupError, match="no data"), optimizer.join():
            raise LookupError("no data")
        train(optimizer, model, [batch(0, comm.rank)])
        reference(sgd, expected, comm.size, 1)
        assert_close(model, expected)

    ranks(body)
