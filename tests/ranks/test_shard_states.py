"""Sharded states: what each rank keeps, and plain state dicts from and for any number of ranks."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator, SingleCommunicator, ThreadWorld
from heatopt.errors import HeatoptError, RankMismatchError
from tests.ranks._sharding import SHARDS, assert_same_bits
from tests.ranks.test_exactness import grouped, make_net
from tests.support import parity
from tests.support.algorithms import Case, default_cases
from tests.support.launch import LAUNCH
from tests.support.problems import Net
from tests.support.ranks import Ranks
from tests.support.training import SMALL_BUCKET_MB, train, train_alone

DEFAULTS = [case for case in default_cases() if case.takes_dense and not case.needs_closure]  # see test_shard_lbfgs
ELEMENTWISE = [case for case in DEFAULTS if case.name not in ("Adafactor", "Muon")]
ADAMW = Case(torch.optim.AdamW)

each_algorithm = pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
one_process = pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")


each_kind = pytest.mark.parametrize("shard", SHARDS[1:])


def sharded(comm: Communicator, case: Case, net: nn.Module, shard: str) -> DataParallelOptimizer:
    return DataParallelOptimizer(case.optimizer(net.parameters()), comm=comm, shard=shard, bucket_mb=SMALL_BUCKET_MB)


def trained(comm: Communicator, case: Case, shard: str = "state") -> tuple[Net, DataParallelOptimizer]:
    net = make_net(case)
    optimizer = sharded(comm, case, net, shard)
    train(optimizer, net.losses(comm.size, comm.rank)[:3])
    return net, optimizer


def bytes_of(state: Any) -> int:
    return sum(leaf.nbytes for _, leaf in parity.leaves(list(state.values())) if isinstance(leaf, torch.Tensor))


@pytest.mark.parametrize("case", ELEMENTWISE, ids=lambda case: case.name)
def test_memory(ranks: Ranks, case: Case) -> None:
    """Every rank keeps its share of the states, to one percent."""

    def body(comm: Communicator) -> None:
        sizes = []
        for shard in SHARDS:
            parameters = [nn.Parameter(torch.ones(shape)) for shape in ((301, 257), (40_001,), (3,))]
            optimizer = DataParallelOptimizer(case.optimizer(parameters), comm=comm, shard=shard)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            sizes.append(bytes_of(optimizer.state))
        whole, *own_sizes = sizes
        numbers = 64
        for own in own_sizes:
            assert own <= whole / comm.size * 1.01 + numbers
            assert sum(comm.all_gather_object(own)) <= whole + numbers * comm.size

    ranks(body)


# torch's own load_state_dict casts the numbers of ASGD and NAdam to the parameter's dtype.
@pytest.mark.parametrize("case", [c for c in DEFAULTS if c.name not in ("ASGD", "NAdam")], ids=lambda c: c.name)
@each_kind
def test_state_dict_is_plain(ranks: Ranks, case: Case, shard: str) -> None:
    """The plain optimizer loads it, also from a file without pickled objects, and goes on as ours does."""

    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, case, shard)
        state_dict = optimizer.state_dict()
        parity.assert_ranks_equal(comm, state_dict)
        file = io.BytesIO()
        torch.save(state_dict, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        twin = copy.deepcopy(net)
        plain = case.optimizer(twin.parameters())
        plain.load_state_dict(loaded)
        parity.assert_same_bits(plain.state_dict(), state_dict, "the plain optimizer")
        for own, other in zip(net.parameters(), twin.parameters(), strict=True):
            if own.requires_grad:
                own.grad = torch.full_like(own, 0.25)
                other.grad = torch.full_like(own, 0.25)
        optimizer.step()
        plain.step()
        parity.assert_same_bits(optimizer.state_dict(), plain.state_dict(), "the sharded optimizer")

    ranks(body)


def test_states_travel_in_rounds(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large a parameter is, what is under way at a time is not; rounds end anywhere, inside of numbers too."""
    sent = []
    gather = Communicator.gather_rows

    def counting(comm: Communicator, flat: torch.Tensor, what: str) -> torch.Tensor:
        sent.append(flat.nbytes)
        return gather(comm, flat, what)

    monkeypatch.setattr(Communicator, "gather_rows", counting)
    monkeypatch.setattr("heatopt.sharding._gather._CHUNK_BYTES", 37)

    def body(comm: Communicator) -> None:
        _, expected = trained(comm, ADAMW, "none")
        _, optimizer = trained(comm, ADAMW)
        parity.assert_same_bits(optimizer.state_dict(), expected.state_dict(), "the state gathered in rounds")
        assert comm.size == 1 or max(sent) == 37

    ranks(body)


