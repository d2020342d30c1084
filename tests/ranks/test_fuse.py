"""``fuse=True``: many parameters are updated as one, and nobody can tell."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heatopt
from heatopt.comm import Communicator
from tests.support import parity
from tests.support.algorithms import Case, option_cases
from tests.support.launch import LAUNCH
from tests.support.problems import Net, random
from tests.support.ranks import Ranks
from tests.support.training import train_alone, train_as_rank

ELEMENTWISE = (
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
WITH_KERNEL = ("Adagrad", "Adam", "AdamW", "SGD")
# A kernel rounds a number differently in a full vector and at the end of a tensor: by the last bit for single and
# double precision, and in torch's loops over half types too. Steps, and cancellation, magnify it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}

CASES = [
    case for case in option_cases(thorough=not LAUNCH.launched) if case.values[0].name in ELEMENTWISE and not case.marks
]
DEFAULTS = [Case(getattr(torch.optim, name)) for name in ELEMENTWISE]
SHAPES = [(3, 5), (7,), (), (0, 3), (4, 4), (129,), (2, 3, 5), (1,), (33,), (300, 300), (2, 2)]
one_process = pytest.mark.skipif(LAUNCH.launched, reason="of one process: the threads' session has it")

Make = Callable[[list[Any]], torch.optim.Optimizer]


def make_parameters(dtypes: Iterable[torch.dtype] = (torch.float64,)) -> list[nn.Parameter]:
    return [
        nn.Parameter(random(shape, dtype, 3, number))
        for number, (shape, dtype) in enumerate(zip(SHAPES, itertools.cycle(dtypes), strict=False))
    ]


def fused(optimizer: torch.optim.Optimizer) -> heatopt.DataParallelOptimizer:
    return heatopt.DataParallelOptimizer(optimizer, fuse=True)


def two_groups(case: Case, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    learning_rate = case.optimizer(parameters).defaults["lr"]
    return case.optimizer([{"params": parameters[:5]}, {"params": parameters[5:], "lr": learning_rate / 2}])


def give_gradients(parameters: Iterable[Tensor], step: int) -> None:
    """Some gradients are missing at the first steps."""
    for number, parameter in enumerate(parameters):
        missing = step < 4 and (number + step) % 4 == 0
        parameter.grad = None if missing else random(parameter.shape, parameter.dtype, 5, step, number)


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: Iterable[int]) -> None:
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()


def result(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> dict[str, Any]:
    return {"parameters": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}


# Every algorithm


@one_process
@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float32,)], ids=["double", "single"])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case: Case, dtypes: tuple[torch.dtype, ...]) -> None:
    by_kernel = case.name in WITH_KERNEL and case.options.get("fused")
    # torch's fused SGD is wrong where some parameters of a group have had a gradient before and others have not.
    loop = Case(case.algorithm, {**case.options, "fused": False}) if by_kernel else case
    results = []
    for own, wrap in ((case, fused), (loop, lambda optimizer: optimizer)):
        parameters = make_parameters(dtypes)
        optimizer = wrap(two_groups(own, parameters))
        train(optimizer, parameters, range(7))
        results.append([*(p.detach() for p in parameters), *(list(s.items()) for s in optimizer.state.values())])
    if by_kernel:
        parity.assert_close(*results, TOLERANCE[dtypes[0]], "fuse=True")
    else:
        parity.assert_same_bits(*results, "fuse=True")


@one_process
@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
def test_mixed_dtypes(case: Case) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    ours, theirs = make_parameters(dtypes), make_parameters(dtypes)
    optimizer, plain = fused(two_groups(case, ours)), two_groups(case, theirs)
    train(optimizer, ours, range(7))
    train(plain, theirs, range(7))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        parity.assert_close(mine.detach(), other.detach(), TOLERANCE[mine.dtype], "a parameter")
    for mine_state, other_state in zip(optimizer.state.values(), plain.state.values(), strict=True):
        assert [(k, v.dtype, v.shape) for k, v in mine_state.items()] == [
            (k, v.dtype, v.shape) for k, v in other_state.items()
        ]
        assert mine_state.get("step") == other_state.get("step")


@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
@pytest.mark.parametrize("bucket_mb", [0.0005, 8.0])
def test_equals_one_process(ranks: Ranks, case: Case, bucket_mb: float) -> None:
    net = Net()
    expected = train_alone(case, net, net.losses(ranks.size))

    def body(comm: Communicator) -> dict[str, Any]:
        own = Net()
        return train_as_rank(
            comm, case, own, own.losses(comm.size, comm.rank), model=own, fuse=True, bucket_mb=bucket_mb
        )

    for found in ranks(body):
        parity.assert_close(found, expected, parity.EXACT, "a rank")


@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
def test_bucket_size_does_not_matter(ranks: Ranks, case: Case) -> None:
    """Gradients are copied or used where they are, all together or in parts: to the last bit the same."""

    def body(comm: Communicator) -> None:
        results = []
        for bucket_mb in (0.0005, 0.002, 8.0):
            own = Net(torch.float32)
            losses = own.losses(comm.size, comm.rank)
            results.append(train_as_rank(comm, case, own, losses, model=own, fuse=True, bucket_mb=bucket_mb))
        for found in results[1:]:
            parity.assert_same_bits(found, results[0], f"rank {comm.rank}")

    ranks(body)


def test_gradients_are_used_where_they_are(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    from heatopt.optim import _flat

    def body(comm: Communicator) -> None:
        parameters = [nn.Parameter(random((5, 3), torch.float32, 1, number)) for number in range(20)]
        optimizer = heatopt.DataParallelOptimizer(torch.optim.AdamW(parameters), comm=comm, fuse=True)
        for step in range(3):
            optimizer.zero_grad()
            torch.stack([p.square().sum() * (step + comm.rank) for p in parameters]).sum().backward()
            optimizer.step()

    def refuse(*_: object) -> Tensor:
        raise AssertionError("copied")

    monkeypatch.setattr(_flat._FlatRun, "_copy", refuse)
    if ranks.size > 1:
        ranks(body)
    else:
        with pytest.raises(AssertionError, match="copied"):
            ranks(body)


# What is not flat


def dense_only(make: Make, gradient: Callable[[Tensor, int], Tensor], parameters: list[nn.Parameter]) -> None:
    """Compare with torch, with gradients of a kind of their own."""
    results = []
    for wrap in (fused, lambda optimizer: optimizer):
        own = copy.deepcopy(parameters)
        optimizer = wrap(make(own))
        for step in range(4):
            for number, parameter in enumerate(own):
                parameter.grad = gradient(parameter, 10 * step + number)
            optimizer.step()
        results.append(result(optimizer, own))
    parity.assert_same_bits(*results, "fuse=True")


@one_process
@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
def test_complex_parameters(case: Case) -> None:
    kinds = (torch.complex64, torch.float32, torch.complex128)
    parameters = [nn.Parameter(random((3, 2), kind, number)) for number, kind in enumerate(kinds)]
    loop = Case(case.algorithm, {"foreach": False})
    dense_only(loop.optimizer, lambda p, key: random(p.shape, p.dtype, key), parameters)


@one_process
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_gradients_sometimes(kind: Any) -> None:
    def gradient(parameter: Tensor, key: int) -> Tensor:
        found = random(parameter.shape, parameter.dtype, key)
        return found.to_sparse(1) if key in (2, 11) else found

    parameters = [nn.Parameter(random((4, 2), torch.float64, number)) for number in range(5)]
    dense_only(lambda own: kind(own, lr=0.1, foreach=False), gradient, parameters)


@one_process
def test_memory_formats_and_strided_gradients() -> None:
    def gradient(parameter: Tensor, key: int) -> Tensor:
        found = random(parameter.shape, parameter.dtype, key)
        return found.contiguous(memory_format=torch.channels_last) if key % 2 and found.dim() == 4 else found

    shapes = [(3, 2, 4, 4), (5, 3, 2, 2), (7, 2), (2, 2, 3, 3)]
    parameters = [nn.Parameter(random(shape, torch.float64, number)) for number, shape in enumerate(shapes)]
    for parameter in parameters[:2]:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    parameters[2].data = parameters[2].data.t().contiguous().t()
    dense_only(lambda own: torch.optim.Adam(own, foreach=False), gradient, parameters)
    optimizer = fused(torch.optim.Adam(parameters))
    give_gradients(parameters, 7)
    optimizer.step()
    assert parameters[0].is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[parameters[2]]["exp_avg"].stride() == parameters[2].stride() == (1, 7)


@one_process
def test_shared_memory_stays_shared() -> None:
    base = random((6,), torch.float64, 1)
    first, second = nn.Parameter(base[:4]), nn.Parameter(base[2:])
    shared = nn.Parameter(random((3,), torch.float64, 2).share_memory_())
    address = shared.data_ptr()
    optimizer = fused(torch.optim.SGD([first, second, shared, nn.Parameter(torch.ones(2))], lr=0.1))
    for parameter in (first, second, shared):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(first.detach()[2:], second.detach()[:2])
    assert shared.data_ptr() == address


@one_process
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_differentiable_group_is_left_to_torch(kind: Any) -> None:
    parameters = [nn.Parameter(random((3,), torch.float64, number), requires_grad=False) for number in range(2)]
    dense_only(
        lambda own: kind(own, lr=0.1, differentiable=True), lambda p, key: random(p.shape, p.dtype, key), parameters
    )


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.Muon, torch.optim.SparseAdam])
def test_other_algorithms_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"got {kind.__name__}; allowed: ASGD, Adadelta"):
        fused(kind([nn.Parameter(torch.ones(2, 2))], lr=0.1))


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_only_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match="fuse must be True or False, got"):
        heatopt.DataParallelOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))]), fuse=value)


def test_ranks_must_agree(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        plain = torch.optim.SGD([nn.Parameter(torch.ones(2))])
        with pytest.raises(heatopt.RankMismatchError, match="fuse"):
            heatopt.DataParallelOptimizer(plain, comm=comm, fuse=comm.rank == 0)

    ranks(body, min_size=2)
