"""The wrapper is a torch optimizer: its objects are the wrapped optimizer's own, and all of its calls work."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
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
    batch,
    by_name,
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


def assert_shares(optimizer: heatopt.DataParallelOptimizer) -> None:
    """The wrapper has no groups, state or defaults of its own."""
    inner = optimizer.torch_optimizer
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults


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


# Groups


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


# Closures


@pytest.mark.parametrize("kind", ["number", "scalar", "one element", "none"])
def test_t05_step_returns_the_mean_loss(ranks: Ranks, kind: str) -> None:
    def returned(loss: torch.Tensor) -> Any:
        return {"number": loss.item(), "scalar": loss, "one element": loss.reshape(1), "none": None}[kind]

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        calls = 0

        def closure() -> Any:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = loss_of(model, batch(0, comm.rank))
            loss.backward()
            return returned(loss)

        loss = optimizer.step(closure)
        wanted = loss_of(expected, whole(0, comm.size))
        wanted.backward()
        plain.step()
        assert calls == 1
        assert_close(model, expected)
        if kind == "none":
            assert loss is None
        elif kind == "number":
            assert isinstance(loss, float)
            assert loss == pytest.approx(wanted.item(), rel=1e-12)
        else:
            assert loss.shape == returned(wanted).shape
            assert loss.dtype == torch.float64
            assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        assert len(set(comm.all_gather_object(loss.item() if isinstance(loss, torch.Tensor) else loss))) == 1

    ranks(body)


def test_t05_reduction_is_inside_the_closure(ranks: Ranks) -> None:
    """The closure replaces the gradients, so an average made before it would be lost."""

    def body(comm: Communicator) -> None:
        x = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([x], lr=1.0), comm=comm)

        def closure() -> torch.Tensor:
            x.grad = None
            loss = ((x - (comm.rank + 1)) ** 2 / 2).sum()
            (x.grad,) = torch.autograd.grad(loss, x)  # no hook sees this gradient
            return loss

        optimizer.step(closure)
        assert x.item() == pytest.approx((comm.size + 1) / 2, abs=1e-15)

    ranks(body)


def test_t05_loss_with_history_brings_no_warning(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(0, comm.rank))
            loss.backward()
            return loss

        optimizer.step(closure)

    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns at the first time only, which may have been in another test
    try:
        ranks(body)
    finally:
        torch.set_warn_always(always)


def test_t05_closure_with_keyword_and_no_grad_mode(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        for one, module, data in ((optimizer, model, batch(0, comm.rank)), (plain, expected, whole(0, comm.size))):

            def closure(one: Any = one, module: nn.Module = module, data: Any = data) -> torch.Tensor:
                assert torch.is_grad_enabled()  # also where step() is called without
                one.zero_grad()
                loss = loss_of(module, data)
                loss.backward()
                return loss

            with torch.no_grad():
                one.step(closure=closure)
        assert_close(model, expected)

    ranks(body)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_t06_lbfgs_on_rosenbrock(ranks: Ranks, line_search: str | None) -> None:
    """Each rank has some of the terms; iterates and the number of closure calls are those of one process."""
    terms = 12

    def part(x: torch.Tensor, numbers: range) -> torch.Tensor:
        """Mean of Rosenbrock terms with different constants."""
        return torch.stack([100 * (x[1] - x[0] ** 2) ** 2 / (1 + k) + (1 + k / 50 - x[0]) ** 2 for k in numbers]).mean()

    def run(wrapped: bool, comm: Communicator) -> tuple[list[list[float]], list[float], int]:
        x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        own = range(comm.rank, terms, comm.size) if wrapped else range(terms)
        optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
            [x], lr=0.01 if line_search is None else 1, max_iter=5, line_search_fn=line_search
        )
        if wrapped:
            optimizer = heatopt.DataParallelOptimizer(optimizer, comm=comm)
        calls = 0

        def closure() -> torch.Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = part(x, own)
            loss.backward()
            return loss.detach()

        iterates, losses = [], []
        for _ in range(3):
            losses.append(optimizer.step(closure).item())
            iterates.append(x.tolist())
        return iterates, losses, calls

    def body(comm: Communicator) -> list[list[float]] | None:
        if terms % comm.size:
            return None  # the mean of means needs equal parts
        found, expected = run(True, comm), run(False, comm)
        assert found[2] == expected[2]
        assert torch.tensor(found[0]).allclose(torch.tensor(expected[0]), rtol=1e-6)
        assert found[1] == pytest.approx(expected[1], rel=1e-6)
        return found[0]

    results = ranks(body)
    assert all(result == results[0] for result in results)


# Ownership


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


# Wrong arguments


WRONG_OPTIONS: list[tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...]]] = [
    ({"bucket_mb": 0}, ValueError),
    ({"bucket_mb": -1.0}, ValueError),
    ({"bucket_mb": math.inf}, ValueError),
    ({"bucket_mb": math.nan}, ValueError),
    ({"bucket_mb": "8"}, TypeError),
    ({"bucket_mb": True}, TypeError),
    ({"bucket_mb": None}, TypeError),
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
    # What does not exist is refused, rather than accepted without effect.
    ({"nonsense": 1}, TypeError),
    ({"shard": "none"}, TypeError),
    ({"wire_dtype": None}, TypeError),
    ({"reproducible": False}, TypeError),
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


# State dictionaries


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
