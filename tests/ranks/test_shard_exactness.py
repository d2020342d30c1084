"""Sharding: each rank updates its part, and nobody can tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator
from tests.ranks._sharding import SHARDS, assert_close, assert_same_bits, shards_of
from tests.ranks.test_exactness import TOLERANCE, assert_all_close, grouped, make_net
from tests.support import parity
from tests.support.algorithms import Case, covering_cases, default_cases, option_cases
from tests.support.launch import LAUNCH
from tests.support.problems import Net, Table, words
from tests.support.ranks import Ranks
from tests.support.training import SMALL_BUCKET_MB, train, train_alone, train_as_rank

OPTIONS = covering_cases() if LAUNCH.launched else option_cases(thorough=False)
CASES = [case for case in OPTIONS if case.values[0].takes_dense]
DEFAULTS = default_cases()
DENSE = [case for case in DEFAULTS if case.takes_dense]
# The inner products of LBFGS are added up in another order, so that last bits differ: see test_shard_lbfgs.
SAME_BITS = [case for case in DENSE if case.name != "LBFGS"]
# A kernel rounds a number differently in a full vector and at the end of a tensor, and the ends of pieces are others.
KERNEL = 1e-12


def each(comm: Communicator, case: Case, steps: int, **settings: Any) -> list[dict[str, Any]]:
    """What training makes of equal networks without and with each kind of sharding."""
    results = []
    for shard in shards_of(case.name):
        net = make_net(case)
        losses = net.losses(comm.size, comm.rank) * steps
        results.append(train_as_rank(comm, case, net, losses, model=net, shard=shard, **settings))
    return results


@pytest.mark.parametrize("case", CASES)
def test_equals_no_sharding(ranks: Ranks, case: Case) -> None:
    """To the last bit where torch's own code does not depend on where a tensor ends."""

    def body(comm: Communicator) -> None:
        results = each(comm, case, 2)
        if case.name == "LBFGS":
            assert_all_close(results[1:], results[0], case)
        elif case.options.get("fused"):
            assert_close(results, KERNEL)
        else:
            assert_same_bits(results)

    ranks(body, min_size=2)


@pytest.mark.parametrize(
    ("case", "shard"), [pytest.param(c, s, id=f"{c.name}-{s}") for c in DENSE for s in shards_of(c.name)[1:]]
)
def test_equals_one_process(ranks: Ranks, case: Case, shard: str) -> None:
    net = make_net(case)
    parameters = grouped(case, net) if case.takes_groups else None
    expected = train_alone(case, net, net.losses(ranks.size), parameters)

    def body(comm: Communicator) -> dict[str, Any]:
        own = make_net(case)
        parameters = grouped(case, own) if case.takes_groups else None
        return train_as_rank(comm, case, own, own.losses(comm.size, comm.rank), parameters, shard=shard)

    assert_all_close(ranks(body), expected, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("case", SAME_BITS, ids=lambda case: case.name)
def test_dtypes(ranks: Ranks, case: Case, dtype: torch.dtype) -> None:
    if dtype.is_complex and not case.takes_complex:
        pytest.skip("torch refuses")

    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = Net(dtype, matrices_only=case.matrices_only, with_empty=case.takes_empty)
            losses = net.losses(comm.size, comm.rank)
            results.append(train_as_rank(comm, case, net, losses, model=net, shard=shard))
        # torch's loops over half types round the last elements of a tensor differently in these two.
        if dtype is torch.bfloat16 and case.name in ("SGD", "ASGD"):
            assert_close(results, 2e-2)
        else:
            assert_same_bits(results)

    ranks(body, min_size=2)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's Adagrad
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_sparse_gradients(ranks: Ranks, name: str, dense: bool, known: bool) -> None:
    """Whether the model has told of them or not, and with a dense parameter beside them."""
    if name == "SparseAdam" and dense:
        pytest.skip("takes sparse gradients only")
    kind = getattr(torch.optim, name)

    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            table = Table(dense=dense)
            optimizer = DataParallelOptimizer(
                kind(table.parameters(), lr=0.1), model=table if known else None, comm=comm, shard=shard
            )
            for step in range(3):
                optimizer.zero_grad()
                table(words([[comm.rank, step], [3, 4 + step]], step)).backward()
                optimizer.step()
            results.append(parity.snapshot(table, optimizer))
        parity.assert_ranks_equal(comm, results)
        assert_same_bits(results)

    ranks(body, min_size=2)


@pytest.mark.parametrize("case", [c for c in SAME_BITS if not c.matrices_only], ids=lambda case: case.name)
def test_missing_gradients(ranks: Ranks, case: Case) -> None:
    """A parameter without a gradient on any rank is skipped, and has no state before its first one."""
    shapes = [(3, 5), (1,), (2, 2), (7,), (4, 3)]

    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            parameters = [torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
            optimizer = DataParallelOptimizer(case.optimizer(parameters), comm=comm, shard=shard)
            for step in range(6):
                for number, parameter in enumerate(parameters):
                    nowhere = (number * 3 + step) % 4 == 0
                    here = (number + comm.rank) % comm.size != 0 or comm.size == 1
                    parameter.grad = None
                    if here and not nowhere:
                        parameter.grad = torch.full_like(parameter, 0.1 * (step - number) + comm.rank)
                optimizer.step()
            results.append([parameters, optimizer.state_dict()])
        parity.assert_ranks_equal(comm, results)
        assert_same_bits(results)

    ranks(body, min_size=2)


def strided(parameters: Iterable[torch.Tensor]) -> None:
    """Let matrices lie in memory column by column."""
    for parameter in parameters:
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Muon"])
def test_parameters_of_any_strides(ranks: Ranks, name: str) -> None:
    case = next(case for case in DEFAULTS if case.name == name)

    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = make_net(case)
            strided(net.parameters())
            results.append(train_as_rank(comm, case, net, net.losses(comm.size, comm.rank), shard=shard))
        tolerance = TOLERANCE.get(name, 1e-12)
        assert_close(results, tolerance)

    ranks(body, min_size=2)


def test_large_parameters_and_several_blocks(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    from heatopt.sharding import _partition

    monkeypatch.setattr(_partition.plan_shards, "__defaults__", (100_000,))
    case = Case(torch.optim.AdamW)

    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = Net(torch.float32, hidden=331, features=127)
            losses = net.losses(comm.size, comm.rank)
            results.append(train_as_rank(comm, case, net, losses, shard=shard, bucket_mb=SMALL_BUCKET_MB * 100))
        assert_same_bits(results)

    ranks(body, min_size=2)


@pytest.mark.parametrize("case", [c for c in DEFAULTS if c.name in ("Adam", "SGD", "Adafactor")], ids=lambda c: c.name)
def test_closures(ranks: Ranks, case: Case) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = make_net(case)
            optimizer = DataParallelOptimizer(case.optimizer(net.parameters()), comm=comm, shard=shard)
            train(optimizer, net.losses(comm.size, comm.rank), use_closure=True)
            results.append(parity.snapshot(net, optimizer))
        assert_same_bits(results)

    ranks(body, min_size=2)
