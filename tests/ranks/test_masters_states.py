"""Master weights in state dicts, checkpoints and copies, at any number of ranks, with and without sharding."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import Communicator, ThreadWorld
from tests.ranks._masters import ADAMW, MASTER, MASTERS, SGD, Oracle, make_net, snapshot, train, wrap
from tests.ranks._sharding import SHARDS
from tests.support import parity
from tests.support.algorithms import Case, default_cases
from tests.support.designs import combinations
from tests.support.launch import LAUNCH
from tests.support.problems import Net
from tests.support.ranks import Ranks

DEFAULTS = [case for case in default_cases() if case.takes_dense and not case.needs_closure]
FIRST, THEN = range(3), range(3, 6)

each_shard = pytest.mark.parametrize("shard", SHARDS)
each_algorithm = pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
one_process = pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")


def trained(comm: Communicator, case: Case, shard: str) -> tuple[Net, Any]:
    net = make_net(case)
    optimizer = wrap(comm, case, net, shard)
    train(comm, optimizer, net, FIRST)
    return net, optimizer


def fresh(comm: Communicator, case: Case, net: Net, shard: str, **options: Any) -> tuple[Net, Any]:
    """An optimizer without states for a copy of ``net``."""
    other = make_net(case)
    other.load_state_dict(net.state_dict())
    return other, wrap(comm, case, other, shard, **options)


@each_shard
def test_format(ranks: Ranks, shard: str) -> None:
    """torch's entries, wide and whole, and the masters beside them; ``weights_only`` loads them."""

    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, ADAMW, shard)
        found = optimizer.state_dict()
        assert list(found) == ["state", "param_groups", MASTERS]
        assert set(found["state"]) == set(found[MASTERS])
        for number, parameter in enumerate(net.parameters()):
            if number not in found["state"]:
                continue
            entries = found["state"][number]
            assert list(entries) == ["step", "exp_avg", "exp_avg_sq"]
            for value in (entries["exp_avg"], entries["exp_avg_sq"], found[MASTERS][number]):
                assert (value.dtype, value.shape) == (torch.float32, parameter.shape)
            assert torch.equal(found[MASTERS][number].to(parameter.dtype), parameter)
        file = io.BytesIO()
        torch.save(found, file)
        file.seek(0)
        parity.assert_same_bits(torch.load(file, weights_only=True), found, "the file")

    ranks(body)


@each_shard
def test_before_the_first_update(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        net = make_net(ADAMW)
        optimizer = wrap(comm, ADAMW, net, shard)
        assert optimizer.state_dict()[MASTERS] == {}
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.get_states(net.second) == {}

    ranks(body)


@each_algorithm
def test_goes_on_from_a_state_dict(ranks: Ranks, case: Case) -> None:
    """Bit for bit, into every kind of sharding, and the dictionary is the caller's."""

    def body(comm: Communicator) -> None:
        oracle = Oracle(comm, case, make_net(case))
        oracle.train(range(6))
        sources = {source: trained(comm, case, source) for source in SHARDS}
        for source, target in combinations(SHARDS, SHARDS):
            net, optimizer = sources[source]
            saved = copy.deepcopy(optimizer.state_dict())
            other, again = fresh(comm, case, net, target)
            given = copy.deepcopy(saved)
            again.load_state_dict(given)
            parity.assert_same_bits(given, saved, "what was given")
            parity.assert_same_bits(again.state_dict(), saved, "what was loaded")
            train(comm, again, other, THEN)
            parity.assert_same_bits(snapshot(other, again), oracle.snapshot(), f"{source} to {target}")

    ranks(body)


@each_shard
def test_model_loaded_after_the_optimizer(ranks: Ranks, shard: str) -> None:
    """The order does not matter; without the model's state, its parameters are what training goes on from."""

    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, ADAMW, shard)
        saved, parameters = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
        train(comm, optimizer, net, THEN)
        other = make_net(ADAMW)
        again = wrap(comm, ADAMW, other, shard)
        again.load_state_dict(saved)
        other.load_state_dict(parameters)
        train(comm, again, other, THEN)
        parity.assert_same_bits(snapshot(other, again), snapshot(net, optimizer), shard)

    ranks(body)


@each_shard
def test_plain_torch_loads_it(ranks: Ranks, shard: str) -> None:
    """A plain optimizer over wide parameters goes on where this one was; one over narrow ones casts, as ever."""

    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, ADAMW, shard)
        saved = copy.deepcopy(optimizer.state_dict())
        oracle = Oracle(comm, ADAMW, make_net(ADAMW))
        oracle.train(FIRST)
        plain = ADAMW.optimizer(oracle.wide)
        plain.load_state_dict(saved)
        parity.assert_same_bits(plain.state_dict(), oracle.optimizer.state_dict(), "the plain optimizer")
        narrow = ADAMW.optimizer(net.parameters())
        narrow.load_state_dict(saved)
        assert narrow.state[net.second]["exp_avg"].dtype == torch.bfloat16

    ranks(body)


