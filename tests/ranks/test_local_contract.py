"""Local-update methods are torch optimizers: their objects, hooks, schedulers, copies, state dicts and errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import SingleCommunicator
from heatopt.errors import HeatoptError
from tests.ranks._training import (
    ALGORITHMS,
    Algorithm,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    loss_of,
    net,
    sgd,
    tensors_of,
    train,
)
from tests.ranks.test_wrapper_schedulers import SCHEDULERS
from tests.support.designs import combinations
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

Make = Callable[..., Any]


def daso(optimizer: torch.optim.Optimizer, **options: Any) -> heatopt.DASO:
    return heatopt.DASO(optimizer, 3, **{"warmup_epochs": 0, "cooldown_epochs": 1} | options)


METHODS: dict[str, Make] = {
    "LocalSGD": lambda o, **k: heatopt.LocalSGD(o, **{"sync_every": 2, "delay": 1, "average_moments": (1, 2)} | k),
    "post-local": lambda o, **k: heatopt.LocalSGD(o, **{"sync_every": 3, "warmup_steps": 4} | k),
    "wire": lambda o, **k: heatopt.LocalSGD(
        o, **{"sync_every": 2, "wire_dtype": torch.bfloat16, "error_feedback": True} | k
    ),
    "SlowMo": lambda o, **k: heatopt.SlowMo(o, **{"sync_every": 3} | k),
    "DiLoCo": lambda o, **k: heatopt.DiLoCo(o, **{"sync_every": 3} | k),
    "Streaming": lambda o, **k: heatopt.DiLoCo(o, **{"sync_every": 4, "fragments": 2, "delay": 3} | k),
    "CO2": lambda o, **k: heatopt.CO2(o, **{"sync_every": 2} | k),
    "DASO": daso,
    "DASO as published": lambda o, **k: daso(o, **{"merge": "daso", "downcast_type": torch.float32} | k),
}


@pytest.fixture(autouse=True)
def each_rank_is_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """On threads DASO then has as many replicas as there are ranks."""
    monkeypatch.setenv("HEATOPT_RANKS_PER_NODE", "1")


every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def make(method: Make, comm: Communicator, model: nn.Module, inner: Callable[..., Any] = sgd, **options: Any) -> Any:
    return method(inner(model), model=model, comm=comm, **options)


@pytest.mark.parametrize("method", [heatopt.SlowMo, heatopt.DiLoCo, heatopt.CO2])
def test_the_outer_optimizer_is_scheduled_with_one_process_too(ranks: Ranks, method: Make) -> None:
    def body(comm: Communicator) -> float:
        model = net()
        optimizer = make(method, comm, model, sync_every=2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer.outer, 0.5)
        before = optimizer.outer.param_groups[0]["lr"]
        for step in range(2):
            train(optimizer, model, [batch(4 * step + more, comm.rank) for more in range(4)])
            scheduler.step()
        return float(optimizer.outer.param_groups[0]["lr"] / before)

    assert ranks(body) == [0.25] * ranks.size


# A real optimizer


@every_method
def test_it_has_the_inner_optimizers_objects(ranks: Ranks, method: Make) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        inner = adamw(model)
        groups, state, defaults = inner.param_groups, inner.state, inner.defaults
        optimizer = method(inner, model=model, comm=comm)
        assert isinstance(optimizer, torch.optim.Optimizer)
        for step in range(5):
            train(optimizer, model, [batch(step, comm.rank)])
            assert optimizer.torch_optimizer is inner
            assert optimizer.param_groups is groups
            assert optimizer.state is state
            assert optimizer.defaults is defaults
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups is inner.param_groups
        assert optimizer.state is inner.state
        assert "AdamW" in repr(optimizer)
        with pytest.raises(AttributeError, match=r"no attribute '_cuda_graph_capture_health_check2'"):
            _ = optimizer._cuda_graph_capture_health_check2

    ranks(body)


@every_method
def test_one_process_does_what_the_inner_optimizer_does(method: Make) -> None:
    from heatopt.comm import SingleCommunicator

    model, plain = net(), net()
    optimizer, own = make(method, SingleCommunicator(), model, adamw), adamw(plain)
    for step in range(9):
        train(optimizer, model, [batch(step, 0)])
        train(own, plain, [batch(step, 0)])
        if isinstance(optimizer, heatopt.DASO) and step % 3 == 2:
            optimizer.epoch_loss_logic(1.0)
    assert_equal(model, plain)
    state_dict = optimizer.state_dict()
    assert state_dict.pop("local")["updates"] == 9
    assert_equal(state_dict, own.state_dict())


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_every_algorithm_inside(ranks: Ranks, algorithm: Algorithm) -> None:
    def body(comm: Communicator) -> None:
        model = algorithm.model()
        optimizer = heatopt.DiLoCo(
            algorithm.optimizer(model), model=model, comm=comm, sync_every=2, average_moments=(1, 1)
        )
        for step in range(4):
            algorithm.update(optimizer, model, batch(step, comm.rank))
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize(
    ("method", "schedule"),
    combinations(["LocalSGD", "post-local", "SlowMo", "Streaming", "CO2", "DASO"], SCHEDULERS),
)
def test_every_scheduler(ranks: Ranks, method: str, schedule: str) -> None:
    def body(comm: Communicator) -> None:
        model, plain = net(), net()
        optimizer, own = make(METHODS[method], comm, model), sgd(plain)
        scheduler, expected = SCHEDULERS[schedule](optimizer), SCHEDULERS[schedule](own)
        for step in range(6):
            train(optimizer, model, [batch(step, comm.rank)])
            train(own, plain, [batch(step, comm.rank)])
            metric = [1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []
            scheduler.step(*metric)
            expected.step(*metric)
            assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in own.param_groups]

    ranks(body)


@every_method
def test_hooks_and_closures(ranks: Ranks, method: Make) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        inner = sgd(model)
        calls: list[str] = []
        inner.register_step_pre_hook(lambda *_: calls.append("inner"))
        optimizer = method(inner, model=model, comm=comm)
        optimizer.register_step_pre_hook(lambda o, *_: calls.append(f"before {type(o).__name__}"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        optimizer.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
        optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("load"))

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(0, comm.rank))
            loss.backward()
            return loss

        assert optimizer.step(closure) is not None
        assert calls == [f"before {type(optimizer).__name__}", "inner", "after"]
        state_dict = optimizer.state_dict()
        assert state_dict["mine"] == 1
        optimizer.load_state_dict(state_dict)
        assert calls[3:] == ["load"]

    ranks(body)


@every_method
def test_copies_train_on(ranks: Ranks, method: Make) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = make(method, comm, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(5)])
        twin, its_optimizer = copy.deepcopy((model, optimizer))
        for step in range(5, 9):
            train(optimizer, model, [batch(step, comm.rank)])
        for step in range(5, 9):
            train(its_optimizer, twin, [batch(step, comm.rank)])
        assert_equal(twin, model)
        assert_equal(its_optimizer.state_dict(), optimizer.state_dict())

    ranks(body)


@pytest.mark.parametrize("how", ["copy", "load"])
def test_each_rank_keeps_its_buffers(ranks: Ranks, how: str) -> None:
    """Also where gradients are averaged again after it: by a copy, or a checkpoint of the warm-up."""

    def body(comm: Communicator) -> None:
        model: nn.Module = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        optimizer = make(METHODS["post-local"], comm, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(3)])
        state, buffers = optimizer.state_dict(), [b.clone() for b in model.buffers()]
        if how == "copy":
            model, optimizer = copy.deepcopy((model, optimizer))
        else:
            saved = copy.deepcopy((model.state_dict(), state))
            train(optimizer, model, [batch(step, comm.rank) for step in range(3, 7)])
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        assert_equal(list(model.buffers()), buffers)

    ranks(body)


def test_pickled_copies(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = make(METHODS["DiLoCo"], comm, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(5)])
        twin, its_optimizer = pickle.loads(pickle.dumps((model, optimizer)))  # on the default communicator
        train(its_optimizer, twin, [batch(5, comm.rank)])
        its_optimizer.synchronize()
        with pytest.raises(TypeError, match="communicators belong to their process"):
            pickle.dumps(make(METHODS["DASO"], comm, net()))

    ranks(body)


def test_a_copy_of_a_single_process_has_no_anchors_for_several(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        alone = pickle.dumps(make(METHODS["DiLoCo"], SingleCommunicator(), net()))
        if heatopt.world().size == 1:  # also where ranks are threads
            pickle.loads(alone)
            return
        with pytest.raises(HeatoptError, match=r"DiLoCo comes from a single process, .*: make a new optimizer, and"):
            pickle.loads(alone)

    ranks(body)


def test_a_second_wrapper_is_refused(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = make(METHODS["LocalSGD"], comm, model)
        with pytest.raises(ValueError, match="belongs to another"):
            heatopt.LocalSGD(sgd(model), comm=comm)
        with pytest.raises(ValueError, match="belongs to another"):
            heatopt.DataParallelOptimizer(sgd(model), comm=comm)
        with pytest.raises(ValueError, match="LocalSGD already; give the torch optimizer"):
            heatopt.DiLoCo(optimizer, comm=comm)

    ranks(body)


@every_method
def test_added_groups_are_averaged_too(ranks: Ranks, method: Make) -> None:
    def body(comm: Communicator) -> None:
        model, more = net(), net(seed=comm.rank)
        optimizer = make(method, comm, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(3)])
        optimizer.add_param_group({"params": list(more.parameters()), "lr": 0.05})
        assert_ranks_equal(comm, more)
        both = nn.Sequential(model, more[0:0])
        for step in range(3, 6):
            optimizer.zero_grad()
            (loss_of(both, batch(step, comm.rank)) + loss_of(more, batch(step, comm.rank))).backward()
            optimizer.step()
        optimizer.synchronize()
        assert_ranks_equal(comm, model, more)
        assert len(optimizer.state_dict()["param_groups"]) == 2

    ranks(body)


@pytest.mark.parametrize("how", ["copy", "load"])
def test_fragments_stay_what_they_are_after_a_group_was_added(ranks: Ranks, how: str) -> None:
    """It has joined the last one; cut anew, the parameters would be sent at other times."""

    def body(comm: Communicator) -> None:
        def made(*groups: list[nn.Parameter]) -> Any:
            inner = torch.optim.SGD([{"params": group} for group in groups], lr=0.1)
            return heatopt.DiLoCo(inner, comm=comm, sync_every=4, fragments=2, delay=1)

        model = net()
        first, *more = model.parameters()
        optimizer = made([first, more.pop(0)])
        optimizer.add_param_group({"params": more})
        train(optimizer, model, [batch(step, comm.rank) for step in range(3)])
        if how == "copy":
            twin, its_optimizer = copy.deepcopy((model, optimizer))
        else:
            twin = copy.deepcopy(model)
            its_optimizer = made(list(twin.parameters())[:2], list(twin.parameters())[2:])
            twin.load_state_dict(model.state_dict())  # the construction has made ranks equal
            its_optimizer.load_state_dict(_file(optimizer.state_dict()))
        for step in range(3, 8):
            train(optimizer, model, [batch(step, comm.rank)])
        for step in range(3, 8):
            train(its_optimizer, twin, [batch(step, comm.rank)])
        assert_equal(twin, model)

    ranks(body)


@every_method
def test_ranks_are_equal_after_construction_and_synchronize(ranks: Ranks, method: Make) -> None:
    def body(comm: Communicator) -> None:
        model = net(seed=comm.rank)
        optimizer = make(method, comm, model)
        assert_equal(model, net())
        train(optimizer, model, [batch(step, comm.rank) for step in range(5)])
        optimizer.synchronize()
        assert_ranks_equal(comm, model)
        assert optimizer.report()["updates"] == 5

    ranks(body)


# State


def _file(state: Any) -> Any:
    """The state through a file that is read without pickle."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(("method", "saved_after"), combinations(METHODS, [1, 3, 4, 5, 8]))
