"""Residuals in state dicts, checkpoints and copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import ThreadWorld
from tests.ranks._compression import (
    STEPS,
    TOP,
    batches,
    lacking,
    residuals,
)
from tests.ranks._training import (
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    net,
    sgd,
    train,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


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