@each_algorithm
def test_loads_plain_torch(ranks: Ranks, case: Case) -> None:
    """A plain state dict has no masters: they begin at the parameters, with its moments made wide."""

    def body(comm: Communicator) -> None:
        start = make_net(case)
        plain = case.optimizer(start.parameters())
        for step in FIRST:
            plain.zero_grad()
            start(start.batch(step, comm.size)).backward()
            plain.step()
        saved = copy.deepcopy(plain.state_dict())
        results = []
        for shard in SHARDS:
            net, optimizer = fresh(comm, case, start, shard)
            optimizer.load_state_dict(copy.deepcopy(saved))
            train(comm, optimizer, net, THEN)
            results.append(snapshot(net, optimizer))
            tensors = [leaf for _, leaf in parity.leaves(results[-1]["states"]) if isinstance(leaf, torch.Tensor)]
            assert {tensor.dtype for tensor in tensors} <= {torch.float32}
            parity.assert_same_bits(results[-1], results[0], f"shard={shard!r}")
        start.zero_grad()
        oracle = Oracle(comm, case, start)
        oracle.optimizer.load_state_dict(saved)  # torch casts to the wide parameters' dtype
        oracle.train(THEN)
        parity.assert_same_bits(results[0]["net"], oracle.snapshot()["net"], "the parameters")

    ranks(body)


