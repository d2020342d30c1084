"""Every scheduler drives a wrapped optimizer of every algorithm as it drives the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import heatopt
from heatopt import lr_scheduler as schedulers
from tests.ranks._training import (
    ALGORITHMS,
    Algorithm,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    fill,
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

Scheduler = Any
MakeScheduler = Callable[[torch.optim.Optimizer], Scheduler]

SCHEDULERS: dict[str, MakeScheduler] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: schedulers.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 4], gamma=0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.7),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, total_iters=2), schedulers.ExponentialLR(o, gamma=0.5)], milestones=[3]
    ),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=4),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, total_iters=4), schedulers.ExponentialLR(o, gamma=0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, factor=0.5, cooldown=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, base_lr=0.001, max_lr=0.01, step_size_up=2, cycle_momentum=_has_momentum(o)
    ),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.01, total_steps=9, cycle_momentum=_has_momentum(o)),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=5, power=2.0),
    "ParamScheduler": lambda o: schedulers.ParamScheduler(
        o, lr=schedulers.WarmupDecay(0.01, 0.001, warmup_steps=2, decay_steps=4, style="cosine")
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.003, anneal_epochs=3),
}

METRICS = [3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9]


def _has_momentum(optimizer: torch.optim.Optimizer) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


def test_every_scheduler_is_covered() -> None:
    names = {
        name
        for name in schedulers.__all__
        if isinstance(getattr(schedulers, name), type) and issubclass(getattr(schedulers, name), torch_scheduler())
    }
    assert names - {"LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}
    assert set(torch.optim.lr_scheduler.__all__) <= set(schedulers.__all__)
    for name in torch.optim.lr_scheduler.__all__:
        assert getattr(schedulers, name) is getattr(torch.optim.lr_scheduler, name)


def torch_scheduler() -> type:
    return torch.optim.lr_scheduler.LRScheduler


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What a scheduler may change."""
    return [{k: copy.copy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def advance(name: str, scheduler: Scheduler, step: int) -> None:
    if name == "ReduceLROnPlateau":
        scheduler.step(METRICS[step])
    else:
        scheduler.step()


class Trained:
    """An optimizer of one matrix, and its scheduler."""

    def __init__(self, algorithm: Algorithm, name: str, comm: Communicator | None) -> None:
        self.name = name
        sparse = algorithm.name == "SparseAdam"
        self.model = fill(nn.Embedding(2, 2, sparse=True) if sparse else nn.Linear(2, 2, bias=False))
        self.input = torch.tensor([0, 1]) if sparse else torch.tensor([[1.0, 2.0]])
        self.closure = algorithm.closure
        kind = getattr(heatopt, algorithm.name)
        self.optimizer = kind(self.model.parameters(), **({"max_iter": 1} if self.closure else {}))
        if comm is not None:
            self.optimizer = heatopt.DataParallelOptimizer(self.optimizer, comm=comm)
        self.scheduler = SCHEDULERS[name](self.optimizer)

    def backward(self) -> float:
        self.optimizer.zero_grad()
        self.model(self.input).sum().backward()
        return 0.0

    def steps(self, numbers: range) -> list[Any]:
        seen = [options_of(self.optimizer)]
        for step in numbers:
            if self.closure:
                self.optimizer.step(self.backward)
            else:
                self.backward()
                self.optimizer.step()
            advance(self.name, self.scheduler, step)
            seen.append(options_of(self.optimizer))
            if isinstance(self.optimizer, heatopt.DataParallelOptimizer):
                assert seen[-1] == options_of(self.optimizer.torch_optimizer)
        return seen

    def resumed_from(self, other: Trained) -> Trained:
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        self.scheduler.load_state_dict(copy.deepcopy(other.scheduler.state_dict()))
        return self


@pytest.mark.parametrize("name", SCHEDULERS)
def test_t12_every_scheduler_on_every_algorithm(ranks: Ranks, name: str) -> None:
    """Same options as with the plain optimizer after each step, also after loading both state dictionaries.

    A warning that the scheduler was stepped before the optimizer would be an error here.
    """

    def body(comm: Communicator) -> None:
        for number, algorithm in enumerate(ALGORITHMS):
            wrapped, plain = Trained(algorithm, name, comm), Trained(algorithm, name, None)
            found = wrapped.steps(range(3))
            assert found == plain.steps(range(3)), algorithm.name
            if (number + list(SCHEDULERS).index(name)) % 3 == 0:  # each scheduler and each algorithm, but not each pair
                wrapped = Trained(algorithm, name, comm).resumed_from(wrapped)
                plain = Trained(algorithm, name, None).resumed_from(plain)
            found += wrapped.steps(range(3, 5))
            assert found[4:] == plain.steps(range(3, 5)), algorithm.name
            assert_equal(wrapped.model, plain.model)  # all ranks have the same gradients here
            assert any(options != found[0] for options in found), f"{name} has changed nothing"

    ranks(body)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_t12_scheduled_training_equals_one_process(ranks: Ranks, name: str) -> None:
    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Any]) -> None:
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(4):
            train(optimizer, model, [data(step)])
            advance(name, scheduler, step)

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, adamw, model), adamw(expected)
        run(optimizer, model, lambda step: batch(step, comm.rank))
        run(plain, expected, lambda step: whole(step, comm.size))
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t12_step_stays_a_bound_method(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        optimizer = wrap(comm, sgd, net())
        assert optimizer.step.__func__ is heatopt.DataParallelOptimizer.step
        assert optimizer.step.__self__ is optimizer

    ranks(body)


def test_t12_scheduler_before_the_step_still_warns(ranks: Ranks) -> None:
    """The detection of a wrong order works as for a plain optimizer."""

    def body(comm: Communicator) -> None:
        scheduler = schedulers.StepLR(wrap(comm, sgd, net()), 2)
        # Warnings are errors here; catching one in a thread would change the filters of all.
        with pytest.raises(UserWarning, match=r"before `optimizer\.step\(\)`"):
            scheduler.step()

    ranks(body)


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
def test_scheduler_of_the_wrapped_optimizer(ranks: Ranks, when: str) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        inner = sgd(model)
        scheduler = schedulers.StepLR(inner, 1, gamma=0.5) if when == "before wrapping" else None
        optimizer = heatopt.DataParallelOptimizer(inner, model=model, comm=comm)
        scheduler = scheduler or schedulers.StepLR(optimizer.torch_optimizer, 1, gamma=0.5)
        plain = sgd(expected)
        plain_scheduler = schedulers.StepLR(plain, 1, gamma=0.5)
        for step in range(3):
            train(optimizer, model, [batch(step, comm.rank)])
            train(plain, expected, [whole(step, comm.size)])
            scheduler.step()
            plain_scheduler.step()
            assert options_of(optimizer) == options_of(plain)
        assert_close(model, expected)

    ranks(body)


def test_learning_rate_that_is_a_tensor(ranks: Ranks) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        rate = torch.tensor(0.01, dtype=torch.float64)
        return torch.optim.Adam(model.parameters(), lr=rate, foreach=False, capturable=False)

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, make, model), make(expected)
        rate = optimizer.param_groups[0]["lr"]
        pair = [schedulers.ExponentialLR(one, 0.5) for one in (optimizer, plain)]
        for step in range(3):
            train(optimizer, model, [batch(step, comm.rank)])
            train(plain, expected, [whole(step, comm.size)])
            for scheduler in pair:
                scheduler.step()
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(0.01 / 8)
        assert_close(model, expected)

    ranks(body)


