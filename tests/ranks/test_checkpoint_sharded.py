"""Checkpoints of sharded optimizers are those of any other: they load with and without sharding, at any size."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import heatopt
from heatopt.checkpoint import _rank_file
from heatopt.comm import ThreadWorld
from heatopt.sharding import _partition
from tests.ranks._sharding import shards_of
from tests.ranks._training import (
    ALGORITHMS,
    Algorithm,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    fill,
    tensors_of,
    wrap,
)
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

one_process = pytest.mark.skipif(LAUNCH.launched, reason="makes its own ranks")
sharded = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)


def make(
    algorithm: Algorithm, comm: Communicator, mode: str, seed: int = 0
) -> tuple[torch.nn.Module, heatopt.DataParallelOptimizer]:
    model = algorithm.model(torch.float64, seed)
    return model, wrap(comm, algorithm.optimizer, model, shard=mode)


@sharded
def test_training_goes_on_bit_for_bit(ranks: Ranks, algorithm: Algorithm, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        model, optimizer = make(algorithm, comm, "state")
        for step in range(3):
            algorithm.update(optimizer, model, batch(step, comm.rank))
        heatopt.save(path, model=model, optimizer=optimizer)
        for step in range(3, 6):
            algorithm.update(optimizer, model, batch(step, comm.rank))
        for mode in shards_of(algorithm.name):
            again, other = make(algorithm, comm, mode, seed=1)
            heatopt.load(path, model=again, optimizer=other)
            for step in range(3, 6):
                algorithm.update(other, again, batch(step, comm.rank))
            if algorithm.name == "LBFGS" and mode == "none":  # adds up its inner products in another order
                assert_close(again, model)
                continue
            assert_equal(again, model)
            assert_equal(other.state_dict(), optimizer.state_dict())

    ranks(body)


@one_process
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_any_number_of_ranks(algorithm: Algorithm, tmp_path: Path) -> None:
    """Save at {1, 2, 3, 4}, load at {1, 2, 3, 4}: the same bits, and the same next step with and without sharding.

    Each algorithm saves with each kind of sharding, and on each number of ranks algorithms save with each kind.
    """
    path = tmp_path / "checkpoint"

    def save(comm: Communicator, saver: str) -> dict[str, object]:
        model, optimizer = make(algorithm, comm, saver)
        for step in range(2):
            algorithm.update(optimizer, model, batch(step, comm.rank))
        heatopt.save(path, model=model, optimizer=optimizer)
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def load(comm: Communicator) -> None:
        after = []
        for mode in shards_of(algorithm.name):
            model, optimizer = make(algorithm, comm, mode, seed=1)
            heatopt.load(path, model=model, optimizer=optimizer)
            assert_equal({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
            algorithm.update(optimizer, model, batch(2, comm.rank))
            assert_ranks_equal(comm, model, optimizer.state_dict())
            after.append([model, optimizer.state_dict()])
        # LBFGS adds up its inner products in another order where it is sharded.
        for other in after[1:]:
            (assert_close if algorithm.name == "LBFGS" else assert_equal)(other, after[0])

    for saving in (1, 2, 3, 4):
        modes = shards_of(algorithm.name)
        saved = ThreadWorld(saving).run(save, modes[(ALGORITHMS.index(algorithm) + saving) % len(modes)])[0]
        for loading in (1, 2, 3, 4):
            ThreadWorld(loading).run(load)


@sharded
def test_to_and_from_a_plain_optimizer(ranks: Ranks, algorithm: Algorithm, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        model, optimizer = make(algorithm, comm, "state")
        for step in range(2):
            algorithm.update(optimizer, model, batch(step, comm.rank))
        heatopt.save(path, model=model, optimizer=optimizer)
        plain_model = algorithm.model(torch.float64, 3)
        plain = algorithm.optimizer(plain_model)
        heatopt.load(path, model=plain_model, optimizer=plain, comm=comm)
        assert_equal([plain_model, plain], [model, optimizer])
        assert list(plain.state_dict()["state"]) == list(optimizer.state_dict()["state"])
        heatopt.save(path, model=plain_model, optimizer=plain, comm=comm)
        again, other = make(algorithm, comm, "state", seed=4)
        heatopt.load(path, model=again, optimizer=other)
        assert_equal([again, other], [model, optimizer])
        for each, module in ((optimizer, model), (other, again)):
            algorithm.update(each, module, batch(2, comm.rank))
        assert_equal([again, other], [model, optimizer])

    ranks(body)


# What moves, and what does not


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation of this thread has returned.

    Bytes do not count: under torch.distributed they are messages, and what is read from files is counted apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            if tensor.dtype != torch.uint8:
                self.numel = max(self.numel, tensor.numel())
        return result


WIDE = 40_007
"""Elements of the large parameter: with four ranks a share is still larger than the state of a random generator."""
SMALL = 512
"""Bytes of a piece."""


def wide(comm: Communicator, mode: str, seed: int) -> tuple[torch.nn.Module, heatopt.DataParallelOptimizer]:
    """A large parameter, some small ones, an empty one and one without dimensions."""
    sizes = ((WIDE,), (3, 5), (), (0, 2), (17,))
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(size)) for size in sizes])
    fill(module, seed)
    return module, wrap(comm, adamw, module, shard=mode)


def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for index, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + index + number)
    optimizer.step()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Pieces are small; and how many bytes of the optimizer each thread has read."""
    monkeypatch.setattr("heatopt.checkpoint._pieces.PIECE_BYTES", SMALL)
    found: dict[int, int] = {}
    read_piece = _rank_file.RankFile.read

    def counting(self: Any, piece: Any, *arguments: Any) -> torch.Tensor:
        elements = read_piece(self, piece, *arguments)
        if piece.name.startswith("optimizer/"):
            number = threading.get_ident()
            found[number] = found.get(number, 0) + elements.nbytes
        return elements

    monkeypatch.setattr(_rank_file.RankFile, "read", counting)
    return found