def test_resume_in_any_phase_is_bit_equal(ranks: Ranks, method: str, saved_after: int) -> None:
    def train_on(optimizer: Any, model: nn.Module, comm: Communicator, first: int, last: int) -> None:
        for step in range(first, last):
            train(optimizer, model, [batch(step, comm.rank)])
            if isinstance(optimizer, heatopt.DASO) and step % 4 == 3:
                optimizer.epoch_loss_logic(1.0)

    def body(comm: Communicator) -> None:
        model, undisturbed = net(), net()
        optimizer = make(METHODS[method], comm, model, adamw)
        train_on(optimizer, model, comm, 0, saved_after)
        saved = _file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train_on(optimizer, model, comm, saved_after, 12)
        del optimizer

        resumed = net(seed=1)
        its_optimizer = make(METHODS[method], comm, resumed, adamw)
        resumed.load_state_dict(saved["model"])
        its_optimizer.load_state_dict(saved["optimizer"])
        train_on(its_optimizer, resumed, comm, saved_after, 12)
        assert_equal(resumed, model)

        other = make(METHODS[method], comm, undisturbed, adamw)
        train_on(other, undisturbed, comm, 0, 12)
        assert_equal(undisturbed, model)  # to save changes nothing

    ranks(body)


@every_method
def test_a_plain_optimizer_loads_it_and_it_loads_a_plain_one(ranks: Ranks, method: Make) -> None:
    def body(comm: Communicator) -> None:
        model, plain = net(), net()
        optimizer, own = make(method, comm, model, adamw), adamw(plain)
        train(optimizer, model, [batch(step, comm.rank) for step in range(3)])
        own.load_state_dict(optimizer.state_dict())
        assert_equal(own.state_dict(), {k: v for k, v in optimizer.state_dict().items() if k != "local"})
        optimizer.load_state_dict(own.state_dict())
        assert optimizer.state_dict()["local"]["updates"] == 0
        optimizer.synchronize()
        train(optimizer, model, [batch(step, comm.rank) for step in range(4)])
        optimizer.synchronize()
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("delay", [0, 1])
def test_resumed_with_a_shorter_delay_no_average_is_late(ranks: Ranks, delay: int) -> None:
    def body(comm: Communicator) -> None:
        model, resumed = net(), net()
        optimizer = heatopt.LocalSGD(sgd(model), comm=comm, sync_every=4, delay=3)
        train(optimizer, model, [batch(step, comm.rank) for step in range(4)])
        its_optimizer = heatopt.LocalSGD(sgd(resumed), comm=comm, sync_every=4, delay=delay)
        resumed.load_state_dict(model.state_dict())
        its_optimizer.load_state_dict(optimizer.state_dict())
        train(its_optimizer, resumed, [batch(step, comm.rank) for step in range(4, 12 + delay)])
        assert its_optimizer.state_dict()["local"]["flight"] == []
        if delay == 0:
            assert_ranks_equal(comm, resumed)

    ranks(body)


