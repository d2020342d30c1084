"""``parameters_per_node="shared"``: the parameters of a node live once, and nobody can tell by what is computed."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator, ThreadWorld
from heatopt.comm._group import RankGroup
from tests.ranks._sharding import train_scaled
from tests.ranks.test_exactness import make_net
from tests.support import parity
from tests.support.algorithms import Case, default_cases
from tests.support.launch import LAUNCH
from tests.support.problems import Net, Table, words
from tests.support.ranks import Ranks
from tests.support.training import SMALL_BUCKET_MB, train, train_as_rank

one_process = pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")

SHARDS = ("state", "gradients")
CHOICES = ("own", "shared")
DENSE = [case for case in default_cases() if case.takes_dense]

each_shard = pytest.mark.parametrize("shard", SHARDS)
Run = Callable[[Any, Any, list[Any]], Any]


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.1)


def wrap(comm: Communicator, module: nn.Module, shard: str = "state", **options: Any) -> Any:
    settings = {"parameters_per_node": "shared", "model": module, "bucket_mb": SMALL_BUCKET_MB} | options
    return DataParallelOptimizer(adamw(module), comm=comm, shard=shard, **settings)


def assert_same(comm: Communicator, results: list[Any]) -> None:
    """Shared parameters have come to the bits of the first result, parameters of each rank's own, on all ranks."""
    parity.assert_ranks_equal(comm, results)
    for found in results[1:]:
        parity.assert_same_bits(found, results[0], "the run with shared parameters")


def are_shared(comm: Communicator, parameters: Any) -> bool:
    """Whether all ranks of each node, and no others, see what the first of them writes past the version counters."""
    parameters = [p for p in parameters if p.numel()]
    before = [p.detach().clone() for p in parameters]
    comm.barrier()
    if comm.node_rank == 0:
        for parameter in parameters:
            parameter.data.fill_(comm.node_index + 3)
    comm.barrier()
    seen = all(comm.all_gather_object(all(bool((p == comm.node_index + 3).all()) for p in parameters)))
    if comm.node_rank == 0 or not seen:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)
    comm.barrier()
    return seen


# The same bits


def run_case(comm: Communicator, case: Case, **options: Any) -> list[Any]:
    results = []
    for choice in CHOICES:
        net = make_net(case)
        losses = net.losses(comm.size, comm.rank) * 2
        results.append(train_as_rank(comm, case, net, losses, model=net, parameters_per_node=choice, **options))
    return results


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_each_algorithm(ranks: Ranks, case: Case) -> None:
    def body(comm: Communicator) -> None:
        for shard in SHARDS[:1] if case.name == "LBFGS" else SHARDS:
            assert_same(comm, run_case(comm, case, shard=shard))

    ranks(body, min_size=2, shared_memory=True)


