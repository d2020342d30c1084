"""Sparse gradients: N ranks train what one process trains, whichever rows of a table each rank has seen."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator
from tests.support import parity, problems
from tests.support.algorithms import Case, default_cases, known_algorithms
from tests.support.problems import Table
from tests.support.ranks import Ranks
from tests.support.training import Loss, train_alone, train_as_rank

# Of torch's own Adagrad.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")

CASES = [Case(algorithm) for algorithm in known_algorithms() if Case(algorithm).takes_sparse] + [
    case for case in default_cases() if case.name == "LBFGS"
]  # which makes the gradients dense by itself

# The rows in the two samples of a rank.
INDEX_SETS = {
    "overlapping": lambda rank, size, step: [[rank, rank + 1], [step]],
    "disjoint": lambda rank, size, step: [[2 * rank], [2 * rank + 1]],
    "repeated": lambda rank, size, step: [[rank, 8, rank], [8, 8]],
    "empty on the last rank": lambda rank, size, step: [[], []] if rank == size - 1 else [[rank], [step]],
    "empty on the first rank": lambda rank, size, step: [[], []] if rank == 0 else [[rank], []],
    "empty on each rank in turn": lambda rank, size, step: [[], []] if rank == step % size else [[rank], [1]],
    "empty": lambda rank, size, step: [[], []],
}


def losses(table: Table, kind: str, size: int, ranks: list[int]) -> list[Loss]:
    """The loss of each step over the samples of ``ranks``."""
    found: list[Loss] = []
    for step in range(problems.STEPS):
        samples = [rows for rank in ranks for rows in INDEX_SETS[kind](rank, size, step)]
        found.append(partial(table, problems.words(samples, step)))
    return found


@pytest.mark.parametrize("kind", INDEX_SETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(ranks: Ranks, case: Case, kind: str) -> None:
    table = Table(dense=case.takes_dense)
    expected = train_alone(case, table, losses(table, kind, ranks.size, list(range(ranks.size))))

    def body(comm: Communicator) -> list[dict[str, Any]]:
        outcomes = []
        # With the model it is known at once that the gradients are sparse; without, when the first one comes.
        for model_is_given in (True, False):
            own = Table(dense=case.takes_dense)
            model = own if model_is_given else None
            outcomes.append(train_as_rank(comm, case, own, losses(own, kind, comm.size, [comm.rank]), model=model))
            gradient = own.embedding.weight.grad
            assert gradient is not None
            assert gradient.is_sparse
            parity.assert_ranks_equal(comm, [gradient.to_dense(), gradient._nnz()])
        return outcomes

    for rank, outcomes in enumerate(ranks(body)):
        for outcome in outcomes:
            parity.assert_close(outcome, expected, parity.EXACT, f"rank {rank}")


@pytest.mark.parametrize("absent", ["first", "last", "all but the last"])
@pytest.mark.parametrize("case", [c for c in CASES if not c.needs_closure], ids=lambda case: case.name)
def test_rank_without_gradient_counts_as_zero(ranks: Ranks, case: Case, absent: str) -> None:
    size = ranks.size
    without = {"first": [0], "last": [size - 1], "all but the last": list(range(size - 1))}[absent]
    present = [rank for rank in range(size) if rank not in without]
    table = Table()
    reference = case.optimizer(table.parameters())
    for loss in losses(table, "overlapping", size, present) if present else ():
        reference.zero_grad()
        (loss() * len(present) / size).backward()
        reference.step()
    expected = parity.snapshot(table, reference)

    def body(comm: Communicator) -> dict[str, Any]:
        own = Table()
        optimizer = DataParallelOptimizer(case.optimizer(own.parameters()), comm=comm)
        for loss in losses(own, "overlapping", comm.size, [comm.rank]):
            optimizer.zero_grad()
            if comm.rank in present:
                loss().backward()
            optimizer.step()
        result = parity.snapshot(own, optimizer)
        parity.assert_ranks_equal(comm, result)
        assert (own.embedding.weight.grad is None) == (not present)
        return result

    for rank, result in enumerate(ranks(body)):
        parity.assert_close(result, expected, parity.EXACT, f"rank {rank}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_entries_are_summed_in_rank_order_and_rounded_once(ranks: Ranks, dtype: torch.dtype) -> None:
    values = [problems.random((5, 3), dtype, 23, rank) for rank in range(ranks.size)]
    rows = [[rank, 4, (rank + 2) % 5] for rank in range(ranks.size)]
    gradients = [
        torch.zeros(5, 3, dtype=dtype).index_copy(0, torch.tensor(rows[rank]), values[rank][rows[rank]])
        for rank in range(ranks.size)
    ]
    expected = parity.mean_in_rank_order(gradients)

    def body(comm: Communicator) -> None:
        weight = torch.nn.Parameter(torch.zeros(5, 3, dtype=dtype))
        optimizer = DataParallelOptimizer(torch.optim.SGD([weight], lr=1.0), comm=comm)
        weight.grad = gradients[comm.rank].to_sparse(1)
        optimizer.synchronize()
        assert weight.grad.is_sparse
        parity.assert_same_bits(weight.grad.to_dense(), expected, f"rank {comm.rank}")

    ranks(body)
