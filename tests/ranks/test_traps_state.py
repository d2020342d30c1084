"""Other parts of torch that read and write an optimizer's state."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._training import (
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    by_name,
    generator,
    net,
    reference,
    sgd,
    train,
    whole,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

# torch.distributed.checkpoint speaks of deprecations of its own.
ignore_torchs_own = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning:torch")


@ignore_torchs_own
def test_t34_distributed_checkpoint_of_a_new_optimizer(ranks: Ranks) -> None:
    """torch makes the state by a step of its own, with gradients of zero and a learning rate of zero."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, adamw, model)
        found = get_optimizer_state_dict(model, optimizer)
        assert_equal(model, net())
        assert optimizer.param_groups[0]["lr"] == 0.01
        assert found["state"].keys() == dict(model.named_parameters()).keys()
        assert not found["state"]["0.weight"]["exp_avg"].any()

        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        assert_equal(saved["state"]["2.weight"]["exp_avg"], optimizer.state[model[2].weight]["exp_avg"])
        assert_ranks_equal(comm, saved)

        again = net()
        again.load_state_dict(model.state_dict())
        other = wrap(comm, adamw, again)
        set_optimizer_state_dict(again, other, copy.deepcopy(saved))
        assert_equal(other.state[again[2].weight]["exp_avg"], optimizer.state[model[2].weight]["exp_avg"])
        for one, module in ((optimizer, model), (other, again)):
            train(one, module, [batch(5, comm.rank)])
        assert_equal(again, model)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@ignore_torchs_own
@pytest.mark.parametrize("shard", ["none", "state", "gradients"])
@pytest.mark.parametrize("name", ["AdamW", "Muon", "Adagrad", "SGD", "Rprop", "Adafactor"])
def test_t34_distributed_checkpoint_is_torchs(ranks: Ranks, name: str, shard: str) -> None:
    """What torch's functions return and take is what they do with a plain optimizer, also where a rank has no state.

    Muon has two matrices here: at three ranks one has none of the state, and must not be the only one to initialise.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    algorithm = by_name[name]

    def body(comm: Communicator) -> None:
        model, plain_model = algorithm.model(), algorithm.model()
        optimizer = wrap(comm, algorithm.optimizer, model, shard=shard)
        plain = algorithm.optimizer(plain_model)
        expected = get_optimizer_state_dict(plain_model, plain)
        assert_equal(get_optimizer_state_dict(model, optimizer), expected)
        assert_equal(model, plain_model)
        for step in range(2):
            algorithm.update(optimizer, model, batch(step, comm.rank))
        for p in model.parameters():
            p.grad = None
        plain_model.load_state_dict(model.state_dict())
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        saved = get_optimizer_state_dict(model, optimizer)
        assert_equal(saved, get_optimizer_state_dict(plain_model, plain))
        assert_equal(get_optimizer_state_dict(model, optimizer, options=options), saved)
        for each in (None, options):
            again = algorithm.model(seed=1)
            again.load_state_dict(model.state_dict())
            other = wrap(comm, algorithm.optimizer, again, shard=shard)
            set_optimizer_state_dict(again, other, copy.deepcopy(saved), options=each)
            assert_equal(other.state_dict(), optimizer.state_dict())
            assert_equal(again, model)
        for one, module in ((optimizer, model), (other, again)):
            algorithm.update(one, module, batch(2, comm.rank))
        assert_equal([again, other], [model, optimizer])
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@ignore_torchs_own
def test_t34_distributed_checkpoint_of_sgd(ranks: Ranks) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), model)
        found = get_optimizer_state_dict(model, optimizer)
        assert found["param_groups"][0]["params"] == list(dict(model.named_parameters()))
        train(optimizer, model, [batch(0, comm.rank)])
        reference(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), expected, comm.size, 1)
        assert_close(model, expected)

    ranks(body)


def test_t29_dropout_masks_differ_and_resume(ranks: Ranks) -> None:
    """Each rank keeps the random stream that the user gave it; nothing seeds it."""

    def body(comm: Communicator) -> None:
        source = generator(100 + comm.rank)
        model = net()
        optimizer = wrap(comm, sgd, model)
        train(optimizer, model, [batch(0, comm.rank)])
        mask = torch.rand(20, generator=source)
        assert_equal(mask, torch.rand(20, generator=generator(100 + comm.rank)))
        masks = comm.all_gather(mask)
        assert len({tuple(one.tolist()) for one in masks}) == comm.size

    ranks(body)


def test_t13_bfloat16_state_round_trip(ranks: Ranks) -> None:
    """torch loads moments in the parameters' dtype; the step counter keeps its own."""

    def body(comm: Communicator) -> None:
        algorithm = by_name["AdamW"]
        model = algorithm.model(torch.bfloat16)
        optimizer = wrap(comm, algorithm.optimizer, model)
        train(optimizer, model, [batch(step, comm.rank, dtype=torch.bfloat16) for step in range(2)])
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(copy.deepcopy(saved))
        assert_equal(optimizer, saved)
        assert all(state["step"].dtype is torch.float32 for state in optimizer.state.values())

    ranks(body)


def test_state_is_reset_by_the_user(ranks: Ranks) -> None:
    """Clearing the state in place, or giving up one parameter's, is seen by both."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, adamw, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        plain = reference(adamw, expected, comm.size, 2)
        optimizer.state.clear()
        plain.state.clear()
        assert not optimizer.torch_optimizer.state
        train(optimizer, model, [batch(2, comm.rank)])
        train(plain, expected, [whole(2, comm.size)])
        assert_close(model, expected)
        assert_close(optimizer, plain)

    ranks(body)


def test_parameter_taken_out_of_its_group(ranks: Ranks) -> None:
    """As in plain torch it is no longer updated while the others are; or all ranks refuse to go on."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        train(optimizer, model, [batch(0, comm.rank)])
        removed = optimizer.param_groups[0]["params"].pop()
        assert removed is model[4].bias
        before = removed.detach().clone()
        try:
            train(optimizer, model, [batch(1, comm.rank)])
        except heatopt.HeatoptError:
            return
        assert_equal(removed, before)
        expected = net()
        plain = sgd(expected)
        train(plain, expected, [whole(0, comm.size)])
        plain.param_groups[0]["params"].pop()
        train(plain, expected, [whole(1, comm.size)])
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_named_parameters(ranks: Ranks) -> None:
    """torch's optimizers take names too; they are in the state dictionary and in messages."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()

        def make(module: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.AdamW(module.named_parameters(), lr=0.01, weight_decay=0.1)

        optimizer = wrap(comm, make, model, model=None)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        plain = reference(make, expected, comm.size, 2)
        assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
        assert_close(model, expected)

    ranks(body)
