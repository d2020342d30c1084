"""``shard="gradients"``: what is particular to it. The tests of ``test_shard_*`` cover it beside ``shard="state"``."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator, ThreadWorld
from heatopt.errors import HeatoptError
from tests.ranks._sharding import SHARDS, assert_alike, assert_close, assert_same_bits
from tests.support import parity
from tests.support.launch import LAUNCH
from tests.support.problems import Net, Table, words
from tests.support.ranks import Ranks
from tests.support.training import SMALL_BUCKET_MB, train

one_process = pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")

SHAPES = ((101, 97), (4_001,), (3,), (), (0, 2), *[(50, 50)] * 12)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for shape in SHAPES]


def wrap(comm: Communicator, plain: torch.optim.Optimizer, shard: str = "gradients", **options: Any) -> Any:
    return DataParallelOptimizer(plain, comm=comm, shard=shard, **({"bucket_mb": SMALL_BUCKET_MB} | options))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def assert_none(tensors: Any) -> None:
    assert [name for name, parameter in enumerate(tensors) if parameter.grad is not None] == []


def kept_bytes(optimizer: Any) -> int:
    return sum(piece.nbytes for piece in optimizer._shards.kept().values())


def kept_memory(optimizer: Any) -> int:
    """Bytes of the flat tensors in which kept pieces lie, each counted once."""
    storages = (bucket._kept_memory.untyped_storage() for bucket in optimizer._shards._buckets)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


# What is kept, and what travels


@pytest.mark.parametrize("blocking", [True, False, None])
@pytest.mark.parametrize("bucket_mb", [0.01, 8.0])
def test_memory(ranks: Ranks, blocking: bool | None, bucket_mb: float) -> None:
    """Each rank keeps its share of the gradients, one bucket (or two if not blocking), and nothing in ``p.grad``."""

    def body(comm: Communicator) -> None:
        owned = parameters()
        optimizer = wrap(comm, torch.optim.Adam(owned), bucket_mb=bucket_mb, blocking=blocking)
        sum((p * (comm.rank + 1)).sum() for p in owned).backward()
        assert_none(owned)
        whole = sum(p.nbytes for p in owned)
        pieces = 4 * 64 * len(owned)  # pieces rather begin at multiples of 64 elements
        assert kept_bytes(optimizer) <= whole / comm.size + pieces
        assert sum(comm.all_gather_object(kept_bytes(optimizer))) == whole
        largest = max(bucket_mb * 2**20, max(p.nbytes for p in owned))
        flags_and_padding = (4 * len(owned) + 64) * comm.size
        memories = {memory.own.data_ptr(): memory.own.nbytes for memory in optimizer._gradients._plan.memories}
        one = blocking or (blocking is None and comm.num_nodes == 1)
        assert len(memories) == min(1 if one else 2, optimizer.report()["buckets"])
        assert sum(memories.values()) <= len(memories) * (largest + flags_and_padding)
        assert optimizer.report()["bucket_bytes"] == sum(memories.values()) + kept_memory(optimizer)
        assert kept_memory(optimizer) <= whole / comm.size + pieces
        optimizer.step()

    ranks(body, min_size=2)


@one_process
@pytest.mark.parametrize(("size", "per_node"), [(2, 1), (3, 1), (4, 1)])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor], ids=lambda kind: kind.__name__)
def test_traffic(size: int, per_node: int, kind: type[torch.optim.Optimizer]) -> None:
    """2 N (n - 1) / n elements per rank and step, to the owners and back, in one operation per bucket.

    Beside them: a header for backward, one for the step, and a word at its end.
    """
    world = ThreadWorld(size, ranks_per_node=per_node, timeout=20)
    count = 12

    def body(comm: Communicator) -> int:
        owned = [nn.Parameter(torch.ones(20, 16 * size)) for _ in range(count)]
        plain: Any = kind(owned)  # type: ignore[call-arg]
        optimizer = wrap(comm, plain, bucket_mb=4 * owned[0].nbytes / 2**20, blocking=True)
        for _ in range(2):
            optimizer.zero_grad()
            comm.barrier()
            before = sum(event.rank == comm.rank for event in list(world.events))
            sum((p * (comm.rank + 1)).sum() for p in owned).backward()
            optimizer.step()
        events = [event for event in list(world.events) if event.rank == comm.rank][before:]
        kinds = [event.kind for event in events]
        assert kinds == ["words", *["all_to_all_parts"] * 3, "words", "all_gather", "words"]
        others = size - 1
        sent = sum(event.bytes for event in events if event.kind == "all_to_all_parts") * others / size
        received = sum(event.bytes for event in events if event.kind == "all_gather") * others
        whole = sum(p.nbytes for p in owned)
        flags_and_padding = 3 * size * (4 * 4 + 64)
        exact = 2 * whole * others / size
        assert exact <= sent + received <= exact + flags_and_padding
        return len(events)

    assert len(set(world.run(body))) == 1


@one_process
@pytest.mark.parametrize(("size", "per_node"), [(2, 1), (3, 2), (3, 3), (4, 2), (5, 2)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "extra",
    [{}, {"wire_dtype": torch.bfloat16}, {"reproducible": True}, {"blocking": True}, {"blocking": False}],
    ids=str,
)
def test_nodes(size: int, per_node: int, shared: bool, extra: dict[str, Any]) -> None:
    """The bits of no sharding, through shared memory, across nodes, and both."""

    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = Net(torch.float32)
            optimizer = wrap(comm, torch.optim.AdamW(net.parameters(), lr=0.1), shard, **extra)
            train(optimizer, net.losses(comm.size, comm.rank))
            results.append(parity.snapshot(net, optimizer))
        parity.assert_ranks_equal(comm, results)
        assert_same_bits(results)

    ThreadWorld(size, ranks_per_node=per_node, shared_memory=shared, timeout=20).run(body)


@one_process
@pytest.mark.parametrize("per_node", [2, 3])
@pytest.mark.parametrize("blocking", [True, False])
def test_buckets_take_turns_in_their_memory(per_node: int, blocking: bool) -> None:
    """Many more than can be in flight, all of them launched at once."""

    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            owned = [nn.Parameter(torch.ones(50 + number)) for number in range(20)]
            optimizer = wrap(comm, torch.optim.SGD(owned, lr=0.1), shard, bucket_mb=1e-6, blocking=blocking)
            assert optimizer.report()["buckets"] == len(owned)
            for number, parameter in enumerate(owned):
                parameter.grad = torch.linspace(number, comm.rank, parameter.numel())
            optimizer.step()
            results.append([p.detach() for p in owned])
        assert_same_bits(results)

    ThreadWorld(3, ranks_per_node=per_node, shared_memory=True, timeout=20).run(body)


# p.grad


def test_no_gradient_is_shown(ranks: Ranks) -> None:
    """After a synchronised backward, a step, and what synchronises a gradient set by hand; local ones stay."""

    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, sgd(net))
        (loss, *_) = net.losses(comm.size, comm.rank)
        with optimizer.no_sync():
            loss().backward()
        assert net.first.grad is not None
        loss().backward()
        assert_none(net.parameters())
        net.unused.grad = torch.ones_like(net.unused)
        optimizer.synchronize()
        assert_none(net.parameters())
        optimizer.step()
        assert_none(net.parameters())

    ranks(body, min_size=2)


def test_sums_of_several_backwards(ranks: Ranks) -> None:
    """Synchronised each time, locally in between, and some by hand: the gradients of one sum."""

    def body(comm: Communicator) -> None:
        def run(net: Net, optimizer: Any, losses: Any) -> None:
            for loss in losses:
                optimizer.zero_grad()
                loss().backward()
                loss().backward()
                with optimizer.no_sync():
                    loss().backward()
                loss().backward()
                net.unused.grad = torch.full_like(net.unused, comm.rank)
                optimizer.step()

        assert_alike(comm, sgd, run, 1e-12)

    ranks(body, min_size=2)


def test_one_rank_calls_backward_more_often(ranks: Ranks) -> None:
    """The others serve it from inside their ``step()``."""

    def body(comm: Communicator) -> None:
        def run(net: Net, optimizer: Any, losses: Any) -> None:
            for loss in losses:
                optimizer.zero_grad()
                for _ in range(1 + comm.rank):
                    loss().backward()
                optimizer.step()

        assert_alike(comm, sgd, run, 1e-12)

    ranks(body, min_size=2)


@pytest.mark.parametrize("clear", ["module", "nothing by hand"])
def test_an_update_ends_a_sum(ranks: Ranks, clear: str) -> None:
    """``module.zero_grad()``, and gradients set by hand in the place of earlier ones, need no ``zero_grad()``."""

    def body(comm: Communicator) -> None:
        def run(net: Net, optimizer: Any, losses: Any) -> None:
            for number, loss in enumerate(losses):
                if clear == "module":
                    net.zero_grad()
                    loss().backward()
                else:
                    for parameter in net.parameters():
                        parameter.grad = torch.full_like(parameter, number + comm.rank)
                optimizer.step()

        assert_alike(comm, sgd, run)

    ranks(body, min_size=2)


def test_gradients_that_are_used_twice_or_zeroed(ranks: Ranks) -> None:
    def run(net: Net, optimizer: Any, losses: Any) -> None:
        losses[0]().backward()
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()

    ranks(lambda comm: assert_alike(comm, lambda net: torch.optim.AdamW(net.parameters(), lr=0.1), run), min_size=2)


def test_gradients_cleared_between_backward_and_step(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        net = Net()
        before = copy.deepcopy(net.state_dict())
        optimizer = wrap(comm, sgd(net))
        net.losses(comm.size, comm.rank)[0]().backward()
        optimizer.zero_grad()
        assert kept_bytes(optimizer) == 0
        optimizer.step()
        parity.assert_same_bits(net.state_dict(), before, "a step without gradients")

    ranks(body, min_size=2)


# Norms and scalers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_norms_are_those_of_one_process(ranks: Ranks, norm_type: float, dtype: torch.dtype) -> None:
    """Also with two dtypes; ranks without a piece return it too."""

    def body(comm: Communicator) -> None:
        wide = nn.Parameter(torch.linspace(-3, 2, 5, dtype=dtype))
        narrow = nn.Parameter(torch.linspace(-1, 1, 402).view(2, -1))
        single = nn.Parameter(torch.tensor(2.0))
        owned = [wide, narrow, single]
        scale = (comm.size + 1) / 2
        alone = [nn.Parameter(p.detach().double().clone()) for p in owned]
        for own in alone:
            own.grad = own.detach() * scale
        expected = torch.nn.utils.clip_grad_norm_(alone, 0.5, norm_type)
        optimizer = wrap(comm, torch.optim.SGD(owned, lr=1.0))
        sum((p * p.detach()).sum() * (comm.rank + 1) for p in owned).backward()
        found = optimizer.clip_grad_norm_(0.5, norm_type)
        parity.assert_ranks_equal(comm, found)
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6, atol=0)
        optimizer.step()
        for own, other in zip(owned, alone, strict=True):
            torch.testing.assert_close(own.detach().double(), other.detach() - other.grad, rtol=1e-6, atol=1e-6)
        optimizer.zero_grad()
        assert optimizer.clip_grad_norm_(0.5, norm_type) == 0

    ranks(body)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_sparse_gradients_count_once(ranks: Ranks) -> None:
    """They are shown, and are equal on all ranks."""

    def body(comm: Communicator) -> None:
        norms = []
        results = []
        for shard in SHARDS:
            table = Table(dense=True)
            optimizer = wrap(comm, torch.optim.SGD(table.parameters(), lr=0.1), shard)
            for step in range(3):
                optimizer.zero_grad()
                table(words([[comm.rank, step], [3, 4 + step]], step)).backward()
                norms.append(optimizer.clip_grad_norm_(0.1))
                optimizer.step()
            results.append(parity.snapshot(table, optimizer))
        assert_close(results, 1e-12)
        torch.testing.assert_close(norms[:3], norms[6:], rtol=1e-12, atol=0)

    ranks(body, min_size=2)


def test_non_finite_norms_raise_on_all_ranks(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, sgd(net))
        factor = math.inf if comm.rank == comm.size - 1 else 1
        (net.losses(comm.size, comm.rank)[0]() * factor).backward()
        with pytest.raises(RuntimeError, match="cannot be clipped"):
            optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)

    ranks(body)


@pytest.mark.parametrize("clears", [True, False], ids=["zero_grad", "module.zero_grad"])
def test_overflow_on_one_rank(ranks: Ranks, clears: bool) -> None:
    """All ranks skip that step, and what overflowed does not come back."""

    def body(comm: Communicator) -> None:
        def run(net: Net, optimizer: Any, losses: Any) -> None:
            scaler = heatopt.GradScaler("cpu", init_scale=16.0)
            for number, loss in enumerate(losses * 2):
                optimizer.zero_grad() if clears else net.zero_grad()
                overflows = number == 1 and comm.rank == comm.size - 1
                scaler.scale(loss() * (math.inf if overflows else 1)).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            assert scaler.get_scale() == 8

        assert_alike(comm, sgd, run)

    ranks(body, min_size=2)


def test_torchs_own_scaler_says_that_it_sees_nothing(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, sgd(net))
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(net.losses(comm.size, comm.rank)[0]()).backward()
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.step(optimizer)

    ranks(body, min_size=2)


def test_float16_gradients_cannot_be_unscaled_anywhere(ranks: Ranks) -> None:
    """Torch's error on all ranks, also on those that keep none of them."""

    def body(comm: Communicator) -> None:
        half = nn.Parameter(torch.ones((), dtype=torch.float16))
        optimizer = wrap(comm, torch.optim.SGD([half], lr=0.1))
        scaler = heatopt.GradScaler("cpu")
        half.grad = torch.ones_like(half)
        with pytest.raises(ValueError, match="FP16"):
            scaler.unscale_(optimizer)

    ranks(body)


