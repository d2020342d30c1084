"""Parameter groups that are added later, with the same rules as at the construction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._training import (
    TINY,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    assert_shares,
    batch,
    loss_of,
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


def test_t15_group_added_after_two_steps(ranks: Ranks) -> None:
    def run(make: Any, data: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        optimizer = make(model)
        for step in range(5):
            if step == 2:
                optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.05})
            if step == 3:
                optimizer.add_param_group({"params": model[4].weight})
            train(optimizer, model, [data(step)])
            model.zero_grad()
        return model, optimizer

    def first_layer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model[0].parameters(), lr=0.01)

    def body(comm: Communicator) -> None:
        model, optimizer = run(lambda model: wrap(comm, first_layer, model), lambda step: batch(step, comm.rank))
        expected, plain = run(first_layer, lambda step: whole(step, comm.size))
        assert_shares(optimizer)
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.05, 0.01]
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t15_added_parameters_become_those_of_rank_0(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        optimizer = heatopt.DataParallelOptimizer(sgd(net()), comm=comm, bucket_mb=TINY)
        added = net(seed=7 + comm.rank)
        optimizer.add_param_group({"params": added.parameters()})  # an iterator
        assert_equal(added, net(seed=7))

    ranks(body)


def test_t15_group_added_while_gradients_are_there(ranks: Ranks) -> None:
    def run(make: Any, data: Any) -> nn.Module:
        model = net()
        optimizer = make(model)
        loss_of(model, data).backward()
        optimizer.add_param_group({"params": model[4].parameters()})
        optimizer.step()
        return model

    def body(comm: Communicator) -> None:
        def part(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)

        model = run(lambda model: wrap(comm, part, model), batch(0, comm.rank))
        assert_close(model, run(part, whole(0, comm.size)))
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t15_group_added_on_one_rank_only_is_refused_on_all(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, extra = net(), net(seed=1)
        optimizer = wrap(comm, sgd, model)
        train(optimizer, model, [batch(0, comm.rank)])
        if comm.rank == 0:
            with pytest.raises(heatopt.RankMismatchError, match="rank 0 has 12, rank 1 has 6"):
                optimizer.add_param_group({"params": extra.parameters()})
        else:
            with pytest.raises(heatopt.RankMismatchError, match="rank 0 has 12, rank 1 has 6"):
                train(optimizer, model, [batch(1, comm.rank)])

    ranks(body, min_size=2)


def test_t15_different_groups_are_refused_on_all_ranks(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, extra = net(), nn.Linear(2, 3 + (comm.rank == comm.size - 1), dtype=torch.float64)
        optimizer = wrap(comm, sgd, model)
        with pytest.raises(heatopt.RankMismatchError, match=rf"\(3, 2\).*rank {comm.size - 1} has .*\(4, 2\)"):
            optimizer.add_param_group({"params": extra.parameters()})

    ranks(body, min_size=2)


def test_wrong_group_raises_what_torch_raises_and_changes_nothing(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        for wrong, error in (
            ([model[0].weight], TypeError),
            ({"params": model[0].weight}, ValueError),  # twice in one optimizer
            ({"params": {model[0].weight}}, TypeError),
            ({"params": [model[0].weight * 2]}, ValueError),  # not a leaf
        ):
            with pytest.raises(error):
                optimizer.add_param_group(wrong)  # type: ignore[arg-type]
            assert len(optimizer.param_groups) == 1
        train(optimizer, model, [batch(0, comm.rank)])
        expected = net()
        reference(sgd, expected, comm.size, 1)
        assert_close(model, expected)

    ranks(body)


@pytest.mark.parametrize("how", ["add_param_group", "append"])
def test_t15_parameters_added_behind_the_wrappers_back(ranks: Ranks, how: str) -> None:
    """To the wrapped optimizer itself: they are averaged as well, or refused, on all ranks; never different."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
        if how == "append":
            optimizer.param_groups[0]["params"].append(extra)
        else:
            optimizer.torch_optimizer.add_param_group({"params": [extra], "lr": 0.1})
        (loss_of(model, batch(0, comm.rank)) + extra.sum() * (comm.rank + 1)).backward()
        try:
            optimizer.step()
        except heatopt.HeatoptError:
            assert_equal(extra, torch.ones(2, dtype=torch.float64))
        else:
            assert_close(extra, torch.full((2,), 1 - 0.1 * (comm.size + 1) / 2, dtype=torch.float64))
        assert_ranks_equal(comm, model, extra)

    ranks(body)


@pytest.mark.parametrize("shard", ["none", "state"])
def test_a_parameter_exchanged_behind_the_wrappers_back(ranks: Ranks, shard: str) -> None:
    """It has no hook and no place in a bucket: refused, and not trained apart on each rank."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model, shard=shard)
        train(optimizer, model, [batch(0, comm.rank)])
        other = nn.Parameter(torch.ones_like(model[0].weight))
        index = next(i for i, p in enumerate(optimizer.param_groups[0]["params"]) if p is model[0].weight)
        optimizer.param_groups[0]["params"][index] = other
        other.grad = torch.full_like(other, comm.rank + 1.0)
        if comm.size == 1:
            optimizer.step()  # nobody to be apart from
            return
        with pytest.raises(heatopt.HeatoptError, match=r"0\.weight in the parameter groups is not the tensor"):
            optimizer.step()
        assert_equal(other, torch.ones_like(other))

    ranks(body)