FOREIGN: dict[str, tuple[Make, Make, int]] = {
    "differences without an anchor": (METHODS["Streaming"], METHODS["LocalSGD"], 3),
    "a fragment that is not there": (METHODS["Streaming"], METHODS["DiLoCo"], 5),
    "ranks apart, and no anchor": (METHODS["post-local"], METHODS["DiLoCo"], 5),
}


@pytest.mark.parametrize(("method", "other", "saved_after"), FOREIGN.values(), ids=FOREIGN)
def test_what_another_method_has_begun_it_must_end(ranks: Ranks, method: Make, other: Make, saved_after: int) -> None:
    def body(comm: Communicator) -> None:
        model, resumed = net(), net()
        optimizer = make(method, comm, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(saved_after)])
        its_optimizer = make(other, comm, resumed)
        before = copy.deepcopy(its_optimizer.state_dict())
        if comm.size > 1:
            with pytest.raises(ValueError, match=r"call synchronize\(\) before state_dict\(\)"):
                its_optimizer.load_state_dict(optimizer.state_dict())
            assert_equal(its_optimizer.state_dict(), before)
        optimizer.synchronize()
        resumed.load_state_dict(model.state_dict())
        its_optimizer.load_state_dict(optimizer.state_dict())
        train(its_optimizer, resumed, [batch(step, comm.rank) for step in range(saved_after, 12)])
        its_optimizer.synchronize()
        assert_ranks_equal(comm, resumed)

    ranks(body)


