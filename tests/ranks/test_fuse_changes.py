"""``fuse=True``, and what users do to parameters, states and groups between steps."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import heatopt
from tests.ranks.test_fuse import (
    DEFAULTS,
    fused,
    give_gradients,
    make_parameters,
    one_process,
    result,
    train,
    two_groups,
)
from tests.support import parity
from tests.support.algorithms import Case
from tests.support.problems import random

pytestmark = one_process

LOOPS = [Case(case.algorithm, {"foreach": False}) for case in DEFAULTS]
ADAM = Case(torch.optim.Adam, {"foreach": False})
MOMENTUM = Case(torch.optim.SGD, {"foreach": False, "momentum": 0.9})
by_name = pytest.mark.parametrize("case", LOOPS, ids=lambda case: case.name)

Optimizer = torch.optim.Optimizer
Change = Callable[[Any, list[nn.Parameter]], None]


def inner(optimizer: Optimizer) -> Optimizer:
    return getattr(optimizer, "torch_optimizer", optimizer)


def replace_data(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters[1].data = parameters[1].data + 1


def replace_all_data(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def replace_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    state = optimizer.state[parameters[2]]
    for key, value in state.items():
        state[key] = value + 1 if key == "step" else value * 0.5


def write_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    for key, value in optimizer.state[parameters[5]].items():
        value.add_(2) if key == "step" else value.mul_(0.5)


def write_state_behind_autograd(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    for parameter in (parameters[0], parameters[5]):
        for key, value in optimizer.state[parameter].items():
            value.data.fill_(3) if key == "step" else value.data.mul_(0.5)


def forget_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    del optimizer.state[parameters[4]]


def load_own_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_earlier_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    kept = copy.deepcopy(optimizer.state_dict())
    train(optimizer, parameters, [20])
    optimizer.load_state_dict(kept)


def freeze(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters[1].requires_grad_(False)
    parameters[6].requires_grad_(True)


def add_group(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters.append(nn.Parameter(random((5,), parameters[0].dtype, 77)))
    optimizer.add_param_group({"params": [parameters[-1]], "lr": 0.01})


def change_options(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.param_groups[1]["weight_decay"] = 0.3


def tensor_rate(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def move_between_groups(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    first, second = optimizer.param_groups[:2]
    second["params"].insert(0, first["params"].pop())


def step_without_us(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    give_gradients(parameters, 2)
    inner(optimizer).step()


def to_other_precision(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    module = nn.ParameterList(parameters)
    module.to(torch.float32)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in parameters:
        parameter.grad = None


CHANGES = [
    replace_data,
    replace_all_data,
    replace_state,
    write_state,
    write_state_behind_autograd,
    forget_state,
    load_own_state,
    load_earlier_state,
    freeze,
    add_group,
    change_options,
    tensor_rate,
    move_between_groups,
    step_without_us,
    to_other_precision,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("case", [ADAM, MOMENTUM], ids=lambda case: case.name)
def test_changes_are_noticed(case: Case, change: Change) -> None:
    results = []
    for wrap in (fused, lambda optimizer: optimizer):
        parameters = make_parameters()
        optimizer = wrap(two_groups(case, parameters))
        train(optimizer, parameters, range(5))
        change(optimizer, parameters)
        train(optimizer, parameters, range(3, 8))
        results.append(result(optimizer, parameters))
    parity.assert_same_bits(*results, change.__name__)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed_without_the_loop_in_c(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    test_changes_are_noticed(ADAM, change)


@pytest.mark.parametrize("change", [replace_state, write_state, load_own_state], ids=lambda change: change.__name__)
@by_name
def test_changes_of_states(case: Case, change: Change) -> None:
    test_changes_are_noticed(case, change)


@pytest.mark.parametrize("case", [ADAM, MOMENTUM], ids=lambda case: case.name)
def test_states_that_are_forgotten_right_after_the_step_that_made_them(case: Case) -> None:
    results = []
    for wrap in (fused, lambda optimizer: optimizer):
        parameters = make_parameters()
        optimizer = wrap(two_groups(case, parameters))
        train(optimizer, parameters, [4])
        optimizer.state.clear()
        train(optimizer, parameters, [5])
        forget_state(optimizer, parameters)
        train(optimizer, parameters, [6])
        forget_state(optimizer, parameters)
        train(optimizer, parameters, [7])
        results.append(result(optimizer, parameters))
    parity.assert_same_bits(*results, "the parameters and states")


def test_gradients_that_lie_close_together() -> None:
    """Between them there is less room than between parameters in flat memory, and torch's loop writes into them."""
    results = []
    for wrap in (fused, lambda optimizer: optimizer):
        parameters = make_parameters([torch.float32])
        options = {"momentum": 0.9, "nesterov": True, "foreach": True}
        optimizer = wrap(torch.optim.SGD(parameters, lr=0.1, **options))  # type: ignore[arg-type]
        for step in range(4, 8):
            give_gradients(parameters, step)
            order = list(reversed(parameters))
            flat = torch.cat([p.grad.reshape(-1) for p in order if p.grad is not None])
            parts = flat.split([p.numel() for p in order])
            for parameter, part in zip(order, parts, strict=True):
                parameter.grad = part.view(parameter.shape)
            parameters[1].grad = None  # so that no two small ones are neighbours in both memories
            optimizer.step()
        results.append(result(optimizer, parameters))
    parity.assert_same_bits(*results, "the parameters and states")


