"""FusedAdam is torch's Adam, whatever the dtypes, and notices parameters that were re-allocated."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import heatopt
from heatopt.compat import npu
from tests.ranks._training import (
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    loss_of,
    net,
    tensors_of,
    train,
    whole,
)
from tests.support import parity
from tests.support.problems import random
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

SHAPES = [(2, 3), (4, 3), (5, 3), (7,), (), (0, 3), (129,), (2, 3, 5), (300, 300)]
# Steps of the kernel and of torch's loop differ by roundings of the parameters' own dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
OPTIONS: dict[str, Any] = {"lr": 2e-3, "betas": (0.8, 0.95), "eps": 1e-3}


def mixed() -> list[nn.Parameter]:
    """Each shape in each dtype."""
    return [nn.Parameter(random(shape, dtype, 3, number)) for number, shape in enumerate(SHAPES) for dtype in TOLERANCE]


def give_gradients(parameters: Iterable[torch.Tensor], step: int) -> None:
    """One in four has none."""
    for number, parameter in enumerate(parameters):
        parameter.grad = None if (number + step) % 4 == 0 else random(parameter.shape, parameter.dtype, 5, step, number)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_mixed_dtypes_in_one_group(ranks: Ranks, amsgrad: bool, weight_decay: float) -> None:
    def body(comm: Communicator) -> None:
        ours, theirs = mixed(), mixed()
        options = {**OPTIONS, "amsgrad": amsgrad, "weight_decay": weight_decay}
        optimizer, plain = heatopt.FusedAdam(ours, **options, comm=comm), torch.optim.Adam(theirs, **options)
        for step in range(5):
            give_gradients(ours, step)
            give_gradients(theirs, step)
            optimizer.step()
            plain.step()
        for mine, other in zip(ours, theirs, strict=True):
            parity.assert_close(mine.detach(), other.detach(), TOLERANCE[other.dtype], "a parameter")
            state, expected = optimizer.state[mine], plain.state[other]
            assert list(state) == list(expected)
            assert state["step"] == expected["step"]
            for key in expected.keys() - {"step"}:
                parity.assert_close(state[key], expected[key], TOLERANCE[other.dtype], key)
        assert_ranks_equal(comm, ours, optimizer)

    ranks(body)


def test_training_equals_one_process(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = heatopt.FusedAdam(model.parameters(), **OPTIONS, comm=comm, model=model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(4)])
        train(torch.optim.Adam(expected.parameters(), **OPTIONS), expected, [whole(s, comm.size) for s in range(4)])
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_is_the_fused_wrapper_of_adam() -> None:
    assert npu.NpuFusedAdam is heatopt.FusedAdam
    model, other = net(), net()
    ours = heatopt.FusedAdam(model.parameters(), 1e-2, (0.8, 0.95), 1e-3, 0.1, True)
    theirs = heatopt.DataParallelOptimizer(
        torch.optim.Adam(other.parameters(), 1e-2, (0.8, 0.95), 1e-3, 0.1, True), fuse=True
    )
    for one, module in ((ours, model), (theirs, other)):
        train(one, module, [batch(0, 0), batch(1, 0)])
    assert_equal(model, other)
    assert_equal(ours, theirs)
    assert {k: v for k, v in ours.defaults.items() if k in ("lr", "betas", "eps", "weight_decay", "amsgrad")} == {
        "lr": 1e-2,
        "betas": (0.8, 0.95),
        "eps": 1e-3,
        "weight_decay": 0.1,
        "amsgrad": True,
    }


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-8}, {"weight_decay": -0.1}]
)
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        heatopt.FusedAdam([nn.Parameter(torch.ones(2))], **wrong)


def test_fuse_is_no_option() -> None:
    with pytest.raises(TypeError, match="multiple values for keyword argument 'fuse'"):
        heatopt.FusedAdam([nn.Parameter(torch.ones(2))], fuse=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foreach'"):
        heatopt.FusedAdam([nn.Parameter(torch.ones(2))], foreach=True)


# Parameters that are re-allocated


def twins(comm: Communicator) -> tuple[nn.Module, heatopt.FusedAdam, nn.Module, torch.optim.Adam]:
    """After two steps: a model with its optimizer, and the same in one process."""
    model, expected = net(torch.float32), net(torch.float32)
    optimizer = heatopt.FusedAdam(model.parameters(), **OPTIONS, comm=comm, model=model)
    plain = torch.optim.Adam(expected.parameters(), **OPTIONS)
    go_on(comm, model, optimizer, expected, plain, range(2))
    return model, optimizer, expected, plain


def go_on(
    comm: Communicator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    expected: nn.Module,
    plain: torch.optim.Optimizer,
    steps: Iterable[int],
) -> None:
    """Train both; every step is compared."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        train(optimizer, model, [batch(step, comm.rank, dtype=dtype)])
        train(plain, expected, [whole(step, comm.size, dtype=dtype)])
        assert_close(model, expected, rtol=1e-4, atol=1e-5)


def other_data(model: nn.Module) -> None:
    first = next(model.parameters())
    first.data = torch.full_like(first, 0.25)


def all_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def to_cpu(model: nn.Module) -> None:
    """Where it is already; and in new memory all the same, as from another device."""
    model.cpu()
    model._apply(lambda tensor: tensor.clone())


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


