"""Sharding with all that surrounds a step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator
from heatopt.errors import HeatoptError, RankFailedError
from heatopt.sharding._parameter_memory import OwnParameters
from heatopt.sharding._partition import ShardSpec, plan_shards
from heatopt.sharding._views import OwnViews
from tests.ranks._sharding import SHARDS, assert_alike, assert_same_bits, train_scaled
from tests.support import parity
from tests.support.problems import Net
from tests.support.ranks import Ranks
from tests.support.training import train

each_kind = pytest.mark.parametrize("shard", SHARDS[1:])


def adamw(net: Net) -> torch.optim.Optimizer:
    """Two groups of different options."""
    early, late = [net.first, net.bias, net.scale], [net.branch, net.unused, net.second, net.empty]
    return torch.optim.AdamW([{"params": early}, {"params": late, "lr": 0.01, "weight_decay": 0.3}])


def test_schedulers(ranks: Ranks) -> None:
    """Of the wrapper and of the wrapped optimizer, with numbers and tensors, without torch's warning."""

    def run(net: Net, optimizer: Any, losses: Any) -> None:
        optimizer.param_groups[1]["lr"] = torch.tensor(0.02)
        outer = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        inner = torch.optim.lr_scheduler.LinearLR(optimizer.torch_optimizer)
        for loss in losses * 2:
            train(optimizer, [loss])
            outer.step()
            inner.step()
        assert isinstance(optimizer.param_groups[1]["lr"], torch.Tensor)

    ranks(lambda comm: assert_alike(comm, adamw, run))


def test_clipping_and_accumulation(ranks: Ranks) -> None:
    def run(net: Net, optimizer: Any, losses: Any) -> list[torch.Tensor]:
        norms = []
        for loss in losses:
            optimizer.zero_grad()
            with optimizer.no_sync():
                loss().backward()
            loss().backward()
            norms += [optimizer.clip_grad_norm_(0.1, p) for p in (1, 2, float("inf"))]
            optimizer.step()
        return norms

    # Norms are joined from those of pieces, where gradients are sharded.
    ranks(lambda comm: assert_alike(comm, adamw, run, 1e-12))


@each_kind
def test_state_dict_between_accumulated_backwards(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = DataParallelOptimizer(adamw(net), comm=comm, shard=shard, accumulation_steps=2)
        (loss, *_) = net.losses(comm.size, comm.rank)
        for _ in range(2):
            optimizer.zero_grad()
            loss().backward()
            parity.assert_ranks_equal(comm, optimizer.state_dict())
            loss().backward()
            parity.assert_ranks_equal(comm, [p.grad for p in net.parameters() if p.grad is not None])
            optimizer.step()
        parity.assert_ranks_equal(comm, parity.snapshot(net, optimizer))

    ranks(body)


def test_grad_scaler(ranks: Ranks) -> None:
    ranks(lambda comm: assert_alike(comm, adamw, train_scaled))


def test_join(ranks: Ranks) -> None:
    """Ranks with fewer batches leave first; afterwards the states are divided again."""

    def run(net: Net, optimizer: Any, losses: Any) -> None:
        train(optimizer, losses)
        with optimizer.join():
            train(optimizer, losses[: 1 + optimizer._comm.rank % 3])
        train(optimizer, losses)

    def body(comm: Communicator) -> None:
        assert_alike(comm, adamw, run)

    ranks(body)


def test_states_of_one_parameter_inside_join(ranks: Ranks) -> None:
    """Each rank reads and writes its own, whether others have data left or not."""

    def run(net: Net, optimizer: Any, losses: Any) -> list[Any]:
        rank = optimizer._comm.rank
        found = []
        with optimizer.join():
            for step in range(1 + rank):
                train(optimizer, losses[:1])
                state = optimizer.get_states(net.first)["exp_avg"]
                found.append(state.shape)
                optimizer.set_states(net.first, "exp_avg", state * (step + 2))
        assert found == [net.first.shape] * (1 + rank)
        return [optimizer.get_states(net.first)]

    ranks(lambda comm: assert_alike(comm, adamw, run))


@pytest.mark.parametrize("shard", SHARDS)
def test_groups_cannot_be_added_inside_join(ranks: Ranks, shard: str) -> None:
    def add_on_some_ranks(comm: Communicator) -> None:
        optimizer = DataParallelOptimizer(adamw(Net()), comm=comm, shard=shard)
        with optimizer.join():
            if comm.rank:
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})

    def body(comm: Communicator) -> None:
        with pytest.raises(heatopt.RankMismatchError, match=r"join\(\)"):
            add_on_some_ranks(comm)

    ranks(body, min_size=2)