def test_transposed_where_it_is() -> None:
    parameters = make_parameters()
    optimizer = fused(torch.optim.SGD(parameters, lr=0.1, foreach=False))
    train(optimizer, parameters, range(4, 6))
    before = parameters[4].detach().clone()
    parameters[4].data = parameters[4].data.t()
    give_gradients(parameters, 6)
    optimizer.step()
    gradient = parameters[4].grad
    assert gradient is not None
    assert torch.equal(parameters[4].detach(), before.t().add(gradient, alpha=-0.1))


def test_parts_of_what_they_were() -> None:
    """They begin at the same address, with the same strides."""
    runs = []
    for fuse in (True, False):
        parameters = [nn.Parameter(torch.ones(shape)) for shape in ((6,), (5, 3))]
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        if fuse:
            optimizer = heatopt.DataParallelOptimizer(optimizer, fuse=True)
        for length in (6, 3, 3, 2):
            for parameter in parameters:
                parameter.data = parameter.data[:length]
                parameter.grad = torch.arange(float(parameter.numel())).view(parameter.shape)
            optimizer.step()
        runs.append([parameter.detach() for parameter in parameters])
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "other", [lambda data: data.view(4, 2), lambda data: data.view(torch.bfloat16)], ids=["shape", "dtype"]
)
def test_other_views_of_what_they_were(other: Callable[[Tensor], Tensor]) -> None:
    """They begin at the same address, and have as many bytes."""
    runs = []
    for fuse in (True, False):
        parameters = [nn.Parameter(torch.ones(8, dtype=torch.float16)) for _ in range(2)]
        optimizer = torch.optim.SGD(parameters, lr=0.5, foreach=False)
        if fuse:
            optimizer = heatopt.DataParallelOptimizer(optimizer, fuse=True)
        for step in range(3):
            if step == 1:
                parameters[1].data = other(parameters[1].data)
            for parameter in parameters:
                parameter.grad = torch.arange(8.0).view(parameter.shape).to(parameter.dtype)
            optimizer.step()
        runs.append([parameter.detach() for parameter in parameters])
    parity.assert_same_bits(*runs, "the parameters")


def test_what_was_replaced_is_left_alone() -> None:
    """Memory that a parameter or state has been taken out of may be somebody's backup."""
    parameters = make_parameters()
    optimizer = fused(torch.optim.Adam(parameters))
    train(optimizer, parameters, range(5))
    backups = [parameters[0].data, optimizer.state[parameters[0]]["exp_avg"]]
    kept = [backup.clone() for backup in backups]
    parameters[0].data = parameters[0].data.clone()
    optimizer.state[parameters[0]]["exp_avg"] = torch.zeros_like(parameters[0])
    train(optimizer, parameters, range(5, 7))
    assert all(map(torch.equal, backups, kept))