def test_no_rank_has_the_whole_state(ranks: Ranks, tmp_path: Path, read: dict[int, int]) -> None:
    """Saving and loading make no tensor larger than a share, and read what is needed and little more."""

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        module, optimizer = wide(comm, "state", 0)
        step(module, optimizer, 0)
        share = WIDE // comm.size + 64 if comm.size > 1 else WIDE
        for background in (False, True):
            with Largest() as largest:
                handle = heatopt.save(path, optimizer=optimizer, background=background)
            handle.wait()
            assert 0 < largest.numel <= share
        again, other = wide(comm, "state", 1)
        again.load_state_dict(module.state_dict())
        read.pop(threading.get_ident(), None)
        with Largest() as largest:
            heatopt.load(path, optimizer=other)
        assert 0 < largest.numel <= share
        numbers = sum(p.numel() for p in module.parameters())
        moments = 2 * 4 * numbers
        # Shares begin at multiples of 64 elements; of each moment a piece too much at either end; numbers of steps.
        assert read[threading.get_ident()] <= moments / comm.size + 2 * (4 * 64 + 2 * SMALL) + 5 * 4
        total = sum(comm.all_gather_object(read[threading.get_ident()]))
        assert moments <= total
        for each, module_of in ((optimizer, module), (other, again)):
            step(module_of, each, 1)
        assert_equal([again, other], [module, optimizer])
        assert_ranks_equal(comm, module, optimizer)

    ranks(body)


def test_what_is_written_is_held(ranks: Ranks, tmp_path: Path) -> None:
    """Each piece of the state is in the file of the rank that has it, and in no other; the manifest says where."""

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        module, optimizer = wide(comm, "state", 0)
        step(module, optimizer, 0)
        heatopt.save(path, optimizer=optimizer)
        held = sum(
            tensor.numel() for state in optimizer.state.values() for key, tensor in state.items() if "exp_avg" in key
        )
        file = load_file(path / f"rank-{comm.rank:05d}.safetensors")
        assert sum(tensor.numel() for key, tensor in file.items() if "exp_avg" in key) == held
        pieces = json.loads((path / "manifest.json").read_text())["tensors"]["optimizer/state/0/exp_avg"]["pieces"]
        assert [pieces[0][1], pieces[-1][2]] == [0, WIDE]
        assert [piece[0] for piece in pieces] == list(range(comm.size))

    ranks(body)


