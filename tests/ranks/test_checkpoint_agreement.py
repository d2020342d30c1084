"""A rank that saves or loads while others train: the same error on all ranks, at once, that says who is where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import heatopt
from tests.ranks._training import adamw, assert_equal, assert_ranks_equal, batch, loss_of, net, sgd, train, wrap
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

SECONDS = 20.0
"""Far less than the time-out of a communicator, and more than any of these calls takes."""


class Training:
    """One rank's model and optimizer, and what it may do with them."""

    def __init__(self, comm: Communicator, folder: Path, shard: str = "state") -> None:
        self.comm = comm
        self.path = comm.broadcast_object(folder) / "checkpoint"
        self.model = net()
        self.optimizer = wrap(comm, adamw, self.model, shard=shard, timeout=SECONDS)
        train(self.optimizer, self.model, [batch(0, comm.rank)])
        self.parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        self.handle = heatopt.save(self.path, **self.parts, background=True)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, batch(1, self.comm.rank)).backward()

    def save(self) -> None:
        heatopt.save(self.path, **self.parts)

    def save_model(self) -> None:
        heatopt.save(self.path, model=self.model, comm=self.comm)

    def load(self) -> None:
        heatopt.load(self.path, **self.parts)

    def wait(self) -> None:
        self.handle.wait()

    def join(self) -> None:
        with self.optimizer.join():
            pass


PLACES = {
    "backward": "backward()",
    "step": "step()",
    "states": "state_dict() or another look at sharded states",
    "join": "the end of join()",
    "save": "save()",
    "save_model": "save()",
    "load": "load()",
    "wait": "the end of a save() in the background",
}


def act(training: Training, name: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "step": training.optimizer.step,
        "states": training.optimizer.state_dict,
    }
    calls.get(name, getattr(training, name, None))()  # type: ignore[misc]


CASES = [
    ("save", "backward"),
    ("backward", "save"),
    ("save", "step"),
    ("step", "save_model"),
    ("load", "step"),
    ("wait", "backward"),
    ("save", "join"),
    ("join", "load"),
    ("states", "step"),
]


@pytest.mark.parametrize(("first", "last"), CASES, ids=[f"{first} and {last}" for first, last in CASES])
def test_ranks_in_different_calls(ranks: Ranks, first: str, last: str, tmp_path: Path) -> None:
    """All ranks but the last one are in the ``first`` call; afterwards all go on as if nothing had been."""

    def body(comm: Communicator) -> None:
        training = Training(comm, tmp_path, "none" if "join" in (first, last) else "state")
        if "wait" not in (first, last):
            training.handle.wait()
        before = [tensor.clone() for tensor in training.model.parameters()]
        if comm.size > 1:
            with pytest.raises(heatopt.RankMismatchError) as caught:
                act(training, last if comm.rank == comm.size - 1 else first)
            assert f"rank 0 is in {PLACES[first]}" in str(caught.value)
            assert f"rank {comm.size - 1} is in {PLACES[last]}" in str(caught.value)
            assert len(set(comm.all_gather_object(str(caught.value)))) == 1
        assert_equal(list(training.model.parameters()), before)
        training.handle.wait()
        train(training.optimizer, training.model, [batch(1, comm.rank)])
        heatopt.load(training.path, **training.parts)  # the checkpoint is the one of before
        assert_equal(list(training.model.parameters()), before)
        assert_ranks_equal(comm, training.model, training.optimizer.state_dict())

    ranks(body)


def test_gradients_are_left_alone(ranks: Ranks, tmp_path: Path) -> None:
    """In the middle of an accumulation gradients stay local while a checkpoint is written and read."""

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        model = net()
        optimizer = wrap(comm, sgd, model)
        with optimizer.no_sync():
            loss_of(model, batch(0, comm.rank)).backward()
        own = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        heatopt.save(path, model=model, optimizer=optimizer, background=True).wait()
        heatopt.load(path, model=model, optimizer=optimizer)
        assert_equal([parameter.grad for parameter in model.parameters()], own)
        expected = torch.cat([gradient.flatten() for gradient in own])
        comm.allreduce(expected, "mean")
        optimizer.synchronize()
        found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-14, atol=1e-15)

    ranks(body)


def test_one_wait_for_two(ranks: Ranks, tmp_path: Path) -> None:
    """Ranks that wait for a save in the background, and ranks that go on to the next one, which waits for it."""

    def body(comm: Communicator) -> None:
        training = Training(comm, tmp_path)
        if comm.rank == 0:
            training.handle.wait()
        training.save()
        training.handle.wait()
        training.load()

    ranks(body)