@one_process
@pytest.mark.parametrize(("size", "per_node"), [(3, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "LBFGS"])
def test_several_nodes(size: int, per_node: int, name: str) -> None:
    """Elementwise, whole tensors, and the whole problem; nodes of one rank and of unequal numbers of them."""
    case = next(case for case in DENSE if case.name == name)

    def body(comm: Communicator) -> None:
        for shard in SHARDS[:1] if name == "LBFGS" else SHARDS:
            assert_same(comm, run_case(comm, case, shard=shard))

    ThreadWorld(size, ranks_per_node=per_node, shared_memory=True, timeout=20).run(body)


@one_process
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor], ids=lambda kind: kind.__name__)
def test_traffic_of_parameters(kind: type[torch.optim.Optimizer]) -> None:
    """None within a node. Between two nodes each rank sends its own pieces to one rank of the other node."""

    def gathered(per_node: int) -> list[int]:
        world = ThreadWorld(4, ranks_per_node=per_node, shared_memory=True, timeout=20)

        def body(comm: Communicator) -> None:
            owned = [nn.Parameter(torch.ones(20, 64)) for _ in range(4)]
            plain: Any = kind(owned)  # type: ignore[call-arg]
            optimizer = DataParallelOptimizer(plain, comm=comm, shard="state", parameters_per_node="shared")
            for _ in range(2):
                optimizer.zero_grad()
                sum((p * (comm.rank + 1)).sum() for p in owned).backward()
                comm.barrier()
                before[comm.rank] = len([event for event in list(world.events) if event.rank == comm.rank])
                comm.barrier()
                optimizer.step()

        before = [0] * 4
        world.run(body)
        found = []
        for rank in range(4):
            events = [event for event in world.events if event.rank == rank][before[rank] :]
            found += [event.bytes for event in events if event.kind not in ("words", "objects")]
        return found

    assert gathered(4) == []
    assert gathered(2) == [20 * 64 * 4] * 4


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@each_shard
def test_sparse_gradients(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for choice in CHOICES:
            table = Table(dense=True)
            plain = torch.optim.SGD(table.parameters(), lr=0.1)
            optimizer = DataParallelOptimizer(plain, comm=comm, model=table, shard=shard, parameters_per_node=choice)
            for step in range(3):
                optimizer.zero_grad()
                table(words([[comm.rank, step], [3, 4 + step]], step)).backward()
                optimizer.step()
            results.append(parity.snapshot(table, optimizer))
        assert_same(comm, results)

    ranks(body, min_size=2, shared_memory=True)


@each_shard
def test_masters(ranks: Ranks, shard: str) -> None:
    """bfloat16 parameters with masters in single precision, one of which is set."""

    def body(comm: Communicator) -> None:
        results = []
        for choice in CHOICES:
            net = Net(torch.bfloat16)
            optimizer = wrap(comm, net, shard, parameters_per_node=choice, master_dtype=torch.float32)
            train(optimizer, net.losses(comm.size, comm.rank))
            optimizer.set_states(net.first, "master_weight", torch.full((7, 5), 0.3))
            assert bool((net.first == torch.tensor(0.3).bfloat16()).all())
            train(optimizer, net.losses(comm.size, comm.rank))
            results.append(parity.snapshot(net, optimizer))
        assert_same(comm, results)

    ranks(body, min_size=2, shared_memory=True)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor], ids=lambda kind: kind.__name__)
@each_shard
def test_strides_are_kept(ranks: Ranks, shard: str, kind: type[torch.optim.Optimizer]) -> None:
    """Those of transposed and of channels-last parameters, whose pieces are not in one piece in memory."""

    def body(comm: Communicator) -> None:
        results = []
        for choice in CHOICES:
            numbers = torch.linspace(-1, 1, 3 * 5 * 7 * 2, dtype=torch.float64)
            owned = [
                nn.Parameter(numbers.view(15, 14).t()),
                nn.Parameter(numbers.view(3, 5, 7, 2).contiguous(memory_format=torch.channels_last)),
                nn.Parameter(numbers[:5].clone()),
            ]
            strides = [p.stride() for p in owned]
            plain: Any = kind(owned)  # type: ignore[call-arg]
            optimizer = DataParallelOptimizer(plain, comm=comm, shard=shard, parameters_per_node=choice)
            for step in range(3):
                optimizer.zero_grad()
                sum((p * p * (comm.rank + step)).sum() for p in owned).backward()
                optimizer.step()
            assert [p.stride() for p in owned] == strides
            results.append([p.detach().clone() for p in owned])
        assert_same(comm, results)

    ranks(body, min_size=2, shared_memory=True)


# With all that surrounds a step


def clipping_and_accumulation(net: Net, optimizer: Any, losses: list[Any]) -> Any:
    norms = []
    for loss in losses:
        optimizer.zero_grad()
        with optimizer.no_sync():
            loss().backward()
        loss().backward()
        norms.append(optimizer.clip_grad_norm_(0.1))
        optimizer.step()
    return norms


def closures(net: Net, optimizer: Any, losses: list[Any]) -> None:
    train(optimizer, losses, use_closure=True)


def join(net: Net, optimizer: Any, losses: list[Any]) -> None:
    train(optimizer, losses)
    with optimizer.join():
        train(optimizer, losses[: 1 + optimizer._comm.rank % 3])
    train(optimizer, losses)


def interrupted_join(net: Net, optimizer: Any, losses: list[Any]) -> None:
    with contextlib.suppress(LookupError), optimizer.join():
        train(optimizer, losses)
        raise LookupError("no data")
    train(optimizer, losses)