@pytest.mark.parametrize("change", [other_data, all_data, to_cpu, in_place])
def test_other_data_are_taken_up(ranks: Ranks, change: Callable[[nn.Module], None]) -> None:
    def body(comm: Communicator) -> None:
        model, optimizer, expected, plain = twins(comm)
        change(model)
        change(expected)
        go_on(comm, model, optimizer, expected, plain, range(2, 5))
        assert all(state["step"] == 5 for state in optimizer.state.values())
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_other_precision_takes_the_state_along(ranks: Ranks) -> None:
    """torch's Adam itself cannot go on there; so it is given the state in the new precision."""

    def body(comm: Communicator) -> None:
        model, optimizer, expected, plain = twins(comm)
        model.double()
        expected.double()
        for state in plain.state.values():
            state.update({key: state[key].double() for key in ("exp_avg", "exp_avg_sq")})
        go_on(comm, model, optimizer, expected, plain, range(2, 5))
        dtypes = {tensor.dtype for state in optimizer.state.values() for key, tensor in state.items() if key != "step"}
        assert dtypes == {torch.float64}
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@pytest.mark.parametrize("other", [lambda data: torch.zeros(2, 2), lambda data: data[:2, :2], lambda data: data[:1]])
def test_data_of_another_shape_are_refused(ranks: Ranks, other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Also a part of the former data, which begins at the same address."""

    def body(comm: Communicator) -> None:
        model, optimizer, _, _ = twins(comm)
        first = next(model.parameters())
        kept = first.data
        before = [t.clone() for t in tensors_of(optimizer)]
        first.data = other(kept)
        first.grad = torch.ones_like(first)
        with pytest.raises(ValueError, match=r"'0\.weight' has another shape, \(., .\), than its state, \(6, 4\): del"):
            optimizer.step()
        assert_equal(tensors_of(optimizer), before)
        first.data = kept
        train(optimizer, model, [batch(2, comm.rank, dtype=torch.float32)])

    ranks(body)


def test_other_data_where_the_parameter_once_was() -> None:
    """Where it was before its first step, other tensors may lie after that, of another dtype too."""
    parameter = nn.Parameter(torch.ones(8))
    once = parameter.data
    optimizer = heatopt.FusedAdam([parameter])
    parameter.grad = torch.ones(8)
    optimizer.step()
    parameter.data = once.view(torch.bfloat16)[:8].zero_()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {optimizer.state[parameter][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    assert torch.equal(parameter.detach(), torch.full((8,), -1e-3, dtype=torch.bfloat16))


@pytest.mark.parametrize("replacement", [nn.Parameter(torch.ones(3)), None], ids=["another", "None"])
def test_parameter_that_left_the_module_is_named(ranks: Ranks, replacement: nn.Parameter | None) -> None:
    def body(comm: Communicator) -> None:
        model, optimizer, _, _ = twins(comm)
        model[4].bias = copy.deepcopy(replacement)  # type: ignore[index]
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=r"parameter '4\.bias' is no longer in the model: it was replaced or"):
            train(optimizer, model, [batch(2, comm.rank, dtype=torch.float32)])
        assert_equal([p.detach() for p in model.parameters()], before)

    ranks(body)


def test_tied_parameter_that_was_replaced_in_one_place() -> None:
    """It is still in the model, but what took its place is not updated by anyone."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = heatopt.FusedAdam(model.parameters(), model=model)
    model(torch.ones(2, 3)).sum().backward()
    model[1].weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is no longer at each of its places in the model"):
        optimizer.step()
    model[1].weight = model[0].weight
    optimizer.step()


def test_parameter_that_moved_within_the_module_is_no_other(ranks: Ranks) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    def body(comm: Communicator) -> None:
        model, optimizer, expected, plain = twins(comm)
        for one in (model, expected):
            parametrize.register_parametrization(one[2], "weight", Doubled())  # type: ignore[index]
        go_on(comm, model, optimizer, expected, plain, range(2, 4))

    ranks(body)


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (lambda members: members.__setitem__(5, nn.Parameter(torch.ones(3))), "parameter 5 .* is another tensor, and"),
        (lambda members: members.__setitem__(5, None), "parameter 5 of the groups is None, and not"),
        (lambda members: members.pop(), "parameter 5 of the groups is no parameter any more, and"),
        (lambda members: members.append(nn.Parameter(torch.ones(3))), "parameter 6 .* is another tensor, and"),
    ],
)
def test_groups_that_were_changed_by_hand(ranks: Ranks, exchange: Callable[[list[Any]], Any], message: str) -> None:
    def body(comm: Communicator) -> None:
        model, optimizer, _, _ = twins(comm)
        members = optimizer.param_groups[0]["params"]
        kept = list(members)
        exchange(members)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        members[:] = kept
        train(optimizer, model, [batch(2, comm.rank, dtype=torch.float32)])
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_model_that_is_gone_and_groups_that_are_added() -> None:
    model, more = net(), nn.Linear(2, 2)
    both = nn.ModuleList([model, more])
    optimizer = heatopt.FusedAdam(model.parameters(), model=both)
    optimizer.add_param_group({"params": more.parameters()})
    more.bias = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"'1\.bias' is no longer in the model"):
        optimizer.step()
    del both
    optimizer.step()  # nobody can say any more


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies(copied: Callable[[Any], Any]) -> None:
    model = net()
    optimizer = heatopt.FusedAdam(model.parameters(), **OPTIONS, model=model)
    train(optimizer, model, [batch(0, 0)])
    other_model, other = copied((model, optimizer))
    assert type(other) is heatopt.FusedAdam
    for one, module in ((optimizer, model), (other, other_model)):
        train(one, module, [batch(1, 0), batch(2, 0)])
    assert_equal(other_model, model)
    assert loss_of(model, batch(0, 0)).equal(loss_of(other_model, batch(0, 0)))