@each_kind
def test_hooks_fire_once(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        net = Net()
        plain = adamw(net)
        seen: list[str] = []
        plain.register_step_pre_hook(lambda *_: seen.append("inner pre"))
        plain.register_step_post_hook(lambda *_: seen.append("inner post"))
        plain.register_state_dict_post_hook(lambda _, found: seen.append(f"{len(found['state'])} states"))
        plain.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
        optimizer = DataParallelOptimizer(plain, comm=comm, shard=shard)
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *_: seen.append("post"))
        train(optimizer, net.losses(comm.size, comm.rank)[:1])
        assert seen == ["pre", "inner pre", "inner post", "post"]
        optimizer.load_state_dict(optimizer.state_dict())
        count = len(list(net.parameters())) - 1  # all but the unused one
        assert seen[4:] == [f"{count} states", "load"]

    ranks(body)


@each_kind
def test_groups_and_state_stay_the_users(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        net = Net()
        plain = adamw(net)
        groups, state, first = plain.param_groups, plain.state, plain.param_groups[0]
        optimizer = DataParallelOptimizer(plain, comm=comm, shard=shard)
        train(optimizer, net.losses(comm.size, comm.rank))
        optimizer.state_dict()
        assert optimizer.param_groups is groups
        assert optimizer.state is state
        assert groups[0] is first
        assert first["params"][0] is net.first
        assert all(any(key is p for p in net.parameters()) for key in state)
        version = net.first._version
        optimizer.step()
        assert net.first._version > version
        assert all(p.grad is None or p.grad.shape == p.shape for p in net.parameters())

    ranks(body)


def test_replaced_data_and_states(ranks: Ranks) -> None:
    def run(net: Net, optimizer: Any, losses: Any) -> None:
        train(optimizer, losses)
        for parameter in net.parameters():
            parameter.data = parameter.data.clone() * 2
        for parameter, state in list(optimizer.state.items()):
            optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}
        train(optimizer, losses)

    ranks(lambda comm: assert_alike(comm, adamw, run))


def test_strided_parameters_are_read_before_each_step(ranks: Ranks) -> None:
    def run(net: Net, optimizer: Any, losses: Any) -> None:
        net.first.data = net.first.data.t().contiguous().t()
        for loss in losses:
            train(optimizer, [loss])
            with torch.no_grad():
                net.first.mul_(2)
        net.first.data = net.first.data.contiguous()

    ranks(lambda comm: assert_alike(comm, adamw, run))


@each_kind
def test_states_appear_in_torchs_order(ranks: Ranks, shard: str) -> None:
    """That of the first updates, whatever the order of the parameters."""

    def body(comm: Communicator) -> None:
        parameters = [nn.Parameter(torch.ones(5, 5)) for _ in range(4)]
        optimizer = DataParallelOptimizer(torch.optim.Adam(parameters), comm=comm, shard=shard)
        for chosen in ([2], [0, 2], [3]):
            optimizer.zero_grad()
            for number in chosen:
                parameters[number].grad = torch.ones(5, 5)
            optimizer.step()
        assert list(optimizer.state_dict()["state"]) == [2, 0, 3]
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert list(optimizer.state_dict()["state"]) == [2, 0, 3]

    ranks(body)