@one_process
@pytest.mark.parametrize("saved_at", [1, 2, 3, 4])
@each_algorithm
def test_loads_at_any_number_of_ranks(case: Case, saved_at: int) -> None:
    """State dicts of some ranks load at others, and training goes on as if never stopped, sharded in another manner."""
    saved_as, loaded_as = SHARDS[1:] if saved_at % 2 else SHARDS[:0:-1]

    def save(comm: Communicator) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        net, optimizer = trained(comm, case, saved_as)
        return optimizer.state_dict(), {name: p.detach().clone() for name, p in net.named_parameters()}

    state_dict, parameters = ThreadWorld(saved_at, timeout=20).run(save)[0]
    plain_net = make_net(case)
    plain_net.load_state_dict(parameters)
    plain = case.optimizer(plain_net.parameters())
    plain.load_state_dict(copy.deepcopy(state_dict))
    loaded = copy.deepcopy(plain.state_dict())
    for parameter in plain_net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    plain.step()
    expected = parity.snapshot(plain_net, plain)

    def load(comm: Communicator) -> None:
        net = make_net(case)
        net.load_state_dict(parameters)
        optimizer = sharded(comm, case, net, loaded_as)
        for parameter in net.parameters():  # a partition is there already
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        net.load_state_dict(parameters)
        given = copy.deepcopy(state_dict)
        optimizer.load_state_dict(given)
        parity.assert_same_bits(optimizer.state_dict(), loaded, "the loaded state")
        parity.assert_same_bits(given, state_dict, "the caller's state dict")
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
        parity.assert_same_bits(parity.snapshot(net, optimizer), expected, "the continued training")

    for size in (1, 2, 3, 4):
        ThreadWorld(size, timeout=20).run(load)