def test_gradients_are_not_kept_or_changed() -> None:
    parameters = make_parameters()
    optimizer = fused(torch.optim.AdamW(parameters, maximize=True, weight_decay=0.1))
    give_gradients(parameters, 5)
    before = [(p.grad, p.grad.clone()) for p in parameters if p.grad is not None]
    optimizer.step()
    for parameter, (gradient, value) in zip(parameters, before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)


def test_autograd_notices_the_update() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = fused(torch.optim.SGD([parameter], lr=0.1))
    for _ in range(2):
        loss = parameter.square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Checkpoints and copies


@by_name
def test_state_dict_goes_both_ways(case: Case) -> None:
    results = []
    for first, second in itertools.product((fused, lambda optimizer: optimizer), repeat=2):
        parameters = make_parameters()
        optimizer = first(two_groups(case, parameters))
        train(optimizer, parameters, range(5))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        del optimizer
        resumed = second(two_groups(case, parameters))
        resumed.load_state_dict(torch.load(file, weights_only=True))
        train(resumed, parameters, range(5, 8))
        results.append(result(resumed, parameters))
    for found in results[:-1]:
        parity.assert_same_bits(found, results[-1], "the resumed training")


def test_files_are_not_larger() -> None:
    sizes = []
    for wrap in (fused, lambda optimizer: optimizer):
        parameters = [nn.Parameter(torch.ones(100)) for _ in range(50)]
        optimizer = wrap(torch.optim.Adam(parameters))
        train(optimizer, parameters, range(4, 6))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        sizes.append(len(file.getvalue()))
    assert sizes[0] < 1.2 * sizes[1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_step_for_themselves(duplicate: Callable[[Any], Any]) -> None:
    module = nn.ParameterList(make_parameters())
    optimizer = fused(two_groups(ADAM, list(module)))
    train(optimizer, list(module), range(4))
    before = copy.deepcopy(result(optimizer, module))
    other_module, other = duplicate((module, optimizer))
    train(other, list(other_module), range(4, 6))
    parity.assert_same_bits(result(optimizer, module), before, "the original")
    train(optimizer, list(module), range(4, 6))
    parity.assert_same_bits(result(other, other_module), result(optimizer, module), "the copy")


# Hooks, schedulers, closures


def test_hooks_fire_once() -> None:
    parameters = make_parameters()
    plain = torch.optim.Adam(parameters)
    calls: list[str] = []
    plain.register_step_pre_hook(lambda o, *_: calls.append(f"pre {o is plain}"))
    plain.register_step_post_hook(lambda o, *_: calls.append(f"post {o is plain}"))
    handle = register_optimizer_step_post_hook(lambda o, *_: calls.append("global"))
    try:
        train(fused(plain), parameters, [5])
    finally:
        handle.remove()
    assert calls == ["pre True", "post True", "global"]


@pytest.mark.parametrize("of_wrapped", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_schedulers(of_wrapped: bool, before: bool) -> None:
    results = []
    for wrap in (fused, lambda optimizer: optimizer):
        parameters = make_parameters()
        plain = two_groups(ADAM, parameters)
        early = heatopt.lr_scheduler.StepLR(plain, 2, gamma=0.5) if before else None
        optimizer = wrap(plain)
        scheduler = early or heatopt.lr_scheduler.StepLR(plain if of_wrapped else optimizer, 2, gamma=0.5)
        for step in range(4, 9):
            train(optimizer, parameters, [step])
            scheduler.step()  # warns, which is an error here, if it has seen no step
        results.append(result(optimizer, parameters))
        del results[-1]["optimizer"]["param_groups"]
    parity.assert_same_bits(*results, "the scheduled training")


def test_closure() -> None:
    parameters = make_parameters()
    optimizer = fused(torch.optim.SGD(parameters, lr=0.1))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in parameters]).sum()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(4)]  # type: ignore[arg-type]
    assert losses == sorted(losses, reverse=True)


def test_step_after_an_error() -> None:
    parameters = make_parameters()
    optimizer = fused(two_groups(ADAM, parameters))
    train(optimizer, parameters, range(4))
    rate = optimizer.param_groups[0].pop("lr")
    with pytest.raises(KeyError):
        train(optimizer, parameters[:5], [4])
    optimizer.param_groups[0]["lr"] = rate
    train(optimizer, parameters, [5])