class Odd(torch.optim.SGD):
    """Not torch's own: normalises each gradient as a whole, and counts its steps in its group."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for group in self.param_groups:
                group["steps"] = group.get("steps", 0) + 1
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=group["lr"])
                        self.state[parameter]["norm"] = parameter.grad.norm()
        if closure is not None and group["steps"] > 2:
            closure()
        return loss


def test_unknown_algorithms_get_whole_tensors(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = Net()
            with caplog.at_level(logging.WARNING):
                optimizer = DataParallelOptimizer(Odd(net.parameters(), lr=0.1), comm=comm, shard=shard)
            losses = net.losses(comm.size, comm.rank)
            train(optimizer, losses[:1])
            train(optimizer, losses[:1], use_closure=True)
            assert optimizer.param_groups[0]["steps"] == 2
            results.append(parity.snapshot(net, optimizer))
        assert_same_bits(results)
        with pytest.raises(HeatoptError, match="more often than once"):
            optimizer.step(losses[0])
        assert optimizer.param_groups[0]["params"][0] is net.first

    ranks(body, min_size=2)
    assert "Odd is not torch's own" in caplog.text


def stepping_half_as_far(step: Any) -> Any:
    """A decorator of a user's ``step``, as transparent as ``functools.wraps`` makes it."""

    @functools.wraps(step)
    def half(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        self.param_groups[0]["lr"] /= 2
        return step(self, closure)

    return half


class Decorated(torch.optim.SGD):
    """Halves its learning rate before each update."""

    @stepping_half_as_far
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_decorators_of_a_step_are_kept(ranks: Ranks) -> None:
    def run(net: Net, optimizer: Any, losses: Any) -> None:
        train(optimizer, losses)
        assert optimizer.param_groups[0]["lr"] == 0.1 / 2 ** len(losses)

    ranks(lambda comm: assert_alike(comm, lambda net: Decorated(net.parameters(), lr=0.1), run))


@pytest.mark.parametrize("setting", [{"shard": "state"}, {"shard": "gradients"}, {"master_dtype": torch.float32}])
def test_a_step_replaced_on_the_wrapped_optimizer_is_refused(ranks: Ranks, setting: dict[str, Any]) -> None:
    """It would update whole parameters, of which this rank has not got the gradients, the states or the masters."""

    def body(comm: Communicator) -> None:
        weight = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        plain = torch.optim.AdamW([weight], lr=0.5)
        optimizer = DataParallelOptimizer(plain, comm=comm, **setting)
        own = plain.step
        plain.step = lambda *arguments: own(*arguments)  # type: ignore[method-assign, misc]
        weight.sum().backward()
        with pytest.raises(HeatoptError, match=f"step of this AdamW was replaced .* leave out {next(iter(setting))}"):
            optimizer.step()
        del plain.step
        optimizer.step()
        assert bool((weight < 1).all())

    ranks(body, min_size=1 if "master_dtype" in setting else 2)


def test_wide_gradients_of_narrow_parameters(ranks: Ranks) -> None:
    """``grad_dtype`` alone, for an algorithm of torch's that takes such gradients."""

    def run(net: Net, optimizer: Any, losses: Any) -> None:
        for parameter in net.parameters():
            parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
            parameter.grad = torch.full_like(parameter, 2.0**-9, dtype=torch.float32)
        optimizer.step()

    def make(net: Net) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.to(torch.bfloat16).parameters(), lr=8.0)

    ranks(lambda comm: assert_alike(comm, make, run))


@each_kind
def test_an_update_that_fails_on_one_rank(ranks: Ranks, shard: str) -> None:
    """All ranks raise at once, with the cause, and are equal: what others own is updated. They can train on."""

    def body(comm: Communicator) -> None:
        parameters = [nn.Parameter(torch.ones(5, 3)) for _ in range(2 * comm.size)]
        plain = Frail(parameters, lr=0.5)
        optimizer = DataParallelOptimizer(plain, comm=comm, shard=shard)
        plain.fails = comm.rank == comm.size - 1
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        error, text = (ArithmeticError, "^a test$") if plain.fails else (RankFailedError, CAUSE)
        with pytest.raises(error, match=text.format(comm.size - 1)):
            optimizer.step()
        parity.assert_ranks_equal(comm, parameters)
        updated = [bool((parameter == 0.5).all()) for parameter in parameters]
        assert sum(updated) == 2 * comm.size - 2
        plain.fails = False
        optimizer.step()
        parity.assert_ranks_equal(comm, parameters)
        assert [parameter[0, 0].item() for parameter in parameters] == [0.5 - 0.5 * number for number in updated]

    ranks(body, min_size=2)


CAUSE = "^rank {} has failed in its part of the update: ArithmeticError: a test; .* have updated theirs"