@each_shard
def test_master_of_another_shape(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        _, optimizer = trained(comm, ADAMW, shard)
        saved = copy.deepcopy(optimizer.state_dict())
        saved[MASTERS][0] = torch.zeros(2, 2)
        with pytest.raises(ValueError, match=r"master weight of parameter 0 has shape \(2, 2\)"):
            optimizer.load_state_dict(saved)

    ranks(body)


@each_shard
def test_states_of_one_parameter(ranks: Ranks, shard: str) -> None:
    """The master is read whole; set, it becomes the parameter's value too."""

    def body(comm: Communicator) -> None:
        oracle = Oracle(comm, ADAMW, make_net(ADAMW))
        oracle.train(FIRST)
        net, optimizer = trained(comm, ADAMW, shard)
        number = list(dict(net.named_parameters())).index("second")
        found = optimizer.get_states(net.second)
        assert list(found) == ["step", "exp_avg", "exp_avg_sq", MASTER]
        assert torch.equal(found[MASTER], oracle.wide[number])
        value = torch.linspace(-1, 1, 21).reshape(3, 7)
        optimizer.set_states(net.second, MASTER, value)
        assert torch.equal(net.second, value.bfloat16())
        assert torch.equal(optimizer.get_states(net.second)[MASTER], value)
        with torch.no_grad():
            oracle.wide[number].copy_(value)
            oracle.net.second.copy_(value)
        oracle.train(THEN)
        train(comm, optimizer, net, THEN)
        parity.assert_same_bits(snapshot(net, optimizer), oracle.snapshot(), shard)
        with pytest.raises(ValueError, match="has shape"):
            optimizer.set_states(net.second, MASTER, torch.zeros(3))

    ranks(body)


@each_shard
def test_no_master_of_a_wide_parameter(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        weight = nn.Parameter(torch.ones(3))
        optimizer: Any = heatopt.DataParallelOptimizer(
            torch.optim.SGD([weight]), comm=comm, shard=shard, master_dtype=torch.float32
        )
        with pytest.raises(ValueError, match="has no master"):
            optimizer.set_states(weight, MASTER, torch.zeros(3))

    ranks(body)


# Checkpoints


@one_process
@pytest.mark.parametrize("case", [ADAMW, SGD, *DEFAULTS[1:4:2]], ids=lambda case: case.name)
@each_shard
def test_checkpoints_at_any_number_of_ranks(case: Case, shard: str, tmp_path: Path) -> None:
    for saving in (1, 2, 3):
        path = tmp_path / str(saving)

        def save(comm: Communicator, path: Path = path) -> dict[str, Any]:
            net, optimizer = trained(comm, case, shard)
            heatopt.save(path, model=net, optimizer=optimizer, comm=comm)
            return copy.deepcopy(snapshot(net, optimizer))

        saved = ThreadWorld(saving, timeout=20).run(save)[0]
        for loading in (1, 2, 3):

            def load(comm: Communicator, path: Path = path, saved: dict[str, Any] = saved) -> None:
                results = []
                for target in SHARDS:
                    net = make_net(case)
                    optimizer = wrap(comm, case, net, target)
                    heatopt.load(path, model=net, optimizer=optimizer, comm=comm)
                    parity.assert_same_bits(snapshot(net, optimizer), saved, target)
                    train(comm, optimizer, net, THEN)
                    results.append(snapshot(net, optimizer))
                    parity.assert_same_bits(results[-1], results[0], target)

            ThreadWorld(loading, timeout=20).run(load)


@each_shard
def test_checkpoints_without_masters(ranks: Ranks, shard: str, tmp_path: Path) -> None:
    """One with masters loads into optimizers that have none, and the other way round."""

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        net, optimizer = trained(comm, ADAMW, shard)
        heatopt.save(path, model=net, optimizer=optimizer, comm=comm)
        expected = copy.deepcopy(snapshot(net, optimizer)["states"])
        bare = make_net(ADAMW)
        plain = ADAMW.optimizer(bare.parameters())
        heatopt.load(path, model=bare, optimizer=plain, comm=comm)
        parity.assert_same_bits(plain.state_dict(), expected, "the plain optimizer")
        other, without = fresh(comm, ADAMW, net, shard, master_dtype=None)
        heatopt.load(path, model=other, optimizer=without)
        parity.assert_same_bits(without.state_dict(), expected, "the optimizer without masters")
        heatopt.save(path, model=other, optimizer=without)
        last, again = fresh(comm, ADAMW, net, shard)
        heatopt.load(path, model=last, optimizer=again)
        assert again.state_dict()[MASTERS] == {}
        train(comm, again, last, THEN)

    ranks(body)


# Ranks, groups, copies, conversions


@each_shard
def test_broadcast_optimizer_state(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, ADAMW, shard)
        saved = copy.deepcopy(optimizer.state_dict())
        train(comm, optimizer, net, THEN)
        other = make_net(ADAMW)
        again = wrap(comm, ADAMW, other, shard)
        if comm.rank == comm.size - 1:
            again.load_state_dict(saved)
        heatopt.broadcast_optimizer_state(again, root=comm.size - 1, comm=comm)
        parity.assert_same_bits(again.state_dict(), saved, shard)
        parity.assert_ranks_equal(comm, again.state_dict())

    ranks(body)


@each_shard
def test_join(ranks: Ranks, shard: str) -> None:
    """Ranks that have left receive the masters of those that trained on."""

    def body(comm: Communicator) -> None:
        results = []
        for kind in ("none", shard):
            net, optimizer = trained(comm, ADAMW, kind)
            with optimizer.join():
                for step in range(3, 4 + comm.rank):
                    optimizer.zero_grad()
                    net(net.batch(step, comm.size).part(comm.rank, comm.size)).backward()
                    optimizer.step()
            train(comm, optimizer, net, range(9, 11))
            results.append(snapshot(net, optimizer))
        parity.assert_ranks_equal(comm, results)
        parity.assert_same_bits(results[1], results[0], shard)
        masters = results[0]["masters"]
        assert any(not torch.equal(m, m.bfloat16().float()) for m in masters.values())

    ranks(body)


@each_shard
def test_added_groups(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, ADAMW, shard)
        before = copy.deepcopy(optimizer.state_dict()[MASTERS])
        added = nn.Parameter(torch.ones(11, dtype=torch.bfloat16))
        optimizer.add_param_group({"params": [added], "lr": 2.0**-12, "weight_decay": 0.0})
        parity.assert_same_bits(optimizer.state_dict()[MASTERS], before, "what was there")
        for _ in range(4):
            optimizer.zero_grad()
            added.grad = torch.ones_like(added)
            optimizer.step()
        found = optimizer.state_dict()[MASTERS]
        torch.testing.assert_close(found.pop(len(list(net.parameters()))), torch.full((11,), 1 - 2.0**-10))
        parity.assert_same_bits(found, before, "the others")

    ranks(body)


@each_shard
@pytest.mark.parametrize("pickled", [False, True])
def test_copies(ranks: Ranks, shard: str, pickled: bool) -> None:
    """Also of a parameter that has nothing but a master."""

    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, ADAMW, shard)
        optimizer.set_states(net.unused, MASTER, torch.full(net.unused.shape, 1 / 3))
        if pickled:
            if comm.size > 1 and not LAUNCH.launched:
                return  # a pickle belongs to the world, which has one rank here
            other, again = pickle.loads(pickle.dumps((net, optimizer)))
        else:
            other, again = copy.deepcopy((net, optimizer))
        train(comm, optimizer, net, THEN)
        train(comm, again, other, THEN)
        parity.assert_same_bits(snapshot(other, again), snapshot(net, optimizer), "the copy")

    ranks(body)


@each_shard
def test_conversions(ranks: Ranks, shard: str) -> None:
    """A parameter made wide is updated as it is, from its own value; made narrow again it has a master again."""

    def body(comm: Communicator) -> None:
        net, optimizer = trained(comm, SGD, shard)
        assert optimizer.state_dict()[MASTERS]
        net.float()
        train(comm, optimizer, net, range(3, 4))
        assert optimizer.state_dict()[MASTERS] == {}
        net.half()
        train(comm, optimizer, net, THEN)
        oracle = Oracle(comm, SGD, make_net(SGD))
        oracle.train(FIRST)
        oracle = Oracle(comm, SGD, oracle.net.float())
        oracle.train(range(3, 4))
        oracle = Oracle(comm, SGD, oracle.net.half())
        oracle.train(THEN)
        parity.assert_same_bits(snapshot(net, optimizer), oracle.snapshot(), shard)

    ranks(body)
