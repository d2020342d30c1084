"""LBFGS with its history divided among the ranks: the iterates, evaluations and states of one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator, ThreadWorld
from heatopt.errors import RankMismatchError
from heatopt.sharding._vectors import SplitVector
from tests.support import parity
from tests.support.launch import LAUNCH
from tests.support.problems import Net, Table, words
from tests.support.ranks import Ranks
from tests.support.training import SMALL_BUCKET_MB, disturb

Loss = Callable[[], torch.Tensor]

# An inner product is added up in another order, and 30 iterations make more of the last bits.
CLOSE = 1e-10
# The history is made of differences of almost equal gradients.
STATE_CLOSE = 1e-6

SEARCHES = pytest.mark.parametrize("search", [None, "strong_wolfe"])
one_process = pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")

STOPS = {
    "max_iter": {},
    "full history": {"history_size": 3},
    "no history": {"history_size": 1},
    "max_eval": {"max_eval": 4},
    "tolerance_change": {"tolerance_change": 0.1},
}


def options_of(search: str | None, **others: Any) -> dict[str, Any]:
    return {"lr": 0.3, "max_iter": 5, "max_eval": 100, "history_size": 20, "line_search_fn": search} | others


def train(optimizer: torch.optim.Optimizer, losses: Iterable[Loss]) -> tuple[list[float], int]:
    """One step for each loss; returns what the steps returned and the number of evaluations."""
    evaluations = 0
    returned = []
    for compute in losses:

        def closure(compute: Loss = compute) -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = compute()
            loss.backward()
            return loss.detach()

        returned.append(float(optimizer.step(closure)))  # type: ignore[arg-type]
    return returned, evaluations


def wrap(comm: Communicator, parameters: Iterable[torch.Tensor], shard: str, **options: Any) -> DataParallelOptimizer:
    plain = torch.optim.LBFGS(parameters, **options)
    return DataParallelOptimizer(plain, comm=comm, shard=shard, bucket_mb=SMALL_BUCKET_MB)


def trained(comm: Communicator, shard: str = "state", steps: int = 2, **options: Any) -> tuple[Net, Any]:
    net = Net()
    optimizer = wrap(comm, net.parameters(), shard, **options_of("strong_wolfe", **options))
    train(optimizer, net.losses(comm.size, comm.rank)[:steps])
    return net, optimizer


def assert_alike(found: Any, expected: Any, tolerance: float = CLOSE) -> None:
    """Two snapshots: nearly equal parameters, and histories."""
    parity.assert_close(found["parameters"], expected["parameters"], tolerance, "the parameters")
    parity.assert_close(found["optimizer"], expected["optimizer"], max(tolerance, STATE_CLOSE), "the state")


def bytes_of(value: Any) -> int:
    return sum(leaf.nbytes for _, leaf in parity.leaves(value) if isinstance(leaf, torch.Tensor) and leaf.dim())


# What it computes


@SEARCHES
@pytest.mark.parametrize("stop", STOPS)
def test_equals_one_process(ranks: Ranks, search: str | None, stop: str) -> None:
    """With each of the ways in which a step of torch's ends."""
    options = options_of(search, **STOPS[stop])
    net = Net()
    plain = torch.optim.LBFGS(net.parameters(), **options)
    returned, evaluations = train(plain, net.losses(ranks.size))
    expected = parity.snapshot(net, plain)
    state = plain.state[net.first]
    assert (state["n_iter"] < 3 * options["max_iter"]) == (stop in ("max_eval", "tolerance_change"))
    assert (len(state["old_dirs"]) == options["history_size"]) == (stop in ("full history", "no history"))

    def body(comm: Communicator) -> None:
        results = {}
        for shard in ("none", "state"):
            own = Net()
            disturb(own, comm.rank)
            optimizer = wrap(comm, own.parameters(), shard, **options)
            losses, count = train(optimizer, own.losses(comm.size, comm.rank))
            assert count == evaluations
            assert losses == pytest.approx(returned, rel=1e-10)
            results[shard] = parity.snapshot(own, optimizer)
        parity.assert_ranks_equal(comm, results["state"])
        assert_alike(results["state"], results["none"])
        assert_alike(results["state"], expected)

    ranks(body)