def frozen(net: Net, optimizer: Any, losses: list[Any]) -> None:
    net.second.requires_grad_(False)
    train(optimizer, losses)
    net.second.requires_grad_(True)
    train(optimizer, losses)


def converted(net: Net, optimizer: Any, losses: list[Any]) -> None:
    net.float()
    train(optimizer, net.losses(optimizer._comm.size, optimizer._comm.rank))


def other_data(net: Net, optimizer: Any, losses: list[Any]) -> None:
    """Behind its back, once with other values."""
    train(optimizer, losses)
    net.bias.data = net.bias.data.clone()
    net.second.data = torch.full_like(net.second, 0.25)
    train(optimizer, losses)


def written(net: Net, optimizer: Any, losses: list[Any]) -> None:
    train(optimizer, losses)
    with optimizer.own_parameters(), torch.no_grad():
        net.first.mul_(0.5)
        with optimizer.own_parameters():
            net.load_state_dict({name: value * 0.5 for name, value in net.state_dict().items()})
    train(optimizer, losses)


def state_dict(net: Net, optimizer: Any, losses: list[Any]) -> None:
    train(optimizer, losses)
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, losses)
    optimizer.load_state_dict(saved)
    train(optimizer, losses)


def added_group(net: Net, optimizer: Any, losses: list[Any]) -> Any:
    train(optimizer, losses)
    extra = nn.Parameter(torch.full((11,), 1.0 + optimizer._comm.rank, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    train(optimizer, [lambda loss=loss: loss() + extra.square().sum() for loss in losses])
    return extra.detach().clone()


RUNS = [
    *(clipping_and_accumulation, train_scaled, closures, join, interrupted_join, frozen, converted, other_data),
    *(written, state_dict, added_group),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_around_a_step(ranks: Ranks, run: Run) -> None:
    def body(comm: Communicator) -> None:
        for shard in SHARDS:
            results = []
            for choice in CHOICES:
                net = Net()
                optimizer = wrap(comm, net, shard, parameters_per_node=choice)
                extra = run(net, optimizer, net.losses(comm.size, comm.rank))
                results.append([parity.snapshot(net, optimizer), extra])
                if choice == "shared" and comm.size > 1:
                    assert are_shared(comm, optimizer._parameters())
            assert_same(comm, results)

    ranks(body, min_size=2, shared_memory=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_share_anew(ranks: Ranks, how: str) -> None:
    """The copy of the model has memory of its own up to the first step of the copied optimizer."""

    def duplicate(pair: Any) -> Any:
        return copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))

    def body(comm: Communicator) -> None:
        if how == "pickle" and not LAUNCH.launched:
            return  # what is unpickled talks to the world, which is not made of threads
        results = []
        for choice in CHOICES:
            net = Net()
            optimizer = wrap(comm, net, parameters_per_node=choice, model=None)
            losses = net.losses(comm.size, comm.rank)
            train(optimizer, losses)
            other, twin = duplicate((net, optimizer))
            train(twin, other.losses(comm.size, comm.rank))
            train(optimizer, losses[:1])
            results.append([parity.snapshot(net, optimizer), parity.snapshot(other, twin)])
            if choice == "shared" and comm.size > 1:
                assert are_shared(comm, other.parameters())
                assert are_shared(comm, net.parameters())
        assert_same(comm, results)

    ranks(body, min_size=2, shared_memory=True)


@pytest.mark.parametrize(("saved_with", "loaded_with"), [("own", "shared"), ("shared", "own"), ("shared", "shared")])
def test_checkpoints(ranks: Ranks, tmp_path: Path, saved_with: str, loaded_with: str) -> None:
    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(str(tmp_path / "checkpoint"))
        net = Net()
        optimizer = wrap(comm, net, parameters_per_node=saved_with)
        losses = net.losses(comm.size, comm.rank)
        train(optimizer, losses)
        heatopt.save(path, model=net, optimizer=optimizer, comm=comm)
        train(optimizer, losses)
        other = Net()
        loaded = wrap(comm, other, parameters_per_node=loaded_with)
        train(loaded, other.losses(comm.size, comm.rank)[:1])
        heatopt.load(path, model=other, optimizer=loaded, comm=comm)
        if loaded_with == "shared" and comm.size > 1:
            assert are_shared(comm, other.parameters())
        train(loaded, other.losses(comm.size, comm.rank))
        assert_same(comm, [parity.snapshot(net, optimizer), parity.snapshot(other, loaded)])

    ranks(body, min_size=2, shared_memory=True)


# Memory


def pss_of(tensor: torch.Tensor) -> int:
    """Bytes of the mapping that ``tensor`` lies in: this process's part of what it shares with others."""
    address = tensor.data_ptr()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no mapping has this address")


@pytest.mark.launched
def test_memory_of_a_node(ranks: Ranks) -> None:
    """Each process accounts for its part of the parameters, within a page for each of two ends."""

    def body(comm: Communicator) -> None:
        net = nn.Sequential(nn.Linear(700, 900), nn.Linear(900, 500))
        optimizer = DataParallelOptimizer(
            adamw(net), comm=comm, model=net, shard="state", parameters_per_node="shared", bucket_mb=1.0
        )
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.ones(2, 700)).sum().backward()
            optimizer.step()
        net(torch.ones(2, 700))
        total = sum(p.nbytes for p in net.parameters())
        comm.barrier()  # all ranks have read all of it
        found = pss_of(net[0].weight)
        comm.barrier()  # nobody ends while others still look
        assert abs(found - total / comm.size) <= 0.02 * total / comm.size + 8192

    ranks(body, min_size=2)


def test_parameters_outlive_the_optimizer(ranks: Ranks) -> None:
    """Each rank gets memory of its own, and another optimizer may have them; nothing has to be closed."""

    def body(comm: Communicator) -> None:
        results = []
        for choice in CHOICES:
            net = Net()
            losses = net.losses(comm.size, comm.rank)
            optimizer = wrap(comm, net, parameters_per_node=choice)
            train(optimizer, losses)
            comm.barrier()
            del optimizer
            gc.collect()
            comm.barrier()
            assert comm.size == 1 or not are_shared(comm, net.parameters())
            second = DataParallelOptimizer(adamw(net), comm=comm, model=net)
            train(second, losses)
            results.append(parity.snapshot(net, second))
        assert_same(comm, results)

    ranks(body, shared_memory=True)


def test_a_file_has_one_layer_alone(ranks: Ranks) -> None:
    """Each parameter has a storage of its own, so saving one does not save all."""

    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, net)
        assert [p.untyped_storage().nbytes() for p in net.parameters()] == [p.nbytes for p in net.parameters()]
        train(optimizer, net.losses(comm.size, comm.rank)[:1])

    ranks(body, shared_memory=True)