class Frail(torch.optim.SGD):
    """Updates nothing while it is told to fail."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise ArithmeticError("a test")
        return super().step(closure)


@contextmanager
def sharing_skips(monkeypatch: pytest.MonkeyPatch, skipped: int) -> Iterator[None]:
    """What a rank takes from the ranks after ``skipped`` is lost."""
    from heatopt.sharding._views import _Traffic

    take = _Traffic.take
    with monkeypatch.context() as patch:
        patch.setattr(_Traffic, "take", lambda self, rank, row: None if rank > skipped else take(self, rank, row))
        yield


@pytest.mark.parametrize("skipped", [-1, 0])
def test_a_lost_piece_is_noticed(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, skipped: int) -> None:
    """The tests here are able to fail."""

    def run(net: Net, optimizer: Any, losses: Any) -> None:
        train(optimizer, losses)

    def body(comm: Communicator) -> None:
        with pytest.raises(AssertionError, match=r"differ in|other bits"):
            assert_alike(comm, adamw, run)

    with sharing_skips(monkeypatch, skipped):
        ranks(body, min_size=2)


@pytest.mark.parametrize(
    ("shard", "error", "match"),
    [(None, TypeError, "'none', 'state'"), (1, TypeError, "got 1"), ("gradient", ValueError, "'none', 'state'")],
)
def test_wrong_values(shard: Any, error: type[Exception], match: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=match):
        DataParallelOptimizer(torch.optim.SGD([parameter]), shard=shard)


def test_what_cannot_be_sharded() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="not Other"):
        DataParallelOptimizer(type("Other", (torch.optim.LBFGS,), {})([parameter]), shard="state")
    with pytest.raises(ValueError, match="fuse=True"):
        DataParallelOptimizer(torch.optim.SGD([parameter]), shard="state", fuse=True)
    with pytest.raises(ValueError, match="differentiable"):
        DataParallelOptimizer(torch.optim.SGD([parameter], differentiable=True), shard="state")


class Delegating(torch.optim.Optimizer):
    """Has its parameters updated by an optimizer of its own, as published implementations of Lookahead and SAM do."""

    def __init__(self, parameters: Any) -> None:
        self.fast = torch.optim.SGD(parameters, lr=0.1)
        super().__init__(self.fast.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        return self.fast.step(closure)


@pytest.mark.parametrize("setting", [{"shard": "state"}, {"shard": "gradients"}, {"master_dtype": torch.float32}])
def test_optimizers_that_delegate_are_refused(setting: dict[str, Any]) -> None:
    """The one inside would find no gradients, or its updates would be overwritten by masters."""
    with pytest.raises(ValueError, match=f"{next(iter(setting))}.* Delegating, which has another optimizer, 'fast'"):
        DataParallelOptimizer(Delegating([nn.Parameter(torch.ones(2))]), **setting)


def test_ranks_must_agree(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(heatopt.RankMismatchError, match="setting shard: rank 0 has 'state', rank 1 has 'none'"):
            DataParallelOptimizer(adamw(Net()), comm=comm, shard="none" if comm.rank else "state")

    ranks(body, min_size=2)


def test_blocks_travel_through_one_memory(ranks: Ranks) -> None:
    """Whoever writes the next block's pieces waits until all have read those of the one before."""

    def body(comm: Communicator) -> None:
        kinds = [torch.float32, torch.float64]
        parameters = [torch.full((7, 5 * (i % 3) + 1), float(i), dtype=kinds[i % 2]) for i in range(12)]
        specs = [ShardSpec(i, p.numel(), p.dtype, p.device, i < 8, 1) for i, p in enumerate(parameters)]
        blocks = plan_shards(specs, comm.size, block_bytes=400)
        views = OwnParameters(lambda: comm).views(blocks, parameters, None)
        assert isinstance(views, OwnViews)
        assert len(blocks) > 6
        assert len({memory.own.data_ptr() for memory in views.memories}) == 2
        for round_number in range(3):
            for member in views.members.values():
                member.tensor.add_(comm.rank + 1)
            views.share(comm)
            for block in blocks:
                for piece in block.pieces:
                    found = parameters[piece.index].view(-1)[piece.start : piece.stop]
                    assert found.tolist() == [piece.index + (round_number + 1.0) * (piece.rank + 1)] * found.numel()

    ranks(body, min_size=2)