def quadratic(parameters: list[nn.Parameter], rank: int) -> Loss:
    """An ill-conditioned problem; a parameter that needs no gradient, or is None in it, has none."""

    def loss() -> torch.Tensor:
        terms = []
        for number, parameter in enumerate(parameters):
            if parameter.requires_grad:
                real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
                weights = torch.arange(1, real.numel() + 1, dtype=torch.float64).view(real.shape) / real.numel() ** 0.5
                terms.append((weights * (real - number - 0.1 * rank).square()).sum().double())
        return torch.stack(terms).sum()

    return loss


def parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, *, frozen: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.25, dtype=dtype), requires_grad=not frozen)


SETS: dict[str, tuple[Callable[[], list[nn.Parameter]], float]] = {
    "odd": (lambda: [parameter((3, 5)), parameter(()), parameter((0, 3)), parameter((7,))], CLOSE),
    "frozen": (lambda: [parameter((4,), frozen=True), parameter((3, 5)), parameter((9,), frozen=True)], CLOSE),
    "few": (lambda: [parameter(()), parameter((2,))], CLOSE),
    "complex": (lambda: [parameter((5,)), parameter((3, 2), torch.complex128), parameter((4,))], CLOSE),
    "mixed": (lambda: [parameter((5,), torch.float32), parameter((3, 2)), parameter((3,), torch.complex64)], 1e-4),
    "single": (lambda: [parameter((5, 3), torch.float32), parameter((40,), torch.float32)], 1e-4),
    "half": (lambda: [parameter((5, 3), torch.bfloat16), parameter((40,), torch.bfloat16)], 0.1),
}


@SEARCHES
@pytest.mark.parametrize("kind", SETS)
def test_parameters_of_any_kind(ranks: Ranks, search: str | None, kind: str) -> None:
    make, tolerance = SETS[kind]

    def body(comm: Communicator) -> None:
        results = []
        for shard in ("none", "state"):
            parameters = make()
            optimizer = wrap(comm, parameters, shard, **options_of(search, max_iter=4))
            _, evaluations = train(optimizer, [quadratic(parameters, comm.rank)] * 2)
            state_dict = optimizer.state_dict()
            results.append([[p.detach() for p in parameters], evaluations, state_dict["state"][0]["n_iter"]])
            shapes = {key: value.shape for key, value in state_dict["state"][0].items() if hasattr(value, "shape")}
            results[-1].append(shapes)
        parity.assert_ranks_equal(comm, results[1])
        parity.assert_close(results[1], results[0], tolerance, "the sharded optimizer")

    ranks(body, min_size=2)


@SEARCHES
def test_optimum(ranks: Ranks, search: str | None) -> None:
    """A step ends where the gradient is small, and the next one is over after one evaluation."""

    def body(comm: Communicator) -> None:
        results = []
        for shard in ("none", "state"):
            parameters = [parameter((3, 5)), parameter((7,))]
            options = options_of(search, lr=1, max_iter=100, tolerance_grad=1e-2)
            optimizer = wrap(comm, parameters, shard, **options)
            evaluations = [train(optimizer, [quadratic(parameters, comm.rank)])[1] for _ in range(2)]
            results.append([[p.detach() for p in parameters], evaluations])
            assert optimizer.state_dict()["state"][0]["n_iter"] < 50
            assert evaluations[1] == 1
        parity.assert_close(results[1], results[0], CLOSE, "the sharded optimizer")

    ranks(body)


def test_parameters_of_any_strides(ranks: Ranks) -> None:
    """torch's own LBFGS refuses gradients that are not contiguous, so contiguous ones are the measure."""

    def body(comm: Communicator) -> None:
        results = []
        for columns in (False, True):
            net = Net()
            for matrix in [p for p in net.parameters() if p.dim() == 2 and columns]:
                matrix.data = matrix.data.t().contiguous().t()
            optimizer = wrap(comm, net.parameters(), "state", **options_of("strong_wolfe"))
            for loss in net.losses(comm.size, comm.rank):
                train(optimizer, [loss])
                with torch.no_grad():
                    net.second.add_(0.1)  # there may be a copy of it in another order, which must follow
            results.append(parity.snapshot(net, optimizer))
        parity.assert_ranks_equal(comm, results[1])
        assert_alike(results[1], results[0])

    ranks(body, min_size=2)


