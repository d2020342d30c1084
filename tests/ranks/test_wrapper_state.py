"""State dictionaries travel between plain and wrapped optimizers, bit for bit."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._training import (
    ALGORITHMS,
    TINY,
    Algorithm,
    Batch,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    assert_shares,
    batch,
    by_name,
    net,
    reference,
    train,
    whole,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)


@every_algorithm
def test_t13_state_travels_between_plain_and_wrapped(ranks: Ranks, algorithm: Algorithm) -> None:
    """wrapped -> file -> plain -> wrapped again, and then the same steps, bit for bit."""

    def single(step: int, rank: int) -> Batch:
        return batch(step, rank, dtype=torch.float32)

    def body(comm: Communicator) -> None:
        # Where parameters are in double precision, torch itself casts some of the state when it loads it.
        model = algorithm.model(torch.float32)
        optimizer = heatopt.DataParallelOptimizer(algorithm.optimizer(model), model=model, comm=comm, bucket_mb=TINY)
        for step in range(2):
            algorithm.update(optimizer, model, single(step, comm.rank))
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)

        def same_model() -> nn.Module:
            module = algorithm.model(torch.float32)
            module.load_state_dict(model.state_dict())
            return module

        plain_model = same_model()
        plain = algorithm.optimizer(plain_model)
        untouched = copy.deepcopy(saved)
        plain.load_state_dict(saved)
        assert_equal(plain, optimizer)
        assert plain.state_dict().keys() == optimizer.state_dict().keys()

        again_model = same_model()
        again = heatopt.DataParallelOptimizer(
            algorithm.optimizer(again_model), model=again_model, comm=comm, bucket_mb=TINY
        )
        taken = copy.deepcopy(plain.state_dict())  # loaded tensors are not copied, by torch neither
        again.load_state_dict(taken)
        assert_shares(again)
        assert_equal(taken, untouched)
        assert taken["param_groups"] == untouched["param_groups"]
        for step in range(2, 5):
            data = single(step, comm.rank)
            algorithm.update(optimizer, model, data)
            algorithm.update(again, again_model, data)
        assert_equal(again_model, model)
        assert_equal(again, optimizer)
        if comm.size == 1:
            for step in range(2, 5):
                algorithm.update(plain, plain_model, single(step, 0))
            assert_equal(plain, optimizer)

    ranks(body)


def test_t13_state_dict_is_that_of_the_wrapped_optimizer(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, adamw, model)
        train(optimizer, model, [batch(0, comm.rank)])
        found, inner = optimizer.state_dict(), optimizer.torch_optimizer.state_dict()
        assert found["param_groups"] == inner["param_groups"]
        assert found["state"].keys() == inner["state"].keys()
        assert_equal(found["state"], inner["state"])
        assert_ranks_equal(comm, found)

    ranks(body)


def test_t13_wrong_state_dict_raises_what_torch_raises(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, adamw, model)
        smaller = adamw(by_name["Muon"].model()).state_dict()
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict(smaller)
        train(optimizer, model, [batch(0, comm.rank)])
        expected = net()
        reference(adamw, expected, comm.size, 1)
        assert_close(model, expected)

    ranks(body)


def test_t14_state_of_another_number_of_ranks(ranks: Ranks) -> None:
    """Three ranks, each a thread, train and save; here their state goes on."""

    def first(comm: Communicator) -> tuple[dict[str, Any], dict[str, Any]]:
        model = net()
        optimizer = wrap(comm, adamw, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        return copy.deepcopy(optimizer.state_dict()), model.state_dict()

    saved, weights = heatopt.comm.ThreadWorld(3).run(first)[2]

    def body(comm: Communicator) -> None:
        model, expected = net(seed=5), net()
        model.load_state_dict(weights)
        optimizer = wrap(comm, adamw, model)
        optimizer.load_state_dict(copy.deepcopy(saved))
        train(optimizer, model, [batch(step, comm.rank) for step in range(2, 4)])
        plain = reference(adamw, expected, 3, 2)
        train(plain, expected, [whole(step, comm.size) for step in range(2, 4)])
        assert_close(model, expected)
        assert_close(optimizer, plain)

    ranks(body)
