"""Master weights: narrow parameters are trained as wide copies of them would be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator, SingleCommunicator
from heatopt.errors import RankMismatchError
from tests.ranks._masters import ADAMW, MASTER, MASTERS, SGD, Oracle, backward, make_net, snapshot, train, wrap
from tests.ranks._sharding import SHARDS
from tests.support import parity
from tests.support.algorithms import Case, covering_cases, default_cases, option_cases
from tests.support.launch import LAUNCH
from tests.support.problems import Net, Table, random, words
from tests.support.ranks import Ranks

DEFAULTS = [case for case in default_cases() if case.takes_dense and not case.needs_closure]
OPTIONS = [
    case
    for case in (covering_cases() if LAUNCH.launched else option_cases(thorough=False))
    if case.values[0].takes_dense and not case.values[0].needs_closure
]
HALF = (torch.bfloat16, torch.float16)
STEPS = range(5)

each_shard = pytest.mark.parametrize("shard", SHARDS)


# Exactness


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
def test_equals_wide_copies(ranks: Ranks, case: Case, dtype: torch.dtype) -> None:
    """Parameters, masters and states are those of plain torch, to the last bit, with each kind of sharding."""

    def body(comm: Communicator) -> None:
        oracle = Oracle(comm, case, make_net(case, dtype))
        oracle.train(STEPS)
        for shard in SHARDS:
            net = make_net(case, dtype)
            optimizer = wrap(comm, case, net, shard)
            train(comm, optimizer, net, STEPS)
            found = snapshot(net, optimizer)
            parity.assert_same_bits(found, oracle.snapshot(), f"shard={shard!r}")
            parity.assert_ranks_equal(comm, found)

    ranks(body)


@pytest.mark.parametrize("case", OPTIONS)
def test_options(ranks: Ranks, case: Case) -> None:
    """Those that an algorithm reads when it is made, too: Adagrad's accumulators begin in the masters' dtype."""
    if case.options.get("differentiable"):
        pytest.skip("refused")
    if case.name == "SGD" and case.options.get("fused"):
        pytest.skip("heatopt uses fused=False for half types, whatever is updated")

    def body(comm: Communicator) -> None:
        oracle = Oracle(comm, case, make_net(case))
        oracle.train(STEPS)
        for shard in SHARDS:
            net = make_net(case)
            optimizer = wrap(comm, case, net, shard)
            train(comm, optimizer, net, STEPS)
            if case.options.get("fused") and shard != "none":  # kernels round the ends of tensors differently
                parity.assert_close(snapshot(net, optimizer)["masters"], oracle.snapshot()["masters"], 1e-5, shard)
            else:
                parity.assert_same_bits(snapshot(net, optimizer), oracle.snapshot(), f"shard={shard!r}")

    ranks(body)


@each_shard
def test_small_updates_add_up(ranks: Ranks, shard: str) -> None:
    """512 updates by 2^-10: each of them is lost in the rounding of a bfloat16 near 1."""

    def body(comm: Communicator) -> None:
        for master_dtype, expected in ((torch.float32, 0.5), (None, 1.0)):
            weight = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
            plain = torch.optim.SGD([weight], lr=2.0**-10)
            optimizer = DataParallelOptimizer(plain, comm=comm, shard=shard, master_dtype=master_dtype)
            for _ in range(512):
                weight.grad = torch.ones_like(weight)
                optimizer.step()
            assert weight.tolist() == [expected] * 5

    ranks(body)


@each_shard
@pytest.mark.parametrize("master_dtype", [torch.float32, torch.float64])
def test_wider_parameters_are_updated_as_they_are(ranks: Ranks, shard: str, master_dtype: torch.dtype) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.complex64)

    def body(comm: Communicator) -> None:
        owned = [nn.Parameter(random((7, 3), dtype, number)) for number, dtype in enumerate(dtypes)]
        narrow = {n for n, p in enumerate(owned) if not p.is_complex() and p.dtype.itemsize < master_dtype.itemsize}
        copies = [nn.Parameter(p.detach().to(master_dtype if n in narrow else p.dtype)) for n, p in enumerate(owned)]
        plain = torch.optim.AdamW(copies, lr=0.1)
        optimizer = DataParallelOptimizer(
            torch.optim.AdamW(owned, lr=0.1), comm=comm, shard=shard, master_dtype=master_dtype
        )
        for step in range(3):
            for number, (parameter, copy) in enumerate(zip(owned, copies, strict=True)):
                gradients = [random((7, 3), parameter.dtype, number, step, rank) for rank in range(comm.size)]
                parameter.grad = gradients[comm.rank]
                mean = parity.mean_in_rank_order(gradients)
                assert mean is not None
                copy.grad = mean.to(copy.dtype)
            optimizer.step()
            optimizer.zero_grad()
            plain.step()
        found = optimizer.state_dict()
        assert set(found[MASTERS]) == narrow
        parity.assert_same_bits(found[MASTERS], {n: copies[n].detach() for n in found[MASTERS]}, "masters")
        expected = [copy.detach().to(p.dtype) for p, copy in zip(owned, copies, strict=True)]
        parity.assert_same_bits([p.detach() for p in owned], expected, "parameters")
        parity.assert_same_bits(found["state"], plain.state_dict()["state"], "states")

    ranks(body)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's Adagrad
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
@pytest.mark.parametrize("dense", [False, True])
def test_sparse_gradients(ranks: Ranks, name: str, dense: bool) -> None:
    """Of masters in double precision: those of an embedding are updated where it has been used."""
    if name == "SparseAdam" and dense:
        pytest.skip("takes sparse gradients only")
    case = Case(getattr(torch.optim, name), {"lr": 0.1})

    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            table = Table(dense=dense).float()
            optimizer = wrap(comm, case, table, shard, model=table, master_dtype=torch.float64)
            wide = [nn.Parameter(p.detach().double()) for p in table.parameters()]
            plain = case.optimizer(wide)
            for step in range(3):
                optimizer.zero_grad()
                batch = words([[comm.rank, step], [3, 4 + step]], step)
                batch.targets.data = batch.targets.float()
                table(batch).backward()
                optimizer.synchronize()
                for parameter, copy in zip(table.parameters(), wide, strict=True):
                    if shard != "gradients":  # which has no dense gradient to show
                        assert parameter.grad is not None
                        copy.grad = parameter.grad.double()
                optimizer.step()
                plain.step()
            if shard != "gradients":
                masters = optimizer.state_dict()[MASTERS]
                parity.assert_same_bits(masters, {n: copy.detach() for n, copy in enumerate(wide)}, shard)
            results.append([table.state_dict(), optimizer.state_dict()])
        parity.assert_same_bits(results[1], results[0], "shard='state'")
        parity.assert_same_bits(results[2], results[0], "shard='gradients'")

    ranks(body)


# What else changes parameters


@pytest.mark.parametrize("way", ["copy_", "data", "new data", "load_state_dict", "broadcast_parameters"])
@each_shard
def test_a_written_parameter_is_the_new_master(ranks: Ranks, shard: str, way: str) -> None:
    """Where it was written: the other elements keep what rounding hides."""

    def write(comm: Communicator, net: Net) -> None:
        with torch.no_grad():
            if way == "copy_":
                net.second[1:].copy_(torch.full((2, 7), 0.3))
            elif way == "data":
                net.second.data[1:] = 0.3
            elif way == "new data":
                net.second.data = torch.cat([net.second[:1], torch.full((2, 7), 0.3, dtype=net.second.dtype)])
            else:
                changed = {name: value.clone() for name, value in net.state_dict().items()}
                changed["second"][1:] = 0.3
                if way == "load_state_dict" or comm.rank == comm.size - 1:
                    net.load_state_dict(changed)
                if way == "broadcast_parameters":
                    heatopt.broadcast_parameters(net, root=comm.size - 1, comm=comm)

    def body(comm: Communicator) -> None:
        oracle = Oracle(comm, ADAMW, make_net(ADAMW))
        oracle.train(STEPS)
        net = make_net(ADAMW)
        optimizer = wrap(comm, ADAMW, net, shard)
        train(comm, optimizer, net, STEPS)
        write(comm, net)
        with torch.no_grad():
            second = list(dict(net.named_parameters())).index("second")
            oracle.wide[second][1:] = torch.tensor(0.3, dtype=torch.bfloat16).float()
            oracle.net.second.copy_(oracle.wide[second])
        oracle.train(STEPS)
        train(comm, optimizer, net, STEPS)
        parity.assert_same_bits(snapshot(net, optimizer), oracle.snapshot(), way)

    ranks(body)


@each_shard
def test_frozen_and_unused_parameters_have_no_master(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        net = make_net(ADAMW)
        net.bias.requires_grad_(requires_grad=False)
        before = [net.bias.detach().clone(), net.unused.detach().clone()]
        optimizer = wrap(comm, ADAMW, net, shard)
        train(comm, optimizer, net, STEPS)
        names = list(dict(net.named_parameters()))
        assert sorted(names[n] for n in optimizer.state_dict()[MASTERS]) == [
            "branch",
            "empty",
            "first",
            "scale",
            "second",
        ]
        assert torch.equal(net.bias, before[0])
        assert torch.equal(net.unused, before[1])

    ranks(body)


# Beside the update


@each_shard
def test_clipping(ranks: Ranks, shard: str) -> None:
    """The clipped narrow gradients are what is cast."""

    def body(comm: Communicator) -> None:
        oracle = Oracle(comm, SGD, make_net(SGD))
        net = make_net(SGD)
        optimizer = wrap(comm, SGD, net, shard)
        for step in STEPS:
            oracle.backward(step)
            narrow = [None if wide.grad is None else wide.grad.bfloat16() for wide in oracle.wide]
            norms = [gradient.float().norm() for gradient in narrow if gradient is not None]
            backward(comm, optimizer, net, step)
            norm = optimizer.clip_grad_norm_(0.01)
            torch.testing.assert_close(norm, torch.stack(norms).norm())
            for gradient, wide in zip(narrow, oracle.wide, strict=True):
                wide.grad = None if gradient is None else gradient.mul_(0.01 / (norm + 1e-6)).float()
            optimizer.step()
            oracle.update()
        parity.assert_same_bits(list(net.parameters()), list(oracle.net.parameters()), shard)

    ranks(body)


@each_shard
def test_grad_scaler(ranks: Ranks, shard: str) -> None:
    """float16: averages are unscaled, all ranks skip the step in which one overflows."""

    def body(comm: Communicator) -> None:
        scale = 2.0**6
        oracle = Oracle(comm, ADAMW, make_net(ADAMW, torch.float16))
        net = make_net(ADAMW, torch.float16)
        optimizer = wrap(comm, ADAMW, net, shard)
        scaler = heatopt.GradScaler("cpu", init_scale=scale, growth_interval=1000, backoff_factor=0.5)
        for step in STEPS:
            optimizer.zero_grad()
            own = scaler.scale(net(net.batch(step, comm.size).part(comm.rank, comm.size)))
            own.backward()
            overflows = step == 2
            if overflows and comm.rank == comm.size - 1:
                net.second.grad = torch.full_like(net.second, torch.inf)
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            oracle.net.zero_grad()
            scaled = oracle.net(oracle.net.batch(step, comm.size).part(comm.rank, comm.size)) * scale
            scaled.backward()
            columns = zip(*comm.all_gather_object([p.grad for p in oracle.net.parameters()]), strict=True)
            for number, (wide, column) in enumerate(zip(oracle.wide, columns, strict=True)):
                mean = parity.mean_in_rank_order(column)
                wide.grad = None if mean is None else (mean / scale).float()
                oracle.seen |= set() if mean is None or overflows else {number}
            if overflows:
                scale /= 2
            else:
                oracle.update()
        parity.assert_same_bits(snapshot(net, optimizer), oracle.snapshot(), shard)

    ranks(body)


@each_shard
def test_wide_gradients_of_narrow_parameters(ranks: Ranks, shard: str) -> None:
    """``grad_dtype`` lets averages and scaled gradients keep what float16 would lose."""

    def body(comm: Communicator) -> None:
        weight = nn.Parameter(torch.ones(9, dtype=torch.float16))
        weight.grad_dtype = torch.float32  # type: ignore[attr-defined]
        optimizer = DataParallelOptimizer(
            torch.optim.SGD([weight], lr=2.0**20), comm=comm, shard=shard, master_dtype=torch.float32
        )
        scaler = heatopt.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        scaler.scale((weight.float() * 2.0**-30).sum()).backward()  # zero in float16
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == [1 - 2.0**-10] * 9

    ranks(body)


@each_shard
def test_closures_hooks_and_schedulers(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        oracle = Oracle(comm, SGD, make_net(SGD))
        net = make_net(SGD)
        plain = SGD.optimizer(net.parameters())
        fired: list[str] = []
        plain.register_step_pre_hook(lambda *_: fired.append("before"))
        plain.register_step_post_hook(lambda *_: fired.append("after"))
        optimizer = DataParallelOptimizer(plain, comm=comm, shard=shard, master_dtype=torch.float32)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, oracle.optimizer)]
        for step in STEPS:

            def closure(step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                loss = net(net.batch(step, comm.size).part(comm.rank, comm.size))
                loss.backward()
                return loss  # type: ignore[no-any-return]

            loss = optimizer.step(closure)
            assert torch.isfinite(torch.as_tensor(loss))
            oracle.train(range(step, step + 1))
            for scheduler in schedulers:
                scheduler.step()
        assert fired == ["before", "after"] * len(STEPS)
        parity.assert_same_bits(snapshot(net, optimizer), oracle.snapshot(), shard)

    ranks(body)


@pytest.mark.parametrize("shard", SHARDS[1:])
def test_memory(ranks: Ranks, shard: str) -> None:
    """Each rank keeps the masters of what it owns, and all of them once together."""

    def body(comm: Communicator) -> None:
        owned = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((301, 257), (40_001,), (3,))]
        optimizer = DataParallelOptimizer(
            torch.optim.SGD(owned, lr=0.1), comm=comm, shard=shard, master_dtype=torch.float32
        )
        sum(p.sum() for p in owned).backward()  # type: ignore[union-attr]
        optimizer.step()
        elements = sum(p.numel() for p in owned)
        own = sum(entries[MASTER].nbytes for entries in optimizer.state.values() if MASTER in entries)
        assert sum(comm.all_gather_object(own)) == 4 * elements
        assert own <= 1.01 * 4 * elements / comm.size

    ranks(body, min_size=2)


# Arguments


def test_without_it_nothing_is_between() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = DataParallelOptimizer(torch.optim.Adam([weight]), comm=SingleCommunicator())
    assert optimizer._stepper is optimizer.torch_optimizer
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert MASTERS not in optimizer.state_dict()
    assert MASTER not in optimizer.state[weight]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"master_dtype": "float32"}, TypeError, "torch.float32, torch.float64 or None, got 'float32'"),
        ({"master_dtype": torch.bfloat16}, ValueError, "torch.float32, torch.float64 or None, got torch.bfloat16"),
        ({"master_dtype": torch.int32}, ValueError, "got torch.int32"),
        ({"master_dtype": torch.float32, "fuse": True}, ValueError, "fuse=True and master_dtype"),
    ],
)
def test_arguments(ranks: Ranks, options: dict[str, Any], error: type[Exception], message: str) -> None:
    def body(comm: Communicator) -> None:
        weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        with pytest.raises(error, match=message):
            DataParallelOptimizer(torch.optim.Adam([weight]), comm=comm, **options)

    ranks(body)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (torch.optim.LBFGS, {}, "master_dtype cannot be used with LBFGS"),
        (torch.optim.Adam, {"differentiable": True}, "differentiable=True"),
    ],
)
def test_refused_algorithms(ranks: Ranks, kind: Any, options: dict[str, Any], message: str) -> None:
    def body(comm: Communicator) -> None:
        weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match=message):
            DataParallelOptimizer(kind([weight], **options), comm=comm, master_dtype=torch.float32)

    ranks(body)


def test_ranks_must_agree(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        master_dtype = torch.float32 if comm.rank == 0 else torch.float64
        with pytest.raises(RankMismatchError, match=r"setting master_dtype: rank 0 has torch.float32, rank 1 has"):
            DataParallelOptimizer(torch.optim.Adam([weight]), comm=comm, master_dtype=master_dtype)

    ranks(body, min_size=2)
