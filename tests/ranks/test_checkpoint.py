"""Checkpoints restore everything, bit for bit, and training goes on as if it had never stopped."""

from __future__ import annotations

import json
import logging
import math
import random
import struct
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import heatopt
from heatopt.checkpoint._writing import Writer
from heatopt.comm import ThreadWorld
from tests.ranks._training import (
    ALGORITHMS,
    TINY,
    Algorithm,
    Batch,
    adamw,
    assert_equal,
    assert_ranks_equal,
    batch,
    by_name,
    fill,
    generator,
    net,
    sgd,
    tensors_of,
    train,
    wrap,
)
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
one_process = pytest.mark.skipif(LAUNCH.launched, reason="makes its own ranks")


def shared(comm: Communicator, folder: Path) -> Path:
    """A path that is the same on all ranks, which may have folders of their own."""
    return comm.broadcast_object(folder) / "checkpoint"


def wrapped(
    algorithm: Algorithm, comm: Communicator, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Module, heatopt.DataParallelOptimizer]:
    model = algorithm.model(dtype, seed)
    return model, wrap(comm, algorithm.optimizer, model, **options)


@every_algorithm
def test_training_goes_on_bit_for_bit(ranks: Ranks, algorithm: Algorithm, tmp_path: Path) -> None:
    """Also where torch's own load_state_dict would cast: NAdam's mu_product, ASGD's eta."""

    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        for dtype in (torch.float64, torch.bfloat16):
            if algorithm.closure and dtype == torch.bfloat16:
                continue

            def data(step: int, dtype: torch.dtype = dtype) -> Batch:
                return batch(step, comm.rank, dtype=dtype)

            model, optimizer = wrapped(algorithm, comm, dtype=dtype)
            for step in range(3):
                algorithm.update(optimizer, model, data(step))
            heatopt.save(path, model=model, optimizer=optimizer)
            saved = [tensor.clone() for tensor in tensors_of([model, optimizer.state_dict()])]
            for step in range(3, 6):
                algorithm.update(optimizer, model, data(step))
            again, other = wrapped(algorithm, comm, seed=7, dtype=dtype)
            assert heatopt.load(path, model=again, optimizer=other) is None
            assert_equal([again, other.state_dict()], saved)
            for step in range(3, 6):
                algorithm.update(other, again, data(step))
            assert_equal([again, other], [model, optimizer])
            assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]

    ranks(body)