def test_sparse_gradients(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for shard in ("none", "state"):
            table = Table(dense=True)
            optimizer = wrap(comm, table.parameters(), shard, **options_of(None))
            samples = words([[comm.rank, 1], [3, 4]], 0)
            train(optimizer, [lambda table=table, samples=samples: table(samples)] * 3)
            results.append(parity.snapshot(table, optimizer))
        assert_alike(results[1], results[0])

    ranks(body, min_size=2)


def test_several_blocks(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's part then is several pieces of a vector, apart from each other."""
    from heatopt.sharding import _partition

    monkeypatch.setattr(_partition.plan_shards, "__defaults__", (300,))

    def body(comm: Communicator) -> None:
        none, state = (parity.snapshot(*trained(comm, shard)) for shard in ("none", "state"))
        assert_alike(state, none)

    ranks(body, min_size=2)


@SEARCHES
def test_loss_that_is_not_a_number(ranks: Ranks, search: str | None) -> None:
    """On the last rank alone; all ranks do what torch does with such a mean."""

    def body(comm: Communicator) -> None:
        results = []
        for shard in ("none", "state"):
            parameters = [parameter((3, 5)), parameter((7,))]
            optimizer = wrap(comm, parameters, shard, **options_of(search))
            compute = quadratic(parameters, comm.rank)
            bad = float("nan") if comm.rank == comm.size - 1 else 1.0
            _, first = train(optimizer, [compute])
            _, evaluations = train(optimizer, [lambda compute=compute, bad=bad: compute() * bad])
            results.append(([p.isnan() for p in parameters], first, evaluations))
        assert results[1][1:] == results[0][1:]
        parity.assert_same_bits(results[1][0], results[0][0], "the sharded optimizer")

    ranks(body, min_size=2)


def test_error_in_all_closures(ranks: Ranks) -> None:
    """What is left behind is what torch leaves, and training goes on from it."""

    def body(comm: Communicator) -> None:
        results = []
        for shard in ("none", "state"):
            net, optimizer = trained(comm, shard)
            calls = 0

            def fails(net: Net = net) -> torch.Tensor:
                nonlocal calls
                calls += 1
                if calls == 4:
                    raise ZeroDivisionError
                return net.losses(comm.size, comm.rank)[0]()

            with pytest.raises(ZeroDivisionError):
                train(optimizer, [fails])
            results.append([copy.deepcopy(parity.snapshot(net, optimizer))])
            train(optimizer, net.losses(comm.size, comm.rank))
            results[-1].append(parity.snapshot(net, optimizer))
        parity.assert_ranks_equal(comm, results[1])
        for found, expected in zip(results[1], results[0], strict=True):
            assert_alike(found, expected)

    ranks(body)


@one_process
@pytest.mark.parametrize("evaluation", [1, 2, 4])
def test_error_in_one_closure_ends_all_ranks(evaluation: int) -> None:
    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, net.parameters(), "state", **options_of("strong_wolfe"))
        calls = 0

        def fails() -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == evaluation and comm.rank == comm.size - 1:
                raise ZeroDivisionError
            return net.losses(comm.size, comm.rank)[0]()

        train(optimizer, [fails])

    with pytest.raises(ZeroDivisionError):
        ThreadWorld(3, timeout=20).run(body)


@pytest.mark.parametrize("odd", [1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_of_vectors(ranks: Ranks, dtype: torch.dtype, odd: float) -> None:
    """An odd element on any rank counts; the last rank may have no element."""

    def body(comm: Communicator) -> None:
        ends = [(11 * rank) // (comm.size - 1) for rank in range(comm.size)] + [11]
        own = slice(ends[comm.rank], ends[comm.rank + 1])
        for place in range(11):
            whole = torch.arange(11, dtype=dtype)
            whole[place] = odd
            vector = SplitVector(whole[own].clone(), comm)
            found = [vector.sum(), vector.max(), vector.dot(vector), vector.abs().max(), torch.mul(vector, 2).sum()]
            expected = [whole.sum(), whole.max(), whole.dot(whole), whole.abs().max(), torch.mul(whole, 2).sum()]
            torch.testing.assert_close(found, expected, equal_nan=True)
        with pytest.raises(TypeError):
            torch.linalg.vector_norm(vector)
        with pytest.raises(AttributeError):
            vector.norm()  # type: ignore[attr-defined]

    ranks(body, min_size=2)


# What it costs


def test_memory(ranks: Ranks) -> None:
    """Every rank keeps its share of the history, to one percent."""

    def body(comm: Communicator) -> None:
        sizes = []
        for shard in ("none", "state"):
            parameters = [parameter(shape) for shape in ((101, 57), (10_001,), (3,))]
            optimizer = wrap(comm, parameters, shard, **options_of(None))
            train(optimizer, [quadratic(parameters, comm.rank)] * 2)
            sizes.append(bytes_of(list(optimizer.state.values())))
        whole, own = sizes
        assert len(optimizer.state[parameters[0]]["old_dirs"]) == 9
        assert whole == 20 * 8 * sum(p.numel() for p in parameters)
        assert own <= whole / comm.size * 1.01
        assert sum(comm.all_gather_object(own)) == (whole if comm.size > 1 else own)

    ranks(body)


@one_process
@pytest.mark.parametrize("size", [2, 3, 4])
def test_traffic(size: int) -> None:
    """One word for each inner product or norm, and one exchange of parameters for each of their changes."""
    world = ThreadWorld(size, timeout=20)
    word = 8  # bytes
    shared = ("all_gather", -(-22 // size) * word)

    def body(comm: Communicator) -> list[Any]:
        parameters = [parameter((3, 5)), parameter((7,))]
        optimizer = wrap(comm, parameters, "state", **options_of(None, max_iter=3, history_size=4))

        def step() -> list[tuple[str, int]]:
            before = len([event for event in world.events if event.rank == comm.rank])
            train(optimizer, [quadratic(parameters, comm.rank)])
            own = [event for event in list(world.events) if event.rank == comm.rank]
            return [(event.kind, event.bytes) for event in own[before:]]

        step()
        full = step()
        remembered = (3, 4, 4)  # pairs in each iteration; the fifth pair takes the place of the first
        evaluations, last = 3, 1  # after the last iteration there is no evaluation, and no look at the progress
        products = sum(2 + 2 * pairs + 1 for pairs in remembered)
        assert full.count(("words", word)) == evaluations + products + len(remembered) - last
        assert full.count(shared) == evaluations
        optimizer.param_groups[0]["max_eval"] = 2
        short = step()  # ends with an evaluation: there is no change after it
        assert short.count(("words", word)) == 2 + 2 + 2 * 4 + 1
        assert short.count(shared) == 1
        return full + short

    events = world.run(body)
    assert all(found == events[0] for found in events)


# States


def test_state_dict_is_plain(ranks: Ranks) -> None:
    """The plain optimizer loads it and goes on, in mid-optimisation, as ours does."""

    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm)
        state_dict = optimizer.state_dict()
        parity.assert_ranks_equal(comm, state_dict)
        twin = copy.deepcopy(net)
        plain = torch.optim.LBFGS(twin.parameters(), **options_of("strong_wolfe"))
        plain.load_state_dict(copy.deepcopy(state_dict))
        parity.assert_same_bits(plain.state_dict(), state_dict, "the plain optimizer")
        counts = [train(optimizer, net.losses(comm.size, comm.rank))[1], train(plain, twin.losses(comm.size))[1]]
        assert counts[0] == counts[1]
        assert_alike(parity.snapshot(net, optimizer), parity.snapshot(twin, plain))

    ranks(body)


@one_process
@pytest.mark.parametrize("saved_at", [1, 2, 3, 4])
def test_loads_at_any_number_of_ranks(saved_at: int) -> None:
    def save(comm: Communicator) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        net, optimizer = trained(comm)
        return optimizer.state_dict(), {name: p.detach().clone() for name, p in net.named_parameters()}

    state_dict, parameters = ThreadWorld(saved_at, timeout=20).run(save)[0]

    def load(comm: Communicator) -> None:
        results = []
        for shard in ("none", "state"):
            net, optimizer = trained(comm, shard)  # a partition is there already
            net.load_state_dict(parameters)
            optimizer.load_state_dict(copy.deepcopy(state_dict))
            parity.assert_same_bits(optimizer.state_dict(), state_dict, "the loaded state")
            train(optimizer, net.losses(comm.size, comm.rank)[:1])
            results.append(parity.snapshot(net, optimizer))
        assert_alike(results[1], results[0])

    for size in (1, 2, 3, 4):
        ThreadWorld(size, timeout=20).run(load)


def test_existing_state_is_divided(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for shard in ("none", "state"):
            net = Net()
            plain = torch.optim.LBFGS(net.parameters(), **options_of(None))
            train(plain, net.losses(1, 0))
            optimizer = DataParallelOptimizer(plain, comm=comm, shard=shard)
            train(optimizer, net.losses(comm.size, comm.rank))
            results.append(parity.snapshot(net, optimizer))
        assert_alike(results[1], results[0])

    ranks(body, min_size=2)


@pytest.mark.parametrize("shard", ["none", "state"])
def test_states_of_one_parameter(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, shard)
        whole = optimizer.state_dict()["state"]
        for index, own in enumerate(net.parameters()):
            parity.assert_same_bits(optimizer.get_states(own), whole.get(index, {}), "the state of one parameter")
        values = [torch.arange(v.numel(), dtype=v.dtype) + n for n, v in enumerate(whole[0]["old_dirs"])]
        optimizer.set_states(net.first, "d", values[0])
        optimizer.set_states(net.first, "old_dirs", values)
        optimizer.set_states(net.first, "prev_loss", 7.0)
        found = optimizer.get_states(net.first)
        parity.assert_same_bits(
            found, {**whole[0], "d": values[0], "old_dirs": values, "prev_loss": 7.0}, "what was set"
        )
        values[1].zero_()
        found["old_stps"][0].zero_()
        assert optimizer.get_states(net.first)["old_dirs"][1].any()
        assert optimizer.get_states(net.first)["old_stps"][0].any()
        wrong = {"d": torch.ones(3)} | ({"old_dirs": [torch.ones(3)]} if shard == "state" else {})
        for name, value in wrong.items():
            with pytest.raises(ValueError, match="shape"):
                optimizer.set_states(net.first, name, value)

    ranks(body, min_size=2)


def test_copies(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm)
        twin_net, twin = copy.deepcopy((net, optimizer))
        train(optimizer, net.losses(comm.size, comm.rank))
        train(twin, twin_net.losses(comm.size, comm.rank))
        parity.assert_same_bits(parity.snapshot(twin_net, twin), parity.snapshot(net, optimizer), "the copy")

    ranks(body)


def test_hooks_schedulers_and_states_within_a_closure(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for shard in ("none", "state"):
            net, optimizer = trained(comm, shard)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            hooked: list[str] = []
            optimizer.torch_optimizer.register_step_pre_hook(lambda *_, hooked=hooked: hooked.append("before"))
            optimizer.torch_optimizer.register_step_post_hook(lambda *_, hooked=hooked: hooked.append("after"))

            def compute(net: Net = net, optimizer: Any = optimizer) -> torch.Tensor:
                found = optimizer.get_states(net.first)
                assert found["d"].shape == found["old_dirs"][-1].shape == (sum(p.numel() for p in net.parameters()),)
                return net.losses(comm.size, comm.rank)[0]()

            train(optimizer, [compute])
            scheduler.step()
            train(optimizer, [compute])
            assert hooked == ["before", "after"] * 2
            results.append(parity.snapshot(net, optimizer))
        assert_alike(results[1], results[0])

    ranks(body)


def test_join(ranks: Ranks) -> None:
    """Ranks with unequal numbers of batches; afterwards the history is divided again."""

    def body(comm: Communicator) -> None:
        results = []
        for shard in ("none", "state"):
            net, optimizer = trained(comm, shard, line_search_fn=None)
            losses = net.losses(comm.size, comm.rank)
            with optimizer.join():
                train(optimizer, losses[: 1 + comm.rank % 2])
            train(optimizer, losses)
            results.append(parity.snapshot(net, optimizer))
        parity.assert_ranks_equal(comm, results[1])
        assert_alike(results[1], results[0])
        whole = bytes_of(optimizer.state_dict()["state"])
        assert bytes_of(list(optimizer.state.values())) < whole or comm.size == 1

    ranks(body)


def test_converted_parameters(ranks: Ranks) -> None:
    """torch refuses a history of another dtype, so the user converts it; then it goes on."""

    def body(comm: Communicator) -> None:
        results = []
        for shard in ("none", "state"):
            net = Net(torch.float32)
            optimizer = wrap(comm, net.parameters(), shard, **options_of(None, max_iter=2))
            losses = net.losses(comm.size, comm.rank)
            train(optimizer, losses[:1])
            net.double()
            optimizer.zero_grad()
            losses = net.losses(comm.size, comm.rank)
            with pytest.raises(RuntimeError, match="same dtype"):
                train(optimizer, losses[:1])
            optimizer.load_state_dict(optimizer.state_dict())
            train(optimizer, losses[:2])
            results.append(parity.snapshot(net, optimizer))
        parity.assert_close(results[1]["parameters"], results[0]["parameters"], 1e-4, "the sharded optimizer")

    ranks(body)


def test_load_on_one_rank_is_noticed(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm)
        state_dict = optimizer.state_dict()
        if comm.rank == comm.size - 1:
            optimizer.load_state_dict(state_dict)
        with pytest.raises(RankMismatchError, match="load_state_dict"):
            train(optimizer, net.losses(comm.size, comm.rank)[:1])

    ranks(body, min_size=2)


def test_other_histories_on_one_rank_are_noticed(ranks: Ranks) -> None:
    """They would be other numbers of inner products."""

    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm)
        state_dict = optimizer.state_dict()
        if comm.rank == comm.size - 1:
            for name in ("old_dirs", "old_stps", "ro"):
                state_dict["state"][0][name].pop()
        optimizer.load_state_dict(state_dict)
        with pytest.raises(RankMismatchError, match=r"LBFGS\.step\(\) from a state"):
            train(optimizer, net.losses(comm.size, comm.rank)[:1])

    ranks(body, min_size=2)


def test_no_iterations(ranks: Ranks) -> None:
    """torch leaves a state of nothing, which is whole and divided at once."""

    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, max_iter=0)
        assert optimizer.get_states(net.first)["d"] is None
        train(optimizer, net.losses(comm.size, comm.rank)[:1])

    ranks(body)


def test_state_of_another_problem_is_refused(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        _, optimizer = trained(comm)
        parameters = [parameter((3, 5))]
        other = wrap(comm, parameters, "state", **options_of(None))
        state_dict = optimizer.state_dict()
        state_dict["param_groups"][0]["params"] = [0]
        other.load_state_dict(state_dict)
        with pytest.raises(ValueError, match=r"state '.*' must have shape \(15,\), .* got"):
            train(other, [quadratic(parameters, comm.rank)])

    ranks(body, min_size=2)


def test_what_torch_refuses(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm)
        with pytest.raises(TypeError, match="closure"):
            optimizer.step()
        optimizer.add_param_group({"params": [parameter((2,))]})
        with pytest.raises(AssertionError, match="one param_group"):
            train(optimizer, net.losses(comm.size, comm.rank)[:1])
        assert optimizer.get_states(net.first)["d"].shape == (sum(p.numel() for p in net.parameters()),)

    ranks(body)