def shared_path(comm: Communicator, tmp_path: Path, name: str) -> Path:
    return Path(comm.broadcast_object(str(tmp_path))) / name


@every_method
def test_checkpoints_of_all_ranks(ranks: Ranks, method: Make, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared_path(comm, tmp_path, f"checkpoint{comm.size}")
        model = net()
        optimizer = make(method, comm, model, adamw)
        train(optimizer, model, [batch(step, comm.rank) for step in range(5)])
        heatopt.save(path, model=model, optimizer=optimizer, comm=comm)
        train(optimizer, model, [batch(step, comm.rank) for step in range(5, 9)])
        resumed = net(seed=1)
        its_optimizer = make(method, comm, resumed, adamw)
        heatopt.load(path, model=resumed, optimizer=its_optimizer, comm=comm)
        train(its_optimizer, resumed, [batch(step, comm.rank) for step in range(5, 9)])
        assert_equal(resumed, model)

    ranks(body)


@pytest.mark.skipif(LAUNCH.launched, reason="makes its own ranks")
@every_method
def test_checkpoints_load_at_another_number_of_ranks(method: Make, tmp_path: Path) -> None:
    from heatopt.comm import ThreadWorld

    def write(comm: Communicator) -> list[torch.Tensor]:
        model = net()
        optimizer = make(method, comm, model, adamw)
        train(optimizer, model, [batch(step, comm.rank) for step in range(5)])
        heatopt.save(tmp_path / "checkpoint", model=model, optimizer=optimizer, comm=comm)
        return tensors_of(model)

    def read(comm: Communicator) -> list[torch.Tensor]:
        model = net(seed=1)
        optimizer = make(method, comm, model, adamw)
        heatopt.load(tmp_path / "checkpoint", model=model, optimizer=optimizer, comm=comm)
        found = [t.clone() for t in tensors_of(model)]
        assert optimizer.state_dict()["local"]["updates"] == 5
        train(optimizer, model, [batch(step, comm.rank) for step in range(4)])
        optimizer.synchronize()
        assert_ranks_equal(comm, model)
        return found

    written = ThreadWorld(3).run(write)
    for size in (1, 2, 4):
        for found in ThreadWorld(size).run(read):
            assert_equal(found, written[0])  # each rank goes on from what rank 0 had


# Disagreements and wrong arguments


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (lambda rank: {"sync_every": 2 + rank}, "sync_every"),
        (lambda rank: {"delay": rank}, "delay"),
        (lambda rank: {"warmup_steps": rank}, "warmup_steps"),
        (lambda rank: {"wire_dtype": torch.bfloat16 if rank else None}, "wire_dtype"),
        (lambda rank: {"average_moments": (1, 1 + rank)}, "moments"),
    ],
)
def test_ranks_that_disagree_are_named(ranks: Ranks, options: Callable[[int], dict[str, Any]], name: str) -> None:
    def body(comm: Communicator) -> str:
        model = net()
        chosen = {"sync_every": 4} | options(min(comm.rank, 1))
        try:
            heatopt.LocalSGD(sgd(model), model=model, comm=comm, **chosen)
        except heatopt.RankMismatchError as error:
            return str(error)
        return "nothing was noticed"

    for message in ranks(body, min_size=2):
        assert f"setting {name}: rank 0 has" in message
        assert "rank 1 has" in message


