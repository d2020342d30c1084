"""A parameter has one wrapper, and a wrapper dies with its last user."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch

import heatopt
from tests.ranks._training import (
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    loss_of,
    net,
    reference,
    sgd,
    train,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


def test_t35_second_wrapper_is_refused(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, other = net(), net(seed=1)
        optimizer = wrap(comm, sgd, model)
        for make in (sgd, adamw):
            with pytest.raises(ValueError, match=r"0\.weight.*another DataParallelOptimizer"):
                wrap(comm, make, model)
        both = [*other.parameters(), model[4].bias]
        with pytest.raises(ValueError, match="another DataParallelOptimizer"):
            heatopt.DataParallelOptimizer(torch.optim.SGD(both, lr=0.1), comm=comm)
        second = wrap(comm, sgd, other)
        with pytest.raises(ValueError, match="another DataParallelOptimizer"):
            second.add_param_group({"params": [model[2].weight]})
        assert len(second.param_groups) == 1
        with pytest.raises(ValueError, match="DataParallelOptimizer already"):
            heatopt.DataParallelOptimizer(optimizer, comm=comm)
        # What was refused has left nothing behind.
        for one, module in ((optimizer, model), (second, other)):
            train(one, module, [batch(0, comm.rank)])
        expected = net()
        reference(sgd, expected, comm.size, 1)
        assert_close(model, expected)

    ranks(body)


def test_t35_deleting_a_wrapper_frees_parameters_and_hooks(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        gc.disable()  # it dies with its last user, not when the collector finds it
        try:
            model = net()
            optimizer = wrap(comm, sgd, model)
            train(optimizer, model, [batch(0, comm.rank)])
            gone = weakref.ref(optimizer)
            del optimizer
            assert gone() is None
        finally:
            gc.enable()
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        model.zero_grad()
        loss_of(model, batch(1, comm.rank)).backward()
        alone = net()
        alone.load_state_dict(model.state_dict())
        loss_of(alone, batch(1, comm.rank)).backward()
        assert_equal([p.grad for p in model.parameters()], [p.grad for p in alone.parameters()])
        model.zero_grad()

        again = wrap(comm, adamw, model)
        train(again, model, [batch(2, comm.rank)])
        expected = net()
        reference(sgd, expected, comm.size, 1)
        reference(adamw, expected, comm.size, [2])
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_wrapper_in_a_cycle(ranks: Ranks) -> None:
    """A trainer that refers to itself dies at another time on each rank; nothing depends on when."""

    class Trainer:
        def __init__(self, comm: Communicator, seed: int) -> None:
            self.myself = self
            self.model = net(seed=seed)
            self.optimizer = wrap(comm, sgd, self.model)

    def body(comm: Communicator) -> None:
        for seed in range(3):
            trainer = Trainer(comm, seed)
            train(trainer.optimizer, trainer.model, [batch(0, comm.rank)])
            del trainer
            if comm.rank == seed:
                gc.collect()
            model, expected = net(), net()
            optimizer = wrap(comm, adamw, model)
            train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
            reference(adamw, expected, comm.size, 2)
            assert_close(model, expected)
            del optimizer

    ranks(body)
