"""Saves a checkpoint after each step, or goes on from one.

    checkpoint.py PATH save|background [RANK CALL NUMBER]    one rank kills itself at a call of the third save
    checkpoint.py PATH background RANK CALL NUMBER fails     that call fails instead, and nobody waits for the save
    checkpoint.py PATH resume                         goes on to the sixth step
    checkpoint.py PATH straight                       six steps without a stop

Each rank writes its parameters' sum on stdout at its end.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import torch

import heatopt
from heatopt.checkpoint import _files

STEPS = 6
STRANGE_STEP = 2


class DeadlyOS:
    """:mod:`os`, of which one call is the end, or fails."""

    def __init__(self, name: str, number: int, fails: bool) -> None:
        self._name = name
        self._left = number
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name != self._name:
            return function

        def call(*arguments: Any) -> Any:
            if self._left == 0 and self._fails:
                raise OSError(errno.ENOSPC, "No space left on device")
            if self._left == 0:
                sys.stderr.write("fault\n")
                sys.stderr.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1
            return function(*arguments)

        return call


def main() -> None:
    path, mode = sys.argv[1:3]
    comm = heatopt.world()
    torch.manual_seed(comm.rank)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(), torch.nn.Linear(5, 2))
    optimizer = heatopt.DataParallelOptimizer(torch.optim.NAdam(model.parameters(), lr=0.1), model=model)
    scheduler = heatopt.lr_scheduler.StepLR(optimizer, 2)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    first = heatopt.load(path, **parts)["step"] if mode == "resume" else 0
    saves = []
    last = STEPS // 2 if mode in ("save", "background") else STEPS
    for step in range(first, last):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        if mode in ("save", "background"):
            if step == STRANGE_STEP and len(sys.argv) > 3:
                saves[-1].wait()  # the fault is the third save's
            if step == STRANGE_STEP and len(sys.argv) > 3 and comm.rank == int(sys.argv[3]):
                _files.os = DeadlyOS(sys.argv[4], int(sys.argv[5]), "fails" in sys.argv)  # type: ignore[assignment]
            saves.append(heatopt.save(path, **parts, extra={"step": step + 1}, background=mode == "background"))
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    sys.stdout.write(f"rank {comm.rank} has finished with {total!r}\n")


if __name__ == "__main__":
    main()