def test_outer_optimizers_that_differ_are_named(ranks: Ranks) -> None:
    def body(comm: Communicator) -> str:
        try:
            heatopt.DiLoCo(sgd(net()), comm=comm, outer_lr=0.7 if comm.rank else 0.5)
        except heatopt.RankMismatchError as error:
            return str(error)
        return "nothing was noticed"

    for message in ranks(body, min_size=2):
        assert "option 'lr' of parameter group 1: rank 0 has 0.5, rank 1 has 0.7" in message


@every_method
def test_other_numbers_of_updates_are_named(ranks: Ranks, method: Make) -> None:
    def body(comm: Communicator) -> str:
        model = net()
        optimizer = make(method, comm, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(6)])
        if isinstance(optimizer, heatopt.DASO) and comm.num_nodes < comm.size:
            return "rank 0 is in a group of its own"  # then ranks wait in different groups, which ends the job
        try:
            if comm.rank == 0:
                optimizer.skip_update()
            train(optimizer, model, [batch(step, comm.rank) for step in range(6, 12)])
            optimizer.synchronize()
        except heatopt.RankMismatchError as error:
            return str(error)
        return "nothing was noticed"

    for message in ranks(body, min_size=2):
        assert "'number of updates' of the local updates" in message or "rank 0 is in" in message