# Refusals: the same error on all ranks, which says what to do


def test_wrong_settings() -> None:
    net = Net()
    for choice, shard, kind, text in (
        (True, "state", TypeError, "must be 'own' or 'shared', got True"),
        ("node", "state", ValueError, "must be 'own' or 'shared', got 'node'"),
        ("shared", "none", ValueError, "needs shard='state' or 'gradients'.*got shard='none'"),
    ):
        with pytest.raises(kind, match=text):
            DataParallelOptimizer(adamw(net), shard=shard, parameters_per_node=choice)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fuse=True and shard='state'"):
        DataParallelOptimizer(adamw(net), fuse=True, shard="state", parameters_per_node="shared")


@one_process
def test_memory_that_cannot_be_shared() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=r"needs memory that the ranks of a node share.*parameters_per_node='own'"):
            wrap(comm, Net())

    ThreadWorld(2, timeout=20).run(body)


@pytest.mark.parametrize("how", ["two parameters", "a buffer", "share_memory", "on one rank"])
def test_parameters_that_cannot_move(ranks: Ranks, how: str) -> None:
    """Whoever finds the reason: all ranks raise it, and the parameters are as they were."""

    def body(comm: Communicator) -> None:
        net = Net(with_empty=False)
        places = [p.data_ptr() for p in net.parameters()]
        text = "'branch' is in memory that other processes may see"
        if how == "two parameters":
            net.unused.data = net.branch.data.view(-1)[:12].view(4, 3)
            text = "share memory.*'branch', 'unused'; make them one parameter"
        elif how == "a buffer":
            net.register_buffer("twin", net.first.data)
            text = "share memory.*'first', a tensor of the model that it does not own"
        elif how == "share_memory" or comm.rank == comm.size - 1:
            net.branch.share_memory_()
        changed = [p.data_ptr() for p in net.parameters()]
        with pytest.raises(ValueError, match=text):
            wrap(comm, net)
        assert [p.data_ptr() for p in net.parameters()] == changed
        assert changed[0] == places[0]

    ranks(body, min_size=2, shared_memory=True)