def history(comm: Communicator, seed: int) -> tuple[torch.nn.Module, heatopt.DataParallelOptimizer]:
    """LBFGS for parameters of any kind."""
    sizes = ((3, 5), (WIDE,), (), (0, 2), (17,))
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(size)) for size in sizes])
    module.append(torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    fill(module, seed)
    options: dict[str, Any] = {"lr": 0.3, "max_iter": 4, "history_size": 4, "tolerance_grad": 0, "tolerance_change": 0}
    return module, wrap(comm, lambda model: torch.optim.LBFGS(model.parameters(), **options), module, shard="state")


def descend(comm: Communicator, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        terms = [(0.3 + index + comm.rank) * p.abs().square().sum() for index, p in enumerate(module.parameters())]
        loss = torch.stack(terms).sum() / WIDE
        loss.backward()
        return loss.detach()

    optimizer.step(closure)  # type: ignore[arg-type]


def test_no_rank_has_the_whole_history(
    ranks: Ranks, tmp_path: Path, read: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank writes its runs of the vectors of LBFGS, and reads its runs of them, and nobody makes them whole."""
    monkeypatch.setattr(_partition.plan_shards, "__defaults__", (300,))  # so that a rank's part is several runs

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        module, optimizer = history(comm, 0)
        for _ in range(2):
            descend(comm, module, optimizer)
        own = [t for t in tensors_of(next(iter(optimizer.state.values()))) if t.dim()]
        assert len(own) == 2 + 2 * 4  # the direction, the last gradient, and what is remembered
        count = 15 + WIDE + 1 + 17 + 2 * 3
        with Largest() as largest:
            heatopt.save(path, optimizer=optimizer)
        assert 0 < largest.numel <= own[0].numel() <= count / comm.size + 64
        manifest = json.loads((path / "manifest.json").read_text())["tensors"]
        vectors = {name: entry["pieces"] for name, entry in manifest.items() if entry["shape"] == [count]}
        assert len(vectors) == len(own)
        for pieces in vectors.values():
            written = [stop - start for rank, start, stop, _ in pieces if rank == comm.rank]
            assert sum(written) == own[0].numel()
            assert sum(stop - start for _, start, stop, _ in pieces) == pieces[-1][2] == count
        again, other = history(comm, 1)
        again.load_state_dict(module.state_dict())
        read.pop(threading.get_ident(), None)
        with Largest() as largest:
            heatopt.load(path, optimizer=other)
        assert largest.numel == own[0].numel()
        # The same ranks: no piece has elements that are another's. Beside the vectors there are single numbers.
        assert read[threading.get_ident()] <= sum(vector.nbytes for vector in own) + 100
        for each, module_of in ((optimizer, module), (other, again)):
            descend(comm, module_of, each)
        assert_equal([again, other], [module, optimizer])
        assert_ranks_equal(comm, module, optimizer)

    ranks(body)


@one_process
@pytest.mark.parametrize("shape", [(), (1, 1), (5,)])
def test_history_of_one_parameter(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Ranks without an element of it, and numbers whose shape is that of the parameter."""

    def body(comm: Communicator) -> None:
        pairs = []
        for seed in (0, 1):
            module = fill(torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(shape))]), seed)
            plain = torch.optim.LBFGS(module.parameters())
            pairs.append((module, heatopt.DataParallelOptimizer(plain, comm=comm, shard="state")))
        (module, optimizer), (again, other) = pairs
        descend(comm, module, optimizer)
        heatopt.save(tmp_path / "checkpoint", model=module, optimizer=optimizer)
        heatopt.load(tmp_path / "checkpoint", model=again, optimizer=other)
        for each, module_of in ((optimizer, module), (other, again)):
            descend(comm, module_of, each)
        assert_equal([again, other], [module, optimizer])

    ThreadWorld(3).run(body)


# Around the states


def test_background(ranks: Ranks, tmp_path: Path) -> None:
    """What training does meanwhile does not change what is saved."""

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        module, optimizer = wide(comm, "state", 0)
        step(module, optimizer, 0)
        saved = [tensor.clone() for tensor in tensors_of([module, optimizer.state_dict()])]
        handle = heatopt.save(path, model=module, optimizer=optimizer, background=True)
        step(module, optimizer, 1)
        handle.wait()
        again, other = wide(comm, "state", 1)
        heatopt.load(path, model=again, optimizer=other)
        assert_equal([again, other], saved)

    ranks(body)


