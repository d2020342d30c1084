"""The wrapper is a torch optimizer: its objects are the wrapped optimizer's own, and all of its calls work."""

from __future__ import annotations

import copy
import math
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._training import (
    ALGORITHMS,
    TINY,
    Algorithm,
    adamw,
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


every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)


@every_algorithm
def test_every_algorithm_is_wrapped_as_itself(ranks: Ranks, algorithm: Algorithm) -> None:
    def body(comm: Communicator) -> None:
        model = algorithm.model()
        inner = algorithm.optimizer(model)
        groups, state, defaults = inner.param_groups, inner.state, inner.defaults
        members = [id(p) for group in groups for p in group["params"]]
        optimizer = heatopt.DataParallelOptimizer(inner, model=model, comm=comm, bucket_mb=TINY)
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert optimizer.torch_optimizer is inner
        assert inner.param_groups is groups
        assert inner.state is state
        assert inner.defaults is defaults
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == members
        assert_shares(optimizer)
        algorithm.update(optimizer, model, batch(0, comm.rank))
        assert_shares(optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        assert_shares(optimizer)
        algorithm.update(optimizer, model, batch(1, comm.rank))
        assert_shares(optimizer)
        assert_shares(copy.deepcopy(optimizer))
        assert_shares(pickle.loads(pickle.dumps(optimizer)))

    ranks(body)


def test_changes_reach_both_optimizers(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        optimizer.param_groups[0]["lr"] = 0.25
        assert optimizer.torch_optimizer.param_groups[0]["lr"] == 0.25
        optimizer.torch_optimizer.param_groups[0]["lr"] = 0.5
        assert optimizer.param_groups[0]["lr"] == 0.5
        optimizer.defaults["lr"] = 0.125
        assert optimizer.torch_optimizer.defaults["lr"] == 0.125
        for name, value in (("state", {}), ("param_groups", list(optimizer.param_groups)), ("defaults", {})):
            setattr(optimizer, name, value)
            assert getattr(optimizer.torch_optimizer, name) is value
            assert_shares(optimizer)

    ranks(body)


def test_constructor_starts_all_ranks_from_rank_0(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net(seed=comm.rank)
        model.register_buffer("count", torch.tensor([comm.rank]))
        model.register_parameter("other", nn.Parameter(torch.full((2,), float(comm.rank), dtype=torch.float16)))
        inner = torch.optim.SGD([p for name, p in model.named_parameters() if name != "other"], lr=0.1)
        optimizer = heatopt.DataParallelOptimizer(inner, model=model, comm=comm)
        assert_equal(list(model.parameters())[1:], list(net(seed=0).parameters()))
        assert model.count.item() == 0
        assert model.other.tolist() == [0.0, 0.0]
        del optimizer

        separate = net(seed=comm.rank)
        heatopt.DataParallelOptimizer(sgd(separate), comm=comm)  # without model=
        assert_equal(separate, net(seed=0))

    ranks(body)


def test_existing_state_is_kept(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        inner = adamw(model)
        train(inner, model, [whole(step, comm.size) for step in range(2)])
        before = [inner.state[p]["exp_avg"] for p in model.parameters()]
        saved = copy.deepcopy(inner.state_dict())
        optimizer = heatopt.DataParallelOptimizer(inner, comm=comm, bucket_mb=TINY)
        for parameter, tensor in zip(model.parameters(), before, strict=True):
            assert optimizer.state[parameter]["exp_avg"] is tensor
        assert_equal(optimizer, saved)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2, 5)])
        expected = net()
        assert_close(optimizer, reference(adamw, expected, comm.size, 5))
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_existing_state_becomes_that_of_rank_0(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        inner = adamw(model)
        train(inner, model, [batch(0, comm.rank)])  # ranks have trained apart
        assert_shares(heatopt.DataParallelOptimizer(inner, comm=comm))
        expected = net()
        plain = adamw(expected)
        train(plain, expected, [batch(0, 0)])
        assert_equal(inner, plain)
        assert_equal(model, expected)

    ranks(body)


def test_state_on_some_ranks_only_is_refused(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        inner = adamw(model)
        if comm.rank == comm.size - 1:
            train(inner, model, [batch(0, 0)])
        with pytest.raises(heatopt.RankMismatchError, match="state"):
            heatopt.DataParallelOptimizer(inner, comm=comm)

    ranks(body, min_size=2)


def test_repr_shows_the_algorithm_and_its_groups(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        inner = torch.optim.RMSprop([{"params": model[0].parameters(), "lr": 0.125}, {"params": model[2].parameters()}])
        text = repr(heatopt.DataParallelOptimizer(inner, comm=comm))
        assert "RMSprop" in text
        assert "Parameter Group 1" in text
        assert "lr: 0.125" in text

    ranks(body)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("through", ["wrapper", "inner", "model"])
def test_zero_grad(ranks: Ranks, set_to_none: bool, through: str) -> None:
    """A cleared gradient of None leaves AdamW's parameter alone; one of zeros lets it decay: as in plain torch."""

    def clear(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        if through == "model":
            model.zero_grad(set_to_none=set_to_none)
        else:
            inner = getattr(optimizer, "torch_optimizer", optimizer)
            (optimizer if through == "wrapper" else inner).zero_grad(set_to_none=set_to_none)

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model), adamw(expected)
        for step in range(3):
            for one, module, data in (
                (optimizer, model, batch(step, comm.rank)),
                (plain, expected, whole(step, comm.size)),
            ):
                clear(one, module)
                loss_of(module, data).backward()
                one.step()
                clear(one, module)
                if set_to_none:
                    assert all(p.grad is None for p in module.parameters())
                else:
                    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
                one.step()
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_defaults_of_zero_grad_is_none(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        loss_of(model, batch(0, comm.rank)).backward()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    ranks(body)


def test_step_without_closure_returns_none(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        assert optimizer.step() is None  # no gradient anywhere
        loss_of(model, batch(0, comm.rank)).backward()
        assert optimizer.step() is None

    ranks(body)


def test_gradients_are_averages_when_backward_returns(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        for step in range(2):
            loss_of(model, batch(step, comm.rank)).backward()
            loss_of(expected, whole(step, comm.size)).backward()
            found = [p.grad for p in model.parameters()]
            assert_close(found, [p.grad for p in expected.parameters()])
            assert_ranks_equal(comm, found)
            before = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            assert_equal([p.grad for p in model.parameters()], before)  # step leaves gradients as they are
            expected.load_state_dict(model.state_dict())
            optimizer.zero_grad()
            expected.zero_grad()

    ranks(body)


def test_settings_do_not_change_the_result(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for options in (
            {"bucket_mb": 1},
            {"bucket_mb": TINY},
            {"bucket_mb": TINY, "blocking": False},
            {"bucket_mb": 2 * TINY, "blocking": True, "model": None},
            {"bucket_mb": 8, "blocking": False, "model": None},
            {"bucket_mb": 1000, "timeout": 30},
        ):
            model = net(torch.float32)
            optimizer = wrap(comm, sgd, model, **options)
            train(optimizer, model, [batch(step, comm.rank, dtype=torch.float32) for step in range(3)])
            assert_ranks_equal(comm, model, optimizer)
            results.append(model)
            assert_equal(model, results[0])
            del optimizer

    ranks(body)


def test_blocking_is_the_second_positional_argument(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for blocking in (True, False):
            model = net()
            optimizer = heatopt.DataParallelOptimizer(sgd(model), blocking, comm=comm)
            train(optimizer, model, [batch(0, comm.rank)])
            with pytest.raises(TypeError):
                heatopt.DataParallelOptimizer(sgd(net()), blocking, net(), comm=comm)  # type: ignore[misc]

    ranks(body)


WRONG_OPTIONS: list[tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...]]] = [
    ({"bucket_mb": 0}, ValueError),
    ({"bucket_mb": -1.0}, ValueError),
    ({"bucket_mb": math.inf}, ValueError),
    ({"bucket_mb": math.nan}, ValueError),
    ({"bucket_mb": "8"}, TypeError),
    ({"bucket_mb": True}, TypeError),
    ({"wire_dtype": "bfloat16"}, TypeError),
    ({"wire_dtype": torch.float32}, ValueError),
    ({"reproducible": None}, TypeError),
    ({"accumulation_steps": 0}, ValueError),
    ({"accumulation_steps": -2}, ValueError),
    ({"accumulation_steps": 2.0}, (TypeError, ValueError)),
    ({"accumulation_steps": True}, (TypeError, ValueError)),
    ({"accumulation_steps": "2"}, (TypeError, ValueError)),
    ({"timeout": -1}, ValueError),
    ({"timeout": math.nan}, ValueError),
    ({"timeout": "10"}, TypeError),
    ({"timeout": True}, TypeError),
    ({"blocking": 1}, TypeError),
    ({"blocking": "yes"}, TypeError),
    ({"model": "net"}, TypeError),
    ({"model": nn.Linear}, TypeError),
    ({"comm": 2}, TypeError),
    ({"shard": "gradient"}, ValueError),
    ({"shard": 1}, TypeError),
    # What does not exist is refused, rather than accepted without effect.
    ({"nonsense": 1}, TypeError),
    ({"on_rank_failure": "abort"}, TypeError),
]


def test_wrong_arguments(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        for options, error in WRONG_OPTIONS:
            with pytest.raises(error, match=next(iter(options))):
                heatopt.DataParallelOptimizer(sgd(model), **{"comm": comm} | options)
        for wrong in (None, "SGD", torch.optim.SGD, [torch.optim.SGD], model):
            with pytest.raises(TypeError, match="torch_optimizer"):
                heatopt.DataParallelOptimizer(wrong, comm=comm)  # type: ignore[arg-type]
        wrap(comm, sgd, model)  # nothing is left of the failed ones

    ranks(body)


class Lion(torch.optim.Optimizer):
    """An algorithm that torch does not have, with an option of its own and no ``foreach``."""

    def __init__(self, params: Any, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "note": "mine"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                first, second = group["betas"]
                parameter.sub_(group["lr"] * torch.tanh(100 * average.lerp(parameter.grad, 1 - first)))
                average.lerp_(parameter.grad, 1 - second)
        return loss


def test_optimizer_that_is_not_torchs(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        def make(model: nn.Module) -> torch.optim.Optimizer:
            return Lion(model.parameters())

        model, expected = net(), net()
        optimizer = wrap(comm, make, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(3)])
        assert_close(optimizer, reference(make, expected, comm.size, 3), rtol=1e-7)
        assert_close(model, expected, rtol=1e-7)
        assert_ranks_equal(comm, model, optimizer)
        module, duplicate = copy.deepcopy((model, optimizer))
        train(duplicate, module, [batch(3, comm.rank)])
        train(optimizer, model, [batch(3, comm.rank)])
        assert_equal(module, model)

    ranks(body)


def test_no_amp_support_is_claimed(ranks: Ranks) -> None:
    """T9: a scaler would hand its scale to whatever claims support, and the wrapper would make steps too long."""

    def body(comm: Communicator) -> None:
        model = net(torch.float32)
        inner = torch.optim.Adam(model.parameters(), fused=True)
        assert inner._step_supports_amp_scaling
        optimizer = heatopt.DataParallelOptimizer(inner, comm=comm)
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)

    ranks(body)


def test_t29_construction_leaves_the_random_state_alone(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        inner = adamw(model)
        comm.barrier()  # threads share one generator, and others may be building their models
        before = torch.get_rng_state()
        optimizer = heatopt.DataParallelOptimizer(inner, model=model, comm=comm)
        train(optimizer, model, [batch(0, comm.rank)])
        assert torch.equal(torch.get_rng_state(), before)
        comm.barrier()

    ranks(body)