@one_process
@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_any_number_of_ranks(writers: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    for algorithm in ALGORITHMS:

        def write(comm: Communicator, algorithm: Algorithm = algorithm) -> list[torch.Tensor]:
            model, optimizer = wrapped(algorithm, comm)
            for step in range(2):
                algorithm.update(optimizer, model, batch(step, comm.rank))
            heatopt.save(path, model=model, optimizer=optimizer, extra={"name": algorithm.name})
            return tensors_of([model, optimizer])

        expected = ThreadWorld(writers).run(write)[0]
        for readers in (1, 2, 3, 4):

            def read(
                comm: Communicator, algorithm: Algorithm = algorithm, expected: list[torch.Tensor] = expected
            ) -> None:
                model, optimizer = wrapped(algorithm, comm, seed=5)
                assert heatopt.load(path, model=model, optimizer=optimizer) == {"name": algorithm.name}
                assert_equal([model, optimizer], expected)
                algorithm.update(optimizer, model, batch(2, comm.rank))
                assert_ranks_equal(comm, model, optimizer)

            ThreadWorld(readers).run(read)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


@every_algorithm
def test_to_and_from_a_plain_optimizer(ranks: Ranks, algorithm: Algorithm, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        model, optimizer = wrapped(algorithm, comm)
        algorithm.update(optimizer, model, batch(0, comm.rank))
        heatopt.save(path, model=model, optimizer=optimizer)
        plain_model = algorithm.model(seed=3)
        plain = algorithm.optimizer(plain_model)
        heatopt.load(path, model=plain_model, optimizer=plain, comm=comm)
        assert_equal([plain_model, plain], [model, optimizer])
        heatopt.save(path, model=plain_model, optimizer=plain, comm=comm)
        again, other = wrapped(algorithm, comm, seed=4)
        heatopt.load(path, model=again, optimizer=other)
        assert_equal([again, other], [model, optimizer])

    ranks(body)


def test_fused_memory(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        model = net()
        optimizer = wrap(comm, adamw, model, fuse=True)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        heatopt.save(path, model=model, optimizer=optimizer)
        again = net(seed=2)
        other = wrap(comm, adamw, again, fuse=True)
        train(other, again, [batch(9, comm.rank)])
        heatopt.load(path, model=again, optimizer=other)
        for each, module in ((optimizer, model), (other, again)):
            train(each, module, [batch(step, comm.rank) for step in range(2, 5)])
        assert_equal([again, other], [model, optimizer])

    ranks(body)


@pytest.mark.parametrize("options", [{}, {"master_dtype": torch.float32}, {"fuse": True}], ids=str)
def test_order_in_memory(ranks: Ranks, options: dict[str, Any], tmp_path: Path) -> None:
    """States are laid out as their parameters are. In another order some kernels round otherwise."""

    def make(comm: Communicator, seed: int) -> tuple[nn.Module, heatopt.DataParallelOptimizer]:
        model = fill(nn.Conv2d(3, 5, 3).bfloat16().to(memory_format=torch.channels_last), seed)
        return model, wrap(comm, sgd, model, **options)

    def update(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(2, 3, 5, 5, generator=generator(seed)).bfloat16()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        model, optimizer = make(comm, 0)
        update(model, optimizer, range(2))
        heatopt.save(path, model=model, optimizer=optimizer)
        again, other = make(comm, 1)
        heatopt.load(path, model=again, optimizer=other)
        for each, module in ((optimizer, model), (other, again)):
            update(module, each, range(2, 5))
        assert_equal([again, other], [model, optimizer])
        strides = [[t.stride() for t in tensors_of(each.state_dict()["state"])] for each in (optimizer, other)]
        assert strides[0] == strides[1]

    ranks(body)


def test_each_rank_writes_an_even_part(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        heatopt.save(path, model=nn.Linear(1000, 101), comm=comm)
        assert sorted(p.name for p in path.iterdir()) == [
            "manifest.json",
            *(f"rank-{rank:05d}.safetensors" for rank in range(comm.size)),
        ]
        sizes = [
            sum(t.nbytes for key, t in load_file(file).items() if not key.startswith("rank"))
            for file in path.glob("rank*")
        ]
        assert sum(sizes) == 4 * 101 * 1001 * (1 if comm.size == 1 else 0) or max(sizes) - min(sizes) <= 8

    def equal(comm: Communicator) -> None:
        torch.manual_seed(3)
        path = shared(comm, tmp_path)
        heatopt.save(path, model=net(), comm=comm)
        assert "rank0:model" not in (path / "manifest.json").read_text()

    ranks(body)
    ranks(equal)


# Other parts


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: heatopt.lr_scheduler.StepLR(o, 2, 0.3),
    "MultiStepLR": lambda o: heatopt.lr_scheduler.MultiStepLR(o, [1, 3, 3], 0.7),
    "CosineAnnealingLR": lambda o: heatopt.lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: heatopt.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: heatopt.lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "ExponentialLR": lambda o: heatopt.lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: heatopt.lr_scheduler.LambdaLR(o, lambda epoch: 0.95**epoch),
    "LinearLR": lambda o: heatopt.lr_scheduler.LinearLR(o, total_iters=7),
    "OneCycleLR": lambda o: heatopt.lr_scheduler.OneCycleLR(o, 0.1, 20),
    "PolynomialLR": lambda o: heatopt.lr_scheduler.PolynomialLR(o, 9),
    "ReduceLROnPlateau": lambda o: heatopt.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: heatopt.lr_scheduler.SequentialLR(
        o, [heatopt.lr_scheduler.ConstantLR(o, 0.1, 2), heatopt.lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: heatopt.lr_scheduler.ChainedScheduler(
        [heatopt.lr_scheduler.ConstantLR(o, 0.1, 2), heatopt.lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ParamScheduler": lambda o: heatopt.lr_scheduler.ParamScheduler(
        o, lr=heatopt.lr_scheduler.Milestones(0.1, (1, 6)), betas=(heatopt.lr_scheduler.Ramp(0.9, 0.8, steps=7), None)
    ),
}


@one_process
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tmp_path: Path) -> None:
    def make() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.05)
        return optimizer, SCHEDULERS[name](optimizer)

    def advance(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer, scheduler = make()
    advance(optimizer, scheduler, 4)
    heatopt.save(tmp_path / "c", optimizer=optimizer, scheduler=scheduler)
    expected = advance(optimizer, scheduler, 5)
    other, again = make()
    heatopt.load(tmp_path / "c", optimizer=other, scheduler=again)
    assert advance(other, again, 5) == expected
    assert again.state_dict() == scheduler.state_dict()


def test_scaler_and_sampler(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        scaler = heatopt.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(1))
        scaler.update(new_scale=48.0)
        sampler = heatopt.ResumableSampler(24, seed=3, comm=comm)
        sampler.set_epoch(2)
        drawing = iter(sampler)
        drawn = [next(drawing) for _ in range(2)]
        heatopt.save(path, scaler=scaler, sampler=sampler, comm=comm)
        expected = list(drawing)
        other, again = heatopt.GradScaler("cpu"), heatopt.ResumableSampler(24, seed=3, comm=comm)
        heatopt.load(path, scaler=other, sampler=again, comm=comm)
        assert other.state_dict() == scaler.state_dict()
        again.set_epoch(2)
        assert list(again) == expected
        assert sorted(i for part in comm.all_gather_object(drawn + expected) for i in part) == list(range(24))

    ranks(body)


def draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), torch.rand(3).tolist()]


def test_random_numbers(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        heatopt.save(path, comm=comm)
        expected = draw()
        heatopt.load(path, comm=comm)
        assert draw() == expected

    if LAUNCH.launched or ranks.size == 1:  # threads share the generators
        random.seed(5)
        random.gauss(0, 1)
        torch.manual_seed(random.getrandbits(30))
        ranks(body)


@one_process
def test_random_numbers_at_another_number_of_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ThreadWorld(2).run(lambda comm: heatopt.save(tmp_path / "c", comm=comm) and None)
    found = []
    with caplog.at_level(logging.INFO, "heatopt"):
        for _ in range(2):
            draw()
            heatopt.load(tmp_path / "c")
            found.append(draw())
    assert found[0] == found[1]
    assert "was saved by 2 ranks and is loaded by 1: rank 0 seeds its random generators" in caplog.text


def test_tensors_that_differ_between_ranks(ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """BatchNorm's statistics, which nobody has averaged, are kept by each rank."""

    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
        optimizer = wrap(comm, adamw, model)
        model(batch(0, comm.rank)[0]).sum().backward()
        optimizer.step()
        heatopt.save(path, model=model, optimizer=optimizer)
        again = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
        heatopt.load(path, model=again, optimizer=wrap(comm, adamw, again))
        assert_equal(again, model)

    ranks(body)


def test_tensors_that_differ_in_the_order_of_elements_alone(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        own = torch.zeros(2 * comm.size)
        own[2 * comm.rank] = 1
        heatopt.save(path, extra=own, comm=comm)
        assert_equal(heatopt.load(path, comm=comm), own)

    ranks(body)


@one_process
def test_tensors_that_differ_at_another_number_of_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def write(comm: Communicator) -> None:
        model = nn.BatchNorm1d(3)
        model.running_mean.fill_(comm.rank + 1)
        heatopt.save(tmp_path / "c", model=model, extra={"rank": comm.rank}, comm=comm)

    ThreadWorld(3).run(write)
    model = nn.BatchNorm1d(3)
    assert heatopt.load(tmp_path / "c", model=model) == {"rank": 0}
    assert model.running_mean.tolist() == [1.0] * 3
    assert "model was not equal on the 3 ranks that saved it" in caplog.text


EXTRA = {
    "numbers": [0, -1, 2**80, True, None, 0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
    "text": '\u00e4\n"\ud800',
    "\ud800": torch.ones(2),
    "\\ud800": torch.zeros(2),
    (1, "a"): {2: ("x", [()]), None: {}, 1.5: [], "$tensor": "not one"},
    "tensor": torch.tensor([[1, 2], [3, 4]])[:, 0],
    "counter": Counter("abca"),
    "dtype": torch.bfloat16,
}


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_extra(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        heatopt.save(path, extra=EXTRA, comm=comm)
        assert same(heatopt.load(path, comm=comm), EXTRA)
        json.loads((path / "manifest.json").read_text())

    ranks(body)


_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def test_dtypes_and_shapes(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        tensors = {}
        for dtype in _DTYPES:
            for shape in ((), (0, 3), (7, 5)):
                count = math.prod(shape) * torch.empty(1, dtype=dtype).element_size()
                raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator(len(shape)))
                tensors[f"{dtype} {shape}"] = raw.to(torch.uint8).view(dtype).view(shape)
        tensors["transposed"] = torch.arange(12.0).view(3, 4).T
        tensors["conjugate"] = torch.tensor([1 + 2j, 3 - 4j]).conj()
        tensors["sparse"] = torch.sparse_coo_tensor([[0, 2, 0]], [1.0, 2.0, 3.0], (4,), check_invariants=True)
        heatopt.save(path, extra=tensors, comm=comm)
        found = heatopt.load(path, comm=comm)
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert_equal(found[name], tensor.resolve_conj())

    ranks(body)


def test_large_tensors_have_several_pieces(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heatopt.checkpoint._pieces.PIECE_BYTES", 64)

    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        model, again = net(), net(seed=1)
        heatopt.save(path, model=model, comm=comm)
        heatopt.load(path, model=again, comm=comm)
        assert_equal(again, model)

    ranks(body)


def test_no_copy_of_all(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors whose elements are in another order are copied as they are written, not all at once."""
    copies: dict[int, list[weakref.ref[torch.Tensor]]] = {}
    counts = []
    contiguous = torch.Tensor.contiguous

    def counting(tensor: torch.Tensor) -> torch.Tensor:
        result = contiguous(tensor)
        if result is not tensor:
            own = copies.setdefault(threading.get_ident(), [])
            own.append(weakref.ref(result))
            counts.append(sum(copy() is not None for copy in own))
        return result

    monkeypatch.setattr(torch.Tensor, "contiguous", counting)

    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        tensors = [torch.full((9, 5), float(value)).t() for value in range(8)]
        heatopt.save(path, extra=tensors, comm=comm)
        assert 0 < max(counts) <= 2
        assert_equal(heatopt.load(path, comm=comm), tensors)

    ranks(body)


def test_tied_parameters_are_written_once(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)

        def make(seed: int) -> nn.Module:
            model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
            model[1].weight = model[0].weight
            nn.init.constant_(model[0].weight, seed)
            return model

        rate = torch.tensor(0.5)
        heatopt.save(path, model=make(3), extra={"model": [rate, rate]}, comm=comm)
        stored = [t for file in path.glob("rank*") for key, t in load_file(file).items() if key.startswith("model")]
        assert sum(t.numel() for t in stored) == 50 * 8
        again = make(0)
        one, other = heatopt.load(path, model=again, comm=comm)["model"]
        assert one is other
        assert (again[1].weight == 3).all()

    ranks(body)


# In the background


def test_background(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training does meanwhile does not change what is saved, however late it is written."""
    trained = [threading.Event() for _ in range(ranks.size)]
    write = Writer.write

    saves = [0] * ranks.size

    def write_late(self: Writer) -> Any:
        saves[self.rank] += 1
        assert saves[self.rank] == 1 or trained[self.rank].wait(20)
        return write(self)

    monkeypatch.setattr(Writer, "write", write_late)

    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        model = net()
        optimizer = wrap(comm, adamw, model)
        train(optimizer, model, [batch(0, comm.rank)])
        saved = [tensor.clone() for tensor in tensors_of([model, optimizer])]
        for _ in range(2):  # the second waits for the first
            train(optimizer, model, [])
            handle = heatopt.save(path, model=model, optimizer=optimizer, background=True)
        train(optimizer, model, [batch(1, comm.rank)])
        trained[comm.rank].set()
        handle.wait()
        handle.wait()
        again = net(seed=1)
        other = wrap(comm, adamw, again)
        heatopt.load(path, model=again, optimizer=other)
        assert_equal([again, other], saved)
        assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint"]

    ranks(body)


# Arguments


class NotATensor:
    pass


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        (7, {}, TypeError, "path must be"),
        (b"x", {}, TypeError, "path must be"),
        ("", {}, ValueError, "path must name"),
        (None, {"model": 3}, TypeError, "model must be"),
        (None, {"optimizer": "adam"}, TypeError, "optimizer must be"),
        (None, {"scheduler": 1}, TypeError, "scheduler must have state_dict"),
        (None, {"sampler": heatopt.ResumableSampler}, TypeError, "sampler must have state_dict"),
        (None, {"background": 1}, TypeError, "background must be"),
        (None, {"extra": {"a": [1, NotATensor()]}}, TypeError, "extra/a/1 is a NotATensor"),
        (None, {"extra": {NotATensor: 1}}, TypeError, "extra has a key"),
        (None, {"extra": [10**5000]}, ValueError, "extra/0 is an integer of 16610 bits"),
        (None, {"extra": np.zeros(2)}, TypeError, "extra is a ndarray"),
    ],
)
def test_wrong_arguments(
    ranks: Ranks, path: Any, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    def body(comm: Communicator) -> None:
        target = shared(comm, tmp_path) if path is None else path
        with pytest.raises(error, match=message):
            heatopt.save(target, **options, comm=comm)
        if "extra" not in options and "background" not in options:
            with pytest.raises(error, match=message):
                heatopt.load(target, **options, comm=comm)

    ranks(body)
    assert list(tmp_path.iterdir()) == []


def test_wrong_on_one_rank_is_wrong_on_all(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        with pytest.raises(TypeError, match="extra/x is a NotATensor"):
            heatopt.save(path, extra={"x": NotATensor() if comm.rank == comm.size - 1 else 1}, comm=comm)
        if comm.size > 1:
            width = 3 if comm.rank == comm.size - 1 else 2
            with pytest.raises(heatopt.RankMismatchError, match=rf"state of the model .* on rank {comm.size - 1}"):
                heatopt.save(path, model=nn.Linear(2, width), comm=comm)
            with pytest.raises(heatopt.RankMismatchError):
                heatopt.save(path if comm.rank else path.with_name("other"), comm=comm)
        assert not path.exists()
        heatopt.save(path, comm=comm)

    ranks(body)


def test_a_container_that_holds_itself(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    comm = heatopt.comm.SingleCommunicator()
    with pytest.raises(ValueError, match="extra holds itself"):
        heatopt.save(tmp_path / "c", extra=loop, comm=comm)


def test_texts_in_states(ranks: Ranks, tmp_path: Path) -> None:
    """torch's own load_state_dict does not give them back."""

    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        model, optimizer = wrapped(by_name["SGD"], comm)
        for parameter in model.parameters():
            optimizer.state[parameter] = {"note": "text", "more": [{"a": "b"}, ("c", 1)]}
        heatopt.save(path, optimizer=optimizer)
        _, other = wrapped(by_name["SGD"], comm)
        heatopt.load(path, optimizer=other)
        assert other.state_dict() == optimizer.state_dict()

    ranks(body)


@pytest.mark.parametrize("kind", [list, tuple])
def test_what_is_nested_deeply_can_be_read_again(kind: type[Any], tmp_path: Path) -> None:
    comm = heatopt.comm.SingleCommunicator()
    deep: Any = 1.5
    for _ in range(100):
        deep = kind([deep])
    heatopt.save(tmp_path / "c", extra=deep, comm=comm)
    assert heatopt.load(tmp_path / "c", comm=comm) == deep
    with pytest.raises(ValueError, match=r"extra .*nested more than 100 levels"):
        heatopt.save(tmp_path / "c", extra=kind([[deep]]), comm=comm)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_state_that_one_rank_cannot_give(ranks: Ranks, tmp_path: Path) -> None:
    class Broken:
        def __init__(self, is_broken: bool) -> None:
            self._is_broken = is_broken

        def state_dict(self) -> dict[str, Any]:
            if self._is_broken:
                raise RuntimeError("no state")
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        is_last = comm.rank == comm.size - 1
        with pytest.raises(heatopt.CheckpointError, match="the scheduler cannot give its state: RuntimeError"):
            heatopt.save(path, scheduler=Broken(is_last), comm=comm)
        optimizer = adamw(net())
        optimizer.register_state_dict_post_hook(lambda *_: Broken(is_last).state_dict() or None)
        with pytest.raises(heatopt.CheckpointError, match="the optimizer cannot give its state: RuntimeError"):
            heatopt.save(path, optimizer=optimizer, comm=comm)
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        with pytest.raises(TypeError, match=r"extra/0 is a tensor of .*: not supported"):
            heatopt.save(path, extra=[nested if is_last else None], comm=comm)
        heatopt.save(path, comm=comm)

    ranks(body)


def test_the_default_device_does_not_matter(ranks: Ranks, tmp_path: Path) -> None:
    """As with torch.set_default_device("cuda"): what is made for a checkpoint is made on the CPU."""

    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        tensor = torch.arange(3.0)
        sampler = heatopt.ResumableSampler(5, comm=comm)
        with torch.device("meta"):
            heatopt.save(path, extra=tensor, comm=comm)
            assert_equal(heatopt.load(path, comm=comm), tensor)
            assert len(list(sampler)) == len(sampler)

    ranks(body)


def test_what_does_not_fit(ranks: Ranks, tmp_path: Path) -> None:
    """Nothing is touched by a load that fails."""

    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        model, optimizer = wrapped(by_name["AdamW"], comm)
        scheduler = heatopt.lr_scheduler.StepLR(optimizer, 3)
        sampler = heatopt.ResumableSampler(9, comm=comm)
        heatopt.save(path, model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)

        class Thinner(nn.Sequential):
            def __init__(self) -> None:
                super().__init__(nn.Linear(4, 6).double())

        again, adam = wrapped(by_name["Adam"], comm, seed=1)
        half, half_optimizer = wrapped(by_name["AdamW"], comm, dtype=torch.float32)
        thin = Thinner()
        cases: list[tuple[str, dict[str, Any]]] = [
            ("has the optimizer AdamW, which does not fit Adam", {"model": again, "optimizer": adam}),
            (r"'0.weight' is float64 of shape \(6, 4\) there, but float32", {"model": half}),
            (r"parameter 0 of group 0 is float64 .* float32", {"optimizer": half_optimizer}),
            ("does not fit the model, which has no '2.weight'", {"model": thin}),
            (r"groups have \[6\] parameters there, but \[2\]", {"optimizer": wrap(comm, adamw, thin)}),
            ("the scheduler StepLR, which does not fit", {"scheduler": SCHEDULERS["LinearLR"](adam)}),
            ("has no scaler", {"scaler": heatopt.GradScaler("cpu")}),
            ("the sampler refuses .*length=9", {"model": again, "sampler": heatopt.ResumableSampler(8, comm=comm)}),
        ]
        before = [tensor.clone() for tensor in tensors_of([again, adam])]
        for message, objects in cases:
            with pytest.raises(heatopt.CheckpointError, match=message):
                heatopt.load(path, **objects, comm=comm)
        assert_equal([again, adam], before)

    ranks(body)


def test_state_of_a_refused_load_is_put_back(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
        scheduler = heatopt.lr_scheduler.StepLR(optimizer, 3)
        heatopt.save(path, scheduler=scheduler, sampler=heatopt.ResumableSampler(9, comm=comm), comm=comm)
        optimizer.step()
        scheduler.step()
        before = scheduler.state_dict()
        with pytest.raises(heatopt.CheckpointError, match="sampler refuses"):
            heatopt.load(path, scheduler=scheduler, sampler=heatopt.ResumableSampler(8, comm=comm), comm=comm)
        assert scheduler.state_dict() == before

    ranks(body)


def test_parameter_groups_and_tensors_among_the_options(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = shared(comm, tmp_path)

        def make(seed: int) -> tuple[nn.Module, heatopt.DataParallelOptimizer]:
            model = net(torch.float32, seed)
            first, *rest = model.parameters()
            groups = [{"params": [first], "lr": 0.3}, {"params": rest, "betas": (0.5, 0.6)}]
            plain = torch.optim.Adam(groups, lr=torch.tensor(0.01 * (seed + 1)), foreach=False)
            return model, heatopt.DataParallelOptimizer(plain, comm=comm, model=model, bucket_mb=TINY)

        model, optimizer = make(0)
        train(optimizer, model, [batch(0, comm.rank, dtype=torch.float32)])
        heatopt.save(path, model=model, optimizer=optimizer)
        again, other = make(1)
        heatopt.load(path, model=again, optimizer=other)
        assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        assert other.param_groups is other.torch_optimizer.param_groups
        for each, module in ((optimizer, model), (other, again)):
            train(each, module, [batch(1, comm.rank, dtype=torch.float32)])
        assert_equal([again, other], [model, optimizer])

    ranks(body)