@pytest.mark.parametrize("when", ["new", "loaded", "trained", "inside join"])
def test_at_any_time(ranks: Ranks, when: str, tmp_path: Path) -> None:
    """Into and out of an optimizer that holds no state yet, the whole one, its part, and all of it for a while."""

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        module, optimizer = wide(comm, "state", 0)
        step(module, optimizer, 0)
        heatopt.save(path, model=module, optimizer=optimizer)
        again, other = wide(comm, "state", 1)
        if when != "new":
            step(again, other, 5)
        if when == "loaded":
            other.load_state_dict(other.state_dict())
        with other.join() if when == "inside join" else contextlib.nullcontext():
            heatopt.load(path, model=again, optimizer=other)
            heatopt.save(path, model=again, optimizer=other)
        heatopt.load(path, model=again, optimizer=other)
        assert_equal([again, other], [module, optimizer])
        step(module, optimizer, 1)
        step(again, other, 1)
        assert_equal([again, other], [module, optimizer])

    ranks(body)


@pytest.mark.parametrize("how", ["load", "load_state_dict"])
@pytest.mark.parametrize("mode", ["state", "gradients"])
def test_order_after_loading(ranks: Ranks, mode: str, how: str, tmp_path: Path) -> None:
    """What had a state before, and in which order, is forgotten."""

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        module, optimizer = wide(comm, mode, 0)
        heatopt.save(path, model=module, optimizer=optimizer)
        new = copy.deepcopy(optimizer.state_dict())
        step(torch.nn.ParameterList(list(module)[1:]), optimizer, 0)
        step(module, optimizer, 1)
        assert list(optimizer.state_dict()["state"]) == [1, 2, 3, 4, 0]
        if how == "load":
            heatopt.load(path, model=module, optimizer=optimizer)
        else:
            optimizer.load_state_dict(new)
        step(module, optimizer, 2)
        assert list(optimizer.state_dict()["state"]) == [0, 1, 2, 3, 4]

    ranks(body)


@pytest.mark.parametrize("mode", ["none", "state", "gradients"])
def test_into_a_copy(ranks: Ranks, mode: str, tmp_path: Path) -> None:
    """What a copy does first is to load."""

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        module, optimizer = wide(comm, mode, 0)
        step(module, optimizer, 0)
        heatopt.save(path, model=module, optimizer=optimizer)
        again, other = copy.deepcopy((module, optimizer))
        heatopt.load(path, model=again, optimizer=other)
        step(module, optimizer, 1)
        step(again, other, 1)
        assert_equal([again, other], [module, optimizer])

    ranks(body)


def test_parameters_without_a_state(ranks: Ranks, tmp_path: Path) -> None:
    """Those that never had a gradient; and ranks that own nothing of the others."""

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"

        def make_one(seed: int) -> tuple[torch.nn.Module, heatopt.DataParallelOptimizer]:
            module = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(7)), torch.nn.Parameter(torch.ones(()))])
            return module, wrap(comm, adamw, fill(module, seed), shard="state")

        def update(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
            module[1].grad = torch.tensor(2.0)
            optimizer.step()

        module, optimizer = make_one(0)
        update(module, optimizer)
        heatopt.save(path, model=module, optimizer=optimizer)
        again, other = make_one(1)
        heatopt.load(path, model=again, optimizer=other)
        assert list(other.state_dict()["state"]) == [1]
        copied = copy.deepcopy(other)
        assert_equal(copied.state_dict(), optimizer.state_dict())
        for module_of, each in ((module, optimizer), (again, other)):
            update(module_of, each)
        assert_equal([again, other], [module, optimizer])

    ranks(body)


def test_hooks_see_whole_states(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        module, optimizer = wide(comm, "state", 0)
        step(module, optimizer, 0)
        seen = []
        optimizer.register_state_dict_post_hook(lambda o, s: seen.append(s["state"][0]["exp_avg"].numel()))
        heatopt.save(path, model=module, optimizer=optimizer)
        again, other = wide(comm, "state", 1)
        other.torch_optimizer.register_load_state_dict_pre_hook(
            lambda o, s: seen.append(s["state"][0]["exp_avg"].numel())
        )
        heatopt.load(path, model=again, optimizer=other)
        assert seen == [WIDE, WIDE]
        assert_equal([again, other], [module, optimizer])

    ranks(body)


def test_states_of_which_a_rank_has_lost_its_part(ranks: Ranks, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        module, optimizer = wide(comm, "state", 0)
        step(module, optimizer, 0)
        if comm.rank == comm.size - 1:
            del next(iter(optimizer.state.values()))["exp_avg"]
        with pytest.raises(heatopt.RankMismatchError, match="do not have all of the state 'exp_avg' of parameter"):
            heatopt.save(path, model=module, optimizer=optimizer)
        assert not path.exists()

    if ranks.size > 1:
        ranks(body)
