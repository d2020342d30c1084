"""Trains a small model; at the third step one rank does something else.

    train.py [FAULT RANK [TIMEOUT [OPTIONS]]]

OPTIONS of the optimizer are written as JSON.

Each rank that comes to its end says so on stdout. Before the fault the rank writes ``fault`` on stderr.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import torch

import heatopt

STEPS = 5
STRANGE_STEP = 2


class BatchError(Exception):
    pass


def fail() -> NoReturn:
    raise BatchError("cannot read batch 17")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mean_of_loss() -> None:
    heatopt.world().allreduce(torch.zeros(3), "mean")


# Where in a step the fault strikes, and what it is.
FAULTS: dict[str, tuple[str, Callable[[], object]]] = {
    "raise-before": ("before", fail),
    "raise-hook": ("hook", fail),
    "raise-after": ("after", fail),
    "exit-3": ("before", lambda: sys.exit(3)),
    "exit-text": ("after", lambda: sys.exit("no licence left")),
    "exit-0": ("before", lambda: sys.exit(0)),
    "os-exit-7": ("after", lambda: os._exit(7)),
    "os-exit-0": ("after", lambda: os._exit(0)),
    "kill": ("before", kill),
    "kill-update": ("update", kill),
    "kill-end": ("", lambda: None),
    "os-exit-0-update": ("update", lambda: os._exit(0)),
    "sleep-update": ("update", lambda: time.sleep(100)),
    "sleep-before": ("before", lambda: time.sleep(100)),
    "sleep-after": ("after", lambda: time.sleep(100)),
    "allreduce": ("after", mean_of_loss),
    "barrier": ("before", lambda: heatopt.world().barrier()),
    "abort": ("before", lambda: heatopt.world().abort("the disk is full", 5)),
    "fewer-steps": ("", lambda: None),
    "leave-first": ("", lambda: None),
    "none": ("", lambda: None),
}


def announce() -> None:
    print("fault", file=sys.stderr, flush=True)


def main() -> None:
    comm = heatopt.world()
    fault = sys.argv[1] if len(sys.argv) > 1 and comm.rank == int(sys.argv[2]) else "none"
    fatal_point, action = FAULTS[fault]

    def strike(step: int, point: str) -> None:
        if step == STRANGE_STEP and point == fatal_point:
            announce()
            action()

    timeout = float(sys.argv[3]) if len(sys.argv) > 3 else None
    options = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    torch.manual_seed(comm.rank)
    model = torch.nn.Sequential()
    model.add_module("encoder", torch.nn.Linear(6, 5))
    model.add_module("decoder", torch.nn.Linear(5, 2))
    if fault == "leave-first":
        announce()
        return
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backwards, updates = itertools.count(), itertools.count()
    inner.register_step_pre_hook(lambda *_: strike(next(updates), "update"))
    optimizer = heatopt.DataParallelOptimizer(inner, model=model, timeout=timeout, **options)
    model.decoder.register_full_backward_hook(lambda *_: strike(next(backwards), "hook"))
    for step in range(STRANGE_STEP if fault == "fewer-steps" else STEPS):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 6)).square().mean()
        strike(step, "before")
        loss.backward()
        strike(step, "after")
        optimizer.step()
    if fault == "fewer-steps":
        announce()
        return
    if fault == "kill-end":
        announce()
        kill()
    sys.stdout.write(f"rank {comm.rank} has finished\n")  # in one piece: ranks share the stream


if __name__ == "__main__":
    main()