def test_metric_that_differs_between_ranks_is_named(ranks: Ranks) -> None:
    """A plateau on one rank only would let the ranks' learning rates, and then their parameters, drift apart."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        for step in range(2):
            train(optimizer, model, [batch(step, comm.rank)])
            scheduler.step(1.0 + step if comm.rank == comm.size - 1 else 1.0 - step)
        with pytest.raises(heatopt.RankMismatchError, match=rf"'lr'.*rank 0 has 0\.1, rank {comm.size - 1} has 0\.05"):
            train(optimizer, model, [batch(2, comm.rank)])
        assert_ranks_equal(comm, model)  # nothing was applied with different rates

    ranks(body, min_size=2)


def test_swa_and_ema_models_beside_the_wrapper(ranks: Ranks) -> None:
    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Any]) -> list[nn.Module]:
        averages = [
            swa_utils.AveragedModel(model),
            swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)),
        ]
        scheduler = swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
        for step in range(4):
            train(optimizer, model, [data(step)])
            scheduler.step()
            for average in averages:
                average.update_parameters(model)
        return averages

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        found = run(wrap(comm, adamw, model), model, lambda step: batch(step, comm.rank))
        wanted = run(adamw(expected), expected, lambda step: whole(step, comm.size))
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
        assert_ranks_equal(comm, *found)

    ranks(body)


def test_ema_copy_has_no_hooks(ranks: Ranks) -> None:
    """One rank alone may compute gradients of a copied model: nothing waits for the others."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        if comm.rank == 0:
            average = copy.deepcopy(model)
            loss_of(average, batch(9, 0)).backward()
        train(optimizer, model, [batch(0, comm.rank)])
        expected = net()
        reference(sgd, expected, comm.size, 1)
        assert_close(model, expected)

    ranks(body)