@pytest.mark.parametrize("who", ["all", "last"])
def test_a_write_is_refused(ranks: Ranks, who: str) -> None:
    """At the next step, on all ranks and again, until the parameters have been apart."""

    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, net)
        losses = net.losses(comm.size, comm.rank)
        train(optimizer, losses)
        rank = 0 if who == "all" else comm.size - 1
        if comm.rank >= rank:
            with torch.no_grad():
                net.scale.clamp_(-1, 1)
        for _ in range(2):
            with pytest.raises(heatopt.errors.HeatoptError, match=rf"rank {rank} has written into parameter 'scale'"):
                train(optimizer, losses)
        with optimizer.own_parameters():
            pass
        train(optimizer, losses)
        parity.assert_ranks_equal(comm, parity.snapshot(net, optimizer))

    ranks(body, min_size=2, shared_memory=True)


def test_other_data_on_one_rank_is_refused(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, net)
        losses = net.losses(comm.size, comm.rank)
        if comm.rank == comm.size - 1:
            net.branch.data = net.branch.data.clone()
        with pytest.raises(heatopt.errors.RankMismatchError, match=rf"'branch' .* rank 0 or rank {comm.size - 1}"):
            train(optimizer, losses)

    ranks(body, min_size=2, shared_memory=True)


def test_no_step_while_parameters_are_apart(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, net)
        losses = net.losses(comm.size, comm.rank)
        with optimizer.own_parameters(), pytest.raises(heatopt.errors.HeatoptError, match="own_parameters"):
            train(optimizer, losses)
        train(optimizer, losses)

    ranks(body, min_size=2, shared_memory=True)


def test_a_closure_may_not_write(ranks: Ranks) -> None:
    """LBFGS evaluates it at trial points, which are nobody's to change."""

    def body(comm: Communicator) -> None:
        for change in ("write", "data"):
            net = nn.Linear(4, 3)
            plain = torch.optim.LBFGS(net.parameters(), max_iter=4)
            optimizer = DataParallelOptimizer(plain, comm=comm, shard="state", parameters_per_node="shared")
            calls = []

            def closure(change: str = change, net: Any = net, optimizer: Any = optimizer, calls: Any = calls) -> Any:
                optimizer.zero_grad()
                loss = net(torch.ones(2, 4)).square().sum()
                loss.backward()
                calls.append(loss.item())
                if len(calls) == 2 and change == "write":
                    with torch.no_grad():
                        net.weight.clamp_(-1, 1)
                elif len(calls) == 2:
                    net.weight.data = net.weight.data.clone()
                return loss

            text = "has written into" if change == "write" else "was given other data within a step"
            with pytest.raises(heatopt.errors.HeatoptError, match=text):
                optimizer.step(closure)

    ranks(body, min_size=2, shared_memory=True)


# Nobody reads while others write


class Slow(torch.optim.SGD):
    """On one rank an update takes its time, or fails."""

    def __init__(self, parameters: Any, what: Callable[[], None]) -> None:
        super().__init__(parameters, lr=0.5)
        self.what = what

    def step(self, closure: Any = None) -> Any:
        self.what()
        return super().step(closure)


def set_gradients(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize("where", ["backward", "between", "step hook"])
@each_shard
def test_a_slow_reader_sees_one_step(ranks: Ranks, where: str, shard: str) -> None:
    """The last rank looks at the parameters for a while, where the others have nothing to do but their update."""

    def body(comm: Communicator) -> None:
        net = Net()
        plain = torch.optim.SGD(net.parameters(), lr=0.5)
        is_slow = comm.rank == comm.size - 1
        looks: list[bool] = []

        def look(*_: Any) -> None:
            if is_slow:
                before = [p.detach().clone() for p in net.parameters()]
                time.sleep(0.1)
                looks.append(all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)))

        if where == "step hook":
            plain.register_step_pre_hook(look)
        optimizer = DataParallelOptimizer(plain, comm=comm, model=net, shard=shard, parameters_per_node="shared")
        batch = net.batch(0, comm.size).part(comm.rank, comm.size)
        for _ in range(2):
            optimizer.zero_grad()
            batch.inputs.requires_grad_()
            # Its gradient comes when those of the parameters have come, and have been averaged.
            handle = batch.inputs.register_hook(look) if where == "backward" else None
            net(batch).backward()
            if handle is not None:
                handle.remove()
            if where == "between":
                look()
            optimizer.step()
        assert looks == [True] * 2 * is_slow

    ranks(body, min_size=2, shared_memory=True)


