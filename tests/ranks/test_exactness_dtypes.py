"""Every dtype: single precision and complex numbers against one process, half types against the exact sum."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator
from tests.support import parity, problems
from tests.support.algorithms import Case, default_cases
from tests.support.problems import Net
from tests.support.ranks import Ranks
from tests.support.training import train_alone, train_as_rank

# Single precision: 2^-24 from the order of the sum, divided by the size of the gradients.
TOLERANCE = {torch.complex128: parity.EXACT, torch.complex64: 1e-4, torch.float32: 1e-4}
FLOATING = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128]

# The last one is above the size from which on a reduction takes two exchanges.
SHAPES = [(), (7,), (0, 3), (131, 67)]


def algorithms_for(dtype: torch.dtype) -> list[Case]:
    return [c for c in default_cases() if c.takes_dense and (c.takes_complex or not dtype.is_complex)]


@pytest.mark.parametrize(
    ("dtype", "case"),
    [pytest.param(d, case, id=f"{d}-{case.name}") for d in TOLERANCE for case in algorithms_for(d)],
)
def test_equals_one_process(ranks: Ranks, dtype: torch.dtype, case: Case) -> None:
    def make_net() -> Net:
        return Net(dtype, matrices_only=case.matrices_only, with_empty=case.takes_empty)

    net = make_net()
    expected = train_alone(case, net, net.losses(ranks.size))

    def body(comm: Communicator) -> dict[str, Any]:
        own = make_net()
        return train_as_rank(comm, case, own, own.losses(comm.size, comm.rank))

    for rank, result in enumerate(ranks(body)):
        # The memory of LBFGS holds quotients of differences, in which single precision leaves no digit.
        parts = ["parameters"] if case.needs_closure else ["parameters", "optimizer"]
        for part in parts:
            parity.assert_close(result[part], expected[part], TOLERANCE[dtype], f"{part} of rank {rank}")


def averaged(comm: Communicator, gradients: list[list[torch.Tensor]], **settings: Any) -> list[torch.Tensor]:
    """The gradients that the ranks have after a backward whose gradients are ``gradients[rank]``."""
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients[comm.rank]]
    optimizer = DataParallelOptimizer(torch.optim.SGD(parameters, lr=1.0), comm=comm, **settings)
    torch.autograd.backward(parameters, gradients[comm.rank])
    return [parameter.grad for parameter in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
def test_gradient_is_the_sum_rounded_once(ranks: Ranks, dtype: torch.dtype, blocking: bool) -> None:
    gradients = [
        [problems.random(shape, dtype, 29, rank, number) for number, shape in enumerate(SHAPES)]
        for rank in range(ranks.size)
    ]
    expected = [parity.mean_in_rank_order(of_ranks) for of_ranks in zip(*gradients, strict=True)]

    def body(comm: Communicator) -> None:
        found = averaged(comm, gradients, blocking=blocking, bucket_mb=0.001)
        parity.assert_same_bits(found, expected, f"rank {comm.rank}")
        parity.assert_ranks_equal(comm, found)

    ranks(body)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_values_of_bfloat16_are_not_lost(ranks: Ranks, shape: tuple[int, ...]) -> None:
    """1 + 2^-9 is 1 in bfloat16, so a sum that is rounded at each rank never leaves 1."""
    gradients = [[torch.full(shape, 1.0 if rank == 0 else 2**-9, dtype=torch.bfloat16)] for rank in range(ranks.size)]
    exact = (1.0 + (ranks.size - 1) * 2**-9) / ranks.size
    expected = torch.full(shape, exact, dtype=torch.float32).bfloat16()
    rounded_at_each_rank = gradients[0][0].clone()
    for (gradient,) in gradients[1:]:
        rounded_at_each_rank += gradient
    if ranks.size == 4 and expected.numel():
        assert not torch.equal(rounded_at_each_rank / ranks.size, expected)

    def body(comm: Communicator) -> None:
        parity.assert_same_bits(averaged(comm, gradients), [expected], f"rank {comm.rank}")

    ranks(body)


def test_half_types_do_not_overflow_in_between(ranks: Ranks) -> None:
    """The sum of the largest numbers is beyond float16, their mean is not."""
    largest = torch.finfo(torch.float16).max
    gradients = [[torch.full((3,), largest, dtype=torch.float16)] for _ in range(ranks.size)]

    def body(comm: Communicator) -> None:
        assert averaged(comm, gradients)[0].tolist() == [largest] * 3

    ranks(body)


def test_all_dtypes_in_one_optimizer(ranks: Ranks) -> None:
    gradients = [
        [problems.random((3, 5), dtype, 31, rank, number) for number, dtype in enumerate([*FLOATING, *FLOATING])]
        for rank in range(ranks.size)
    ]
    expected = [parity.mean_in_rank_order(of_ranks) for of_ranks in zip(*gradients, strict=True)]

    def body(comm: Communicator) -> None:
        for bucket_mb in (1e-5, 8.0):
            found = averaged(comm, gradients, bucket_mb=bucket_mb)
            parity.assert_same_bits(found, expected, f"rank {comm.rank}")

    ranks(body)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_reaches_all_ranks(ranks: Ranks, dtype: torch.dtype, value: float) -> None:
    """... and no element but its own."""
    gradients = [[torch.ones(9, dtype=dtype)] for _ in range(ranks.size)]
    gradients[-1][0][4] = value

    def body(comm: Communicator) -> None:
        (found,) = averaged(comm, gradients)
        assert found[4].isnan() if value != value else found[4] == value
        assert torch.cat([found[:4], found[5:]]).tolist() == [1.0] * 8

    ranks(body)


def test_no_element_reaches_its_neighbour(ranks: Ranks) -> None:
    """Each element of parameters that share a bucket has a value of its own, and keeps its place."""
    sizes = [1, 3, 0, 17, 64, 65, 1, 130]
    bounds = list(pairwise([sum(sizes[:count]) for count in range(len(sizes) + 1)]))
    gradients = [
        [torch.arange(first, last, dtype=torch.float64) * (rank + 1) for first, last in bounds]
        for rank in range(ranks.size)
    ]
    factor = sum(range(1, ranks.size + 1)) / ranks.size

    def body(comm: Communicator) -> None:
        for (first, last), found in zip(bounds, averaged(comm, gradients), strict=True):
            assert found.tolist() == [number * factor for number in range(first, last)]

    ranks(body)