# New plans, and copies, between backward and step


@pytest.mark.parametrize("what", ["unfreeze", "add", "convert", "convert before backward"])
def test_new_plans_keep_what_was_accumulated(ranks: Ranks, what: str) -> None:
    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = Net()
            net.second.requires_grad_(what != "unfreeze")
            early = [p for p in net.parameters() if what != "add" or (p is not net.branch and p is not net.scale)]
            optimizer = wrap(comm, torch.optim.SGD(early, lr=0.1), shard)
            losses = net.losses(comm.size, comm.rank)
            train(optimizer, losses)
            optimizer.zero_grad()
            losses[0]().backward()
            if what == "unfreeze":
                net.second.requires_grad_(True)
            elif what == "add":
                net.branch.grad = net.scale.grad = None
                optimizer.add_param_group({"params": [net.branch, net.scale], "lr": 0.01})
            else:
                net.float()
            if what != "convert":  # whose step uses what was kept before
                net.losses(comm.size, comm.rank)[1]().backward()
            optimizer.step()
            train(optimizer, net.losses(comm.size, comm.rank))
            results.append(parity.snapshot(net, optimizer))
        assert_close(results, 1e-5 if "convert" in what else 1e-12)

    ranks(body, min_size=2)


def test_data_of_another_size_is_refused(ranks: Ranks) -> None:
    """What it has more than before would get no update, without a word."""

    def body(comm: Communicator) -> None:
        table = torch.nn.Parameter(torch.ones(5, 3))
        optimizer = DataParallelOptimizer(torch.optim.SGD([table], lr=0.1), comm=comm, shard="gradients")
        table.sum().backward()
        optimizer.step()
        table.data = torch.ones(9, 3)
        with pytest.raises(HeatoptError, match=r"group0\.param0 has got data with another number of elements"):
            table.sum().backward()

    ranks(body, min_size=2)