def test_more_ranks_than_elements(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            parameter = nn.Parameter(torch.ones(()))
            optimizer = DataParallelOptimizer(torch.optim.Adam([parameter]), comm=comm, shard=shard)
            for step in range(3):
                parameter.grad = torch.tensor(1.0 + step + comm.rank)
                optimizer.step()
            results.append([parameter.detach(), optimizer.state_dict()])
        assert_same_bits(results)
        held = [state for state in optimizer.state.values() if "exp_avg" in state]
        assert sum(comm.all_gather_object(len(held))) == 1

    ranks(body)


class Descent(torch.optim.Optimizer):
    """Gradient descent, which keeps no state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize("kind", [Descent, torch.optim.SGD])
def test_algorithms_without_a_state(ranks: Ranks, kind: Any) -> None:
    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.ones(3))
        optimizer = DataParallelOptimizer(kind([parameter]), comm=comm, shard="state")
        parameter.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.state_dict()["state"] == {}

    ranks(body)


@each_kind
def test_states_of_one_parameter(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, ADAMW, shard)
        state_dict = optimizer.state_dict()
        for index, parameter in enumerate(net.parameters()):
            expected = state_dict["state"].get(index, {})
            parity.assert_same_bits(optimizer.get_states(parameter), expected, "the state of one parameter")
        value = torch.arange(net.first.numel(), dtype=torch.float64).view_as(net.first)
        optimizer.set_states(net.first, "exp_avg", value)
        optimizer.set_states(net.first, "step", 7.0)
        found = optimizer.get_states(net.first)
        assert torch.equal(found["exp_avg"], value)
        assert found["step"] == 7
        with pytest.raises(ValueError, match="not a parameter"):
            optimizer.get_states(torch.ones(2))
        with pytest.raises(ValueError, match="shape"):
            optimizer.set_states(net.first, "exp_avg", torch.ones(1, 1, 1))

    ranks(body)


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ("text", TypeError, "'exp_avg' is a tensor, .* str"),
        (None, TypeError, "'exp_avg' is a tensor, .* NoneType"),
        ([[1.0], [2.0, 3.0]], TypeError, "'exp_avg' is a tensor, .* list"),
        (torch.ones(2), ValueError, r"shape \(2, \d\), got \(2,\)"),
    ],
    ids=["text", "None", "ragged", "shape of a piece"],
)
def test_wrong_states_are_refused(ranks: Ranks, shard: str, value: Any, error: type[Exception], match: str) -> None:
    """On all ranks, also on those that own nothing of the parameter."""

    def body(comm: Communicator) -> None:
        parameters = [nn.Parameter(torch.ones(2, comm.size)), nn.Parameter(torch.ones(()))]
        optimizer = DataParallelOptimizer(torch.optim.AdamW(parameters), comm=comm, shard=shard)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        before = optimizer.state_dict()
        with pytest.raises(error, match=match):
            optimizer.set_states(parameters[0], "exp_avg", value)
        with pytest.raises(TypeError if error is TypeError else ValueError):
            optimizer.set_states(parameters[1], "exp_avg", value)
        parity.assert_same_bits(optimizer.state_dict(), before, "the state")

    ranks(body)


def test_states_of_one_parameter_without_sharding(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.ones(3))
        optimizer = DataParallelOptimizer(torch.optim.Adam([parameter]), comm=comm)
        assert optimizer.get_states(parameter) == {}
        parameter.grad = torch.ones(3)
        optimizer.step()
        optimizer.set_states(parameter, "exp_avg", torch.full((3,), 2.0))
        assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.full((3,), 2.0))
        optimizer.get_states(parameter)["exp_avg"].zero_()
        assert optimizer.state[parameter]["exp_avg"].sum() == 6

    ranks(body)


@each_algorithm
@each_kind
def test_copies(ranks: Ranks, case: Case, shard: str) -> None:
    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, case, shard)
        twin_net, twin = copy.deepcopy((net, optimizer))
        train(optimizer, net.losses(comm.size, comm.rank))
        train(twin, twin_net.losses(comm.size, comm.rank))
        parity.assert_same_bits(parity.snapshot(twin_net, twin), parity.snapshot(net, optimizer), "the copy")

    ranks(body)


@each_algorithm
@each_kind
def test_copies_on_ranks_that_own_nothing(ranks: Ranks, case: Case, shard: str) -> None:
    """torch looks for the numbers of a state when it restores an optimizer."""

    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.ones(1, 1))
        optimizer = DataParallelOptimizer(case.optimizer([parameter]), comm=comm, shard=shard)
        parameter.grad = torch.ones(1, 1)
        optimizer.step()
        twin_parameter, twin = copy.deepcopy((parameter, optimizer))
        for one, its in ((parameter, optimizer), (twin_parameter, twin)):
            its.zero_grad()
            one.grad = torch.full((1, 1), 0.5)
            its.step()
        parity.assert_same_bits([twin_parameter.detach()], [parameter.detach()], "the copy")
        parity.assert_same_bits(twin.state_dict(), optimizer.state_dict(), "the copy")

    ranks(body, min_size=2)


def test_pickle_keeps_to_its_rank(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, ADAMW)
        data = pickle.dumps((net, optimizer))
        if heatopt.world().size == comm.size:
            pickle.loads(data)
            return
        with pytest.raises(HeatoptError, match=f"rank {comm.rank} of {comm.size}"):
            pickle.loads(data)

    ranks(body, min_size=2)


def test_added_groups(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = Net()
            late = [net.branch, net.scale]
            early = [p for p in net.parameters() if all(p is not other for other in late)]
            optimizer = DataParallelOptimizer(torch.optim.AdamW(early), comm=comm, shard=shard)
            losses = net.losses(comm.size, comm.rank)
            train(optimizer, losses)
            net.zero_grad()
            optimizer.add_param_group({"params": late, "lr": 0.1})
            train(optimizer, losses)
            results.append(parity.snapshot(net, optimizer))
        assert_same_bits(results)

    ranks(body)


def test_frozen_and_converted_parameters(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = Net(torch.float32)
            net.second.requires_grad_(False)
            plain = torch.optim.SGD(net.parameters(), 0.1, 0.9)
            optimizer = DataParallelOptimizer(plain, comm=comm, shard=shard, bucket_mb=SMALL_BUCKET_MB)
            train(optimizer, net.losses(comm.size, comm.rank))
            net.second.requires_grad_(True)
            net.first.requires_grad_(False)
            optimizer.zero_grad()
            train(optimizer, net.losses(comm.size, comm.rank))
            net.double()
            optimizer.zero_grad()
            for state in optimizer.state.values():
                state["momentum_buffer"] = state["momentum_buffer"].double()
            train(optimizer, net.losses(comm.size, comm.rank))
            results.append(parity.snapshot(net, optimizer))
        assert_same_bits(results)

    ranks(body)


def test_load_on_one_rank_is_noticed(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        _, optimizer = trained(comm, ADAMW)
        state_dict = optimizer.state_dict()
        if comm.rank == comm.size - 1:
            optimizer.load_state_dict(state_dict)
        with pytest.raises(RankMismatchError, match=rf"rank {comm.size - 1} has loaded a state dict, rank 0 has not"):
            optimizer.state_dict()
        with pytest.raises(RankMismatchError, match=rf"rank {comm.size - 1} has loaded a state dict, rank 0 has not"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        heatopt.broadcast_optimizer_state(optimizer, comm.size - 1, comm)
        parity.assert_same_bits(optimizer.state_dict(), state_dict, "the broadcast state")

    ranks(body, min_size=2)


@each_algorithm
def test_existing_state_is_divided(ranks: Ranks, case: Case) -> None:
    """A plain optimizer that has trained is wrapped; groups differ."""

    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = make_net(case)
            plain = case.optimizer(grouped(case, net))
            train(plain, net.losses(1, 0))
            optimizer = DataParallelOptimizer(plain, comm=comm, shard=shard)
            train(optimizer, net.losses(comm.size, comm.rank))
            results.append(parity.snapshot(net, optimizer))
        assert_same_bits(results)

    ranks(body, min_size=2)


@each_kind
def test_parameters_that_share_memory_are_refused(ranks: Ranks, shard: str) -> None:
    """Each owner would overwrite what another one has made; columns of one matrix share nothing."""

    def body(comm: Communicator) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        columns = torch.ones(6, 4)
        free = [nn.Parameter(columns[:, :2]), nn.Parameter(columns[:, 2:])]
        optimizer = DataParallelOptimizer(torch.optim.SGD([*net.parameters(), *free], 0.1), comm=comm, shard=shard)
        optimizer.step()
        net[1].weight.data = net[0].weight.data
        with pytest.raises(ValueError, match="parameters 0, 2 share memory"):
            optimizer.step()
        plain = torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1)
        plain.param_groups[0]["params"] *= 2  # torch's constructor only warns
        twice = DataParallelOptimizer(plain, comm=comm, shard=shard)
        with pytest.raises(ValueError, match="parameters 0, 1 share memory"):
            twice.step()

    ranks(body, min_size=2)


@each_kind
def test_strides_that_change_in_place(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for kind in ("none", shard):
            weight = nn.Parameter(torch.zeros(4, 4))
            plain = torch.optim.SGD([weight], 0.1, 0.9)
            optimizer = DataParallelOptimizer(plain, comm=comm, shard=kind)
            for _ in range(2):
                optimizer.zero_grad()
                (weight * torch.arange(16.0).view(4, 4)).sum().backward()
                optimizer.step()
                weight.data = weight.data.t()
            results.append(weight.detach())
        parity.assert_same_bits(results[1], results[0], f"shard={shard!r}")

    ranks(body, min_size=2)


@each_kind
def test_states_loaded_in_part_are_noticed(ranks: Ranks, shard: str) -> None:
    """Ranks that have loaded the states of different parameters do not take them for the whole."""

    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, ADAMW, shard)
        state_dict = optimizer.state_dict()
        partial = {**state_dict, "state": dict(state_dict["state"])}
        if comm.rank == comm.size - 1:
            partial["state"][0] = {}
        optimizer.load_state_dict(partial)
        for look in (optimizer.state_dict, lambda: optimizer.get_states(net.first)):
            with pytest.raises(RankMismatchError, match=f"rank 0 and rank {comm.size - 1} have loaded"):
                look()
        heatopt.broadcast_optimizer_state(optimizer, 0, comm)
        parity.assert_same_bits(optimizer.state_dict(), state_dict, "the broadcast state")

    ranks(body, min_size=2)


@each_kind
def test_one_rank_is_plain(shard: str) -> None:
    net = Net()
    expected = train_alone(ADAMW, net, net.losses(1))
    net = Net()
    optimizer = sharded(SingleCommunicator(), ADAMW, net, shard)
    train(optimizer, net.losses(1))
    parity.assert_same_bits(parity.snapshot(net, optimizer), expected, "one rank")