def step_beside_a_slow_writer(comm: Communicator) -> None:
    """Whoever returns from ``step()`` sees what all ranks have written, those of other nodes too."""
    net = Net()
    slow = Slow(net.parameters(), lambda: time.sleep(0.1 * (comm.rank == comm.size - 1)))
    optimizer = DataParallelOptimizer(slow, comm=comm, shard="state", parameters_per_node="shared")
    expected = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        set_gradients(net)
        optimizer.step()
        found = [p.detach().clone() for p in net.parameters()]
        expected = [p - 0.5 for p in expected]
        assert all(map(torch.equal, found, expected))
        comm.barrier()


def test_nobody_goes_on_before_a_slow_writer(ranks: Ranks) -> None:
    ranks(step_beside_a_slow_writer, min_size=2, shared_memory=True)


@one_process
@pytest.mark.parametrize("size", [3, 4])
def test_nobody_goes_on_before_a_slow_writer_of_another_node(size: int) -> None:
    ThreadWorld(size, ranks_per_node=2, shared_memory=True, timeout=20).run(step_beside_a_slow_writer)


def test_a_rank_that_fails_in_its_update(ranks: Ranks) -> None:
    """The others are told; nobody waits for the time-out, all ranks have the same, and they can go on."""

    def body(comm: Communicator) -> None:
        net = Net()
        last = comm.size - 1
        fails = True

        def fail() -> None:
            if fails and comm.rank == last:
                raise MemoryError("no room for the moments")

        optimizer = DataParallelOptimizer(
            Slow(net.parameters(), fail), comm=comm, shard="state", parameters_per_node="shared"
        )
        set_gradients(net)
        kind = MemoryError if comm.rank == last else heatopt.errors.RankFailedError
        with pytest.raises(kind, match="no room" if comm.rank == last else f"rank {last} has failed"):
            optimizer.step()
        parity.assert_ranks_equal(comm, list(net.parameters()))
        fails = False
        before = [parameter.detach().clone() for parameter in net.parameters()]
        optimizer.step()
        parity.assert_ranks_equal(comm, list(net.parameters()))
        assert any(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))

    ranks(body, min_size=2, shared_memory=True)


def test_meetings_of_a_step(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header, one before pieces are written, and one after, which tells of errors too: three exchanges."""
    met: dict[int, list[str]] = {}
    for name in ("exchange_words", "exchange_objects"):
        exchange = getattr(RankGroup, name)

        def recorded(self: Any, content: Any, what: str = "", exchange: Any = exchange) -> Any:
            met.setdefault(threading.get_ident(), []).append(what)
            return exchange(self, content, what)

        monkeypatch.setattr(RankGroup, name, recorded)

    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, net, blocking=True)
        for _ in range(2):
            set_gradients(net)
            optimizer.synchronize()
            met.pop(threading.get_ident(), None)
            optimizer.step()
        found = met[threading.get_ident()]
        assert len(found) == 3
        assert found[0].startswith("step()")
        comm.barrier()

    ranks(body, min_size=2, shared_memory=True)


def test_a_graph_from_before_a_step_is_void(ranks: Ranks) -> None:
    """On all ranks, not only on the one that wrote: autograd would compute with the new values."""

    def body(comm: Communicator) -> None:
        weight = nn.Parameter(torch.ones(3, 5))
        plain = torch.optim.Adafactor([weight])  # has one owner
        optimizer = DataParallelOptimizer(plain, comm=comm, shard="state", parameters_per_node="shared")
        graph = weight.square().sum()
        weight.sum().backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"), optimizer.no_sync():
            graph.backward()

    ranks(body, min_size=2, shared_memory=True)