def test_copies_begin_without_gradients(ranks: Ranks) -> None:
    """As copies of torch's parameters do, whatever the original has kept; both of them train on."""

    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, sgd(net))
        losses = net.losses(comm.size, comm.rank)
        train(optimizer, losses)
        before = parity.snapshot(net, optimizer)
        losses[0]().backward()
        twin_net, twin = copy.deepcopy((net, optimizer))
        twin.step()
        parity.assert_same_bits(parity.snapshot(twin_net, twin), before, "a copy that has no gradients")
        optimizer.step()
        twin_net.losses(comm.size, comm.rank)[0]().backward()
        twin.step()
        parity.assert_close(parity.snapshot(twin_net, twin), parity.snapshot(net, optimizer), 1e-12, "the copy")

    ranks(body, min_size=2)


def test_gradients_are_whole_inside_join(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        net = Net()
        optimizer = wrap(comm, sgd(net))
        losses = net.losses(comm.size, comm.rank)
        losses[0]().backward()
        with optimizer.join():
            assert net.first.grad is not None
            optimizer.step()
            train(optimizer, losses[: 1 + comm.rank % 2])
            assert net.first.grad is not None
        optimizer.zero_grad()
        losses[0]().backward()
        assert_none(net.parameters())
        optimizer.step()
        parity.assert_ranks_equal(comm, parity.snapshot(net, optimizer))

    ranks(body, min_size=2)


def test_an_interrupted_backward(ranks: Ranks) -> None:
    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError("a test")

    def run(net: Net, optimizer: Any, losses: Any) -> None:
        handle = net.bias.register_hook(fail)
        with pytest.raises(ArithmeticError):
            losses[0]().backward()
        handle.remove()
        train(optimizer, losses)

    ranks(lambda comm: assert_alike(comm, sgd, run, bucket_mb=8.0), min_size=2)


def test_two_optimizers(ranks: Ranks) -> None:
    """On one communicator, with two manners of sharding, and accumulation."""

    def body(comm: Communicator) -> None:
        results = []
        for shard in SHARDS:
            net = Net()
            first = wrap(comm, torch.optim.AdamW([net.first, net.bias, net.scale]), shard, accumulation_steps=2)
            second = wrap(comm, torch.optim.SGD([net.branch, net.second], lr=0.1), "none", accumulation_steps=2)
            for loss in net.losses(comm.size, comm.rank):
                for optimizer in (first, second):
                    optimizer.zero_grad()
                loss().backward()
                loss().backward()
                for optimizer in (first, second):
                    optimizer.step()
            results.append([parity.snapshot(net, first), second.state_dict()])
        assert_same_bits(results)

    ranks(body, min_size=2)


def test_what_cannot_be_sharded() -> None:
    parameter = nn.Parameter(torch.ones(2))
    for plain, options, match in (
        (torch.optim.LBFGS([parameter]), {}, "shard='gradients' cannot shard LBFGS"),
        (torch.optim.SGD([parameter]), {"fuse": True}, "fuse=True and shard='gradients'"),
        (torch.optim.SGD([parameter], differentiable=True), {}, "shard='gradients' cannot update .*differentiable"),
    ):
        with pytest.raises(ValueError, match=match):
            DataParallelOptimizer(plain, shard="gradients", **options)  # type: ignore[arg-type]


# The tests here are able to fail


@pytest.mark.parametrize("broken", ["sum", "clear"])
def test_a_lost_gradient_is_noticed(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    from heatopt.buckets import ScatteredBucket
    from heatopt.sync import GradientShards

    if broken == "sum":
        monkeypatch.setattr(ScatteredBucket, "reveal", lambda self, weight: self.clear())
    else:
        monkeypatch.setattr(GradientShards, "clear", lambda self, set_to_none: None)

    def body(comm: Communicator) -> None:
        with pytest.raises(AssertionError, match="gradients"):
            assert_alike(comm, sgd, lambda net, optimizer, losses: train(optimizer, losses))

    ranks(body, min_size=2)
