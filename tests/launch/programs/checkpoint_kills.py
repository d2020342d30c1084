"""Kills a process at each system call of the writer in turn, and loads what is there then.

    checkpoint_kills.py FOLDER

Its ranks are threads, so that all die at once. Writes a line for each kind of save, with the number of kills.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

import heatopt
from heatopt.checkpoint import _files, _writing
from heatopt.comm import Communicator, ThreadWorld
from tests.ranks._training import adamw, assert_equal, net, tensors_of, wrap

CALLS = ("open", "write", "fsync", "close", "mkdir", "makedirs", "rename", "unlink", "rmdir", "listdir")
NEVER = 10**9

# (ranks, shard, background)
KINDS = [(1, "none", False), (2, "none", True), (2, "state", False), (3, "state", True)]


class DeadlyOS:
    """:mod:`os`, of which one call is the end of the process; a write is half done."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._lock = threading.Lock()
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in CALLS:
            return function

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                number, self.calls = self.calls, self.calls + 1
            if number == self._at:
                if name == "write":
                    function(arguments[0], arguments[1][: arguments[1].nbytes // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call


def parts_of(comm: Communicator, shard: str, number: int) -> dict[str, Any]:
    """A model and its optimizer after ``number`` steps."""
    model = net()
    optimizer = wrap(comm, adamw, model, shard=shard)
    for step in range(number):
        # By hand: matrix products of several threads at once crash now and then in a process that was forked.
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + step + comm.rank)
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def save(path: Path, kind: tuple[int, str, bool], number: int, at: int) -> int:
    """Save after ``number`` steps and return how many calls that took, unless one of them is the end."""
    size, shard, background = kind
    deadly = DeadlyOS(at)

    def body(comm: Communicator) -> None:
        parts = parts_of(comm, shard, number)
        comm.barrier()
        _files.os = _writing.os = deadly  # type: ignore[assignment]
        comm.barrier()
        heatopt.save(path, **parts, extra=number, background=background).wait()

    try:
        ThreadWorld(size, timeout=20.0).run(body)
    finally:
        _files.os = _writing.os = os
    return deadly.calls


def load(path: Path, expected: dict[int, list[torch.Tensor]]) -> int:
    """The number that was saved; everything is as it was then."""
    model = net(seed=9)
    optimizer = adamw(model)
    number = int(heatopt.load(path, model=model, optimizer=optimizer, comm=heatopt.comm.SingleCommunicator()))
    assert_equal([model, optimizer], expected[number])
    return number


def tensors_after(size: int, number: int) -> list[torch.Tensor]:
    """What ``size`` ranks have after so many steps."""
    return ThreadWorld(size).run(lambda comm: tensors_of(list(parts_of(comm, "none", number).values())))[0]


def kill_at_each_call(folder: Path, kind: tuple[int, str, bool]) -> tuple[int, set[int]]:
    """Number of kills, and which of the two checkpoints were found after them."""
    expected = {number: tensors_after(kind[0], number) for number in (1, 2)}
    old, path = folder / "old", folder / "new" / "checkpoint"
    save(old, kind, 1, NEVER)
    kills, found = 0, set()
    for at in range(NEVER):
        shutil.rmtree(path.parent, ignore_errors=True)
        shutil.copytree(old, path)
        child = os.fork()
        if child == 0:
            save(path, kind, 2, at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found.add(load(path, expected))
        if not os.WIFSIGNALED(status):
            assert status == 0, f"{kind}, call {at}: status {status}"
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{kind}, call {at}: status {status}"
        kills += 1
    shutil.rmtree(old)
    return kills, found


def main() -> None:
    torch.set_num_threads(1)
    _writing._POLL_SECONDS = 0.001
    folder = Path(sys.argv[1])
    for kind in KINDS:
        kills, found = kill_at_each_call(folder, kind)
        sys.stdout.write(f"{kind}: {kills} kills, found {sorted(found)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
