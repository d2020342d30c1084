"""The last bit: it depends on nothing but the gradients, and a slow and obvious average has the same."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch

from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator
from tests.support import parity, problems
from tests.support.algorithms import Case, default_cases
from tests.support.problems import Net
from tests.support.ranks import Ranks
from tests.support.training import train_as_rank

CASES = [case for case in default_cases() if case.takes_dense]
SOME = [case for case in CASES if case.name in ("SGD", "AdamW", "Adafactor", "Muon", "LBFGS")]

BUCKETS_MB = {"tiny": 1e-5, "medium": 0.0005, "huge": 8.0}
BLOCKING = (True, False, None)


def make_net(case: Case, dtype: torch.dtype) -> Net:
    # Alone in its bucket, `branch` is above the size at which a reduction takes two exchanges, from 2 ranks on.
    return Net(dtype, matrices_only=case.matrices_only, with_empty=case.takes_empty, features=29, hidden=61)


def slowly(case: Case, net: Net, size: int) -> dict[str, Any]:
    """What ``size`` ranks should make of ``net``: gradients are computed one by one and averaged in that order."""
    optimizer = case.optimizer(net.parameters())
    parameters = list(net.parameters())

    for step in range(problems.STEPS):
        parts = [net.batch(step, size).part(rank, size) for rank in range(size)]

        def closure(parts: list[problems.Batch] = parts) -> torch.Tensor:
            gradients, losses = [], []
            for part in parts:
                net.zero_grad()
                loss = net(part)
                loss.backward()
                losses.append(loss.item())
                gradients.append([parameter.grad for parameter in parameters])
            for parameter, of_ranks in zip(parameters, zip(*gradients, strict=True), strict=True):
                parameter.grad = parity.mean_in_rank_order(of_ranks)
            return torch.full_like(loss.detach(), math.fsum(losses) / size)

        if case.needs_closure:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()
    return parity.snapshot(net, optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_slow_and_obvious_average(ranks: Ranks, case: Case, dtype: torch.dtype) -> None:
    expected = slowly(case, make_net(case, dtype), ranks.size)

    def body(comm: Communicator) -> None:
        net = make_net(case, dtype)
        result = train_as_rank(comm, case, net, net.losses(comm.size, comm.rank), bucket_mb=0.02)
        parity.assert_same_bits(result, expected, f"rank {comm.rank}")

    ranks(body)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_bucket_size_and_blocking_do_not_matter(ranks: Ranks, case: Case) -> None:
    expected = slowly(case, make_net(case, torch.float32), ranks.size)

    def body(comm: Communicator) -> None:
        for (name, bucket_mb), blocking in product(BUCKETS_MB.items(), BLOCKING):
            net = make_net(case, torch.float32)
            losses = net.losses(comm.size, comm.rank)
            result = train_as_rank(comm, case, net, losses, bucket_mb=bucket_mb, blocking=blocking, model=net)
            parity.assert_same_bits(result, expected, f"rank {comm.rank}, {name} buckets, blocking={blocking}")

    ranks(body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_position_in_a_long_bucket_does_not_matter(ranks: Ranks, dtype: torch.dtype) -> None:
    """A long bucket is reduced in pieces, by owners of parts of them; each element comes out as if it were alone."""
    size, numel = ranks.size, 650_001  # more than one piece, and not a multiple of the ranks
    gradients = [problems.random((numel,), dtype, 41, rank) for rank in range(size)]
    expected = parity.mean_in_rank_order(gradients)

    def body(comm: Communicator) -> None:
        for blocking, shift in product((True, False), (0, 1)):
            parameters = [torch.nn.Parameter(torch.zeros(shift * 17, dtype=dtype)) for _ in range(3)]
            parameters.insert(1, torch.nn.Parameter(torch.zeros(numel, dtype=dtype)))
            optimizer = DataParallelOptimizer(torch.optim.SGD(parameters, lr=1.0), blocking, comm=comm)
            parameters[1].grad = gradients[comm.rank].clone()
            optimizer.synchronize()
            parity.assert_same_bits(parameters[1].grad, expected, f"rank {comm.rank}, blocking={blocking}")

    ranks(body)


def test_order_of_the_hooks_does_not_matter(ranks: Ranks) -> None:
    """Ranks whose backward delivers gradients in other orders, in different steps, average them alike."""
    size, count = ranks.size, 7
    gradients = [[problems.random((11, 3), torch.float32, 43, rank, n) for n in range(count)] for rank in range(size)]
    expected = [parity.mean_in_rank_order(of_ranks) for of_ranks in zip(*gradients, strict=True)]

    def body(comm: Communicator) -> None:
        for blocking in (True, False):
            parameters = [torch.nn.Parameter(torch.zeros(11, 3)) for _ in range(count)]
            optimizer = DataParallelOptimizer(
                torch.optim.SGD(parameters, lr=1.0), blocking, comm=comm, bucket_mb=0.0004
            )
            for turn in range(4):
                optimizer.zero_grad()
                order = torch.randperm(count, generator=problems.generator(turn, comm.rank)).tolist()
                terms = [(parameters[number] * gradients[comm.rank][number]).sum() for number in order]
                torch.stack(terms).sum().backward()
                found = [parameter.grad for parameter in parameters]
                parity.assert_same_bits(found, expected, f"rank {comm.rank}, order {order}")

    ranks(body)


def test_gradients_of_some_ranks(ranks: Ranks) -> None:
    """A parameter may get its gradient on any subset of ranks: others count as zero, and None stays None on none."""
    size = ranks.size
    gradients = [problems.random((5,), torch.float32, 47, rank) for rank in range(size)]

    def body(comm: Communicator) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2**size)]
        optimizer = DataParallelOptimizer(torch.optim.SGD(parameters, lr=1.0), comm=comm, bucket_mb=0.0005)
        for _ in range(2):
            optimizer.zero_grad()
            used = [parameter for subset, parameter in enumerate(parameters) if subset >> comm.rank & 1]
            sum((parameter * gradients[comm.rank]).sum() for parameter in used).backward()
            for subset, parameter in enumerate(parameters):
                of_ranks = [gradients[rank] if subset >> rank & 1 else None for rank in range(size)]
                expected = parity.mean_in_rank_order(of_ranks)
                if expected is None:
                    assert parameter.grad is None
                else:
                    parity.assert_same_bits(parameter.grad, expected, f"rank {comm.rank}, subset {subset:b}")

    ranks(body)


def test_repeated_reduction_changes_nothing(ranks: Ranks) -> None:
    """A gradient that is an average already is not averaged again, which would round it again."""

    def body(comm: Communicator) -> None:
        parameter = torch.nn.Parameter(torch.zeros(1000))
        optimizer = DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
        parameter.grad = problems.random((1000,), torch.float32, 53)
        optimizer.synchronize()
        once = parameter.grad.clone()
        parity.assert_ranks_equal(comm, once)
        for _ in range(3):
            optimizer.synchronize()
        parity.assert_same_bits(parameter.grad, once, f"rank {comm.rank}")

    ranks(body)
