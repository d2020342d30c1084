"""Checkpoints of sharded optimizers are those of any other: they load with and without sharding, at any size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import heatopt
from heatopt.comm import ThreadWorld
from tests.ranks._training import ALGORITHMS, Algorithm, assert_close, assert_equal, batch, wrap
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

MODES = ("none", "state")
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
        for mode in MODES:
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


@pytest.mark.skipif(LAUNCH.launched, reason="makes its own ranks")
@pytest.mark.parametrize("mode", MODES)
@sharded
def test_state_at_other_numbers_of_ranks(algorithm: Algorithm, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"

    def save(comm: Communicator) -> dict[str, object]:
        model, optimizer = make(algorithm, comm, "state")
        for step in range(3):
            algorithm.update(optimizer, model, batch(step, comm.rank))
        heatopt.save(path, model=model, optimizer=optimizer)
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def load(comm: Communicator) -> dict[str, object]:
        model, optimizer = make(algorithm, comm, mode, seed=1)
        heatopt.load(path, model=model, optimizer=optimizer)
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    for saving, loading in ((3, 2), (2, 4), (4, 1), (1, 3)):
        saved = ThreadWorld(saving).run(save)
        for found in ThreadWorld(loading).run(load):
            assert_equal(found, saved[0])