def test_a_rank_that_leaves_is_named(ranks: Ranks) -> None:
    if ranks.size < 2:
        pytest.skip("needs at least 2 ranks")

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = make(METHODS["DiLoCo"], comm, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2 if comm.rank == 0 else 3)])

    from heatopt.comm import ThreadWorld

    with pytest.raises(heatopt.RankFailedError, match="waits for rank 0, which has finished"):
        ThreadWorld(2, timeout=5).run(body)


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        (heatopt.LocalSGD, {"sync_every": 0}, ValueError, "sync_every must be an integer >= 1, got 0"),
        (heatopt.LocalSGD, {"sync_every": 2.0}, TypeError, r"sync_every must be an integer >= 1, got 2\.0"),
        (heatopt.LocalSGD, {"sync_every": True}, TypeError, "sync_every must be an integer >= 1, got True"),
        (heatopt.LocalSGD, {"warmup_steps": -1}, ValueError, "warmup_steps must be an integer >= 0, got -1"),
        (heatopt.LocalSGD, {"sync_every": 2, "delay": 3}, ValueError, r"delay must be at most sync_every \(2\), got 3"),
        (heatopt.LocalSGD, {"outer": "sgd"}, TypeError, "outer must make an optimizer .*, got 'sgd'"),
        (heatopt.LocalSGD, {"outer": lambda params: None}, TypeError, "outer must make an optimizer .* a NoneType"),
        (heatopt.LocalSGD, {"within": "cluster"}, ValueError, "within must be None, 'node' or .*, got 'cluster'"),
        (heatopt.LocalSGD, {"within": 3}, TypeError, "within must be None, 'node' or .*, got 3"),
        (heatopt.LocalSGD, {"nested": [("node", 3)]}, ValueError, "periods of nested groups must grow and divide"),
        (heatopt.LocalSGD, {"nested": "node"}, TypeError, "nested must be pairs"),
        (heatopt.LocalSGD, {"nested": [("rack", 4)]}, TypeError, "a nested group must be 'node' or"),
        (heatopt.LocalSGD, {"average_moments": 3}, TypeError, "average_moments must be two integers"),
        (heatopt.LocalSGD, {"average_moments": (1, 0)}, ValueError, "average_moments must be an integer >= 1, got 0"),
        (heatopt.LocalSGD, {"average_moments": (1, 1), "shard": "state"}, ValueError, "average_moments needs whole"),
        (heatopt.LocalSGD, {"error_feedback": True}, ValueError, "give a wire_dtype too"),
        (heatopt.LocalSGD, {"wire_dtype": "bf16"}, TypeError, "wire_dtype must be .*, got 'bf16'"),
        (heatopt.LocalSGD, {"wire_dtype": torch.int8}, ValueError, r"wire_dtype must be .*, got torch\.int8"),
        (heatopt.LocalSGD, {"model": "net"}, TypeError, "model must be"),
        (heatopt.LocalSGD, {"comm": "world"}, TypeError, "comm must be"),
        (heatopt.LocalSGD, {"timeout": -1}, ValueError, "timeout must be"),
        (heatopt.LocalSGD, {"every": 1}, TypeError, "unexpected keyword argument 'every'"),
        (heatopt.SlowMo, {"slow_momentum": 1.0}, ValueError, "slow_momentum must be a number >= 0 and < 1"),
        (heatopt.SlowMo, {"slow_lr": 0}, ValueError, "slow_lr must be a number > 0, got 0"),
        (heatopt.DiLoCo, {"outer_momentum": 1}, ValueError, "outer_momentum must be"),
        (heatopt.DiLoCo, {"outer_lr": "big"}, TypeError, "outer_lr must be a number > 0, got 'big'"),
        (heatopt.DiLoCo, {"fragments": 2}, ValueError, r"fragments must be at most .* \(1 here\)"),
        (heatopt.DiLoCo, {"fragments": 0}, ValueError, "fragments must be an integer >= 1, got 0"),
        (heatopt.DiLoCo, {"mix": 1.5}, ValueError, r"mix must be a number >= 0 and <= 1, got 1\.5"),
        (heatopt.DiLoCo, {"mix": "all"}, ValueError, "mix must be 'delta' or a number from 0 to 1, got 'all'"),
        (heatopt.CO2, {"gap": 0}, ValueError, "gap must be a number > 0, got 0"),
        (heatopt.CO2, {"clip": -1}, ValueError, "clip must be a number > 0, got -1"),
        (heatopt.CO2, {"sync_every": None}, TypeError, "sync_every must be an integer >= 1, got None"),
    ],
)
def test_wrong_arguments(method: Make, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(error, match=message):
        method(torch.optim.SGD([parameter], lr=0.1), **arguments)
    heatopt.LocalSGD(torch.optim.SGD([parameter], lr=0.1))  # a refused construction has left nothing behind


@pytest.mark.parametrize("method", [heatopt.LocalSGD, heatopt.SlowMo, heatopt.DiLoCo, heatopt.CO2])
def test_not_an_optimizer(method: Make) -> None:
    with pytest.raises(TypeError, match=r"torch_optimizer must be a torch\.optim\.Optimizer, got list"):
        method([])


# Mixed precision


@pytest.mark.parametrize("name", ["LocalSGD", "post-local", "DiLoCo", "DASO"])
def test_overflows_keep_averages_in_step(ranks: Ranks, name: str) -> None:
    """The last rank's second loss overflows: it skips that update, and is counted all the same."""

    def body(comm: Communicator) -> int:
        model = net(torch.float32)
        optimizer = make(METHODS[name], comm, model)
        scaler = heatopt.GradScaler("cpu", init_scale=4.0)
        for step in range(6):
            optimizer.zero_grad()
            loss = scaler.scale(loss_of(model, batch(step, comm.rank, dtype=torch.float32)))
            if comm.rank == comm.size - 1 and step == 1:
                loss = loss * float("inf")
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.synchronize()
        assert_ranks_equal(comm, model)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        return int(optimizer.report()["updates"])

    assert ranks(body) == [6] * ranks.size


def test_clipping(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, plain = net(), net()
        optimizer = make(METHODS["LocalSGD"], comm, model)
        for thing in (model, plain):
            loss_of(thing, batch(0, comm.rank)).backward()
        norm = optimizer.clip_grad_norm_(0.1)
        assert_close(norm, torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1), rtol=1e-6)
        with optimizer.no_sync():
            optimizer.step()

    ranks(body)
