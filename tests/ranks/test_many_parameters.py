"""What a step costs for each parameter: Python's part beside torch's own does not grow with their number."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt import DataParallelOptimizer
from heatopt.comm import Communicator
from tests.support.ranks import Ranks

Wrap = Callable[[torch.optim.Optimizer], torch.optim.Optimizer]
PACKAGE = str(Path(heatopt.__file__).parent)
# Waiting takes as many turns as it takes. What is passed to it runs in frames of its own, which count.
WAITING = (str(Path(PACKAGE, "comm")), "threading.py")
FEW, MANY = 16, 32


def count_lines(action: Callable[[], object]) -> Counter[str]:
    """Lines of Python that ``action`` runs in this thread; a loop within a line counts each turn."""
    lines: Counter[str] = Counter()

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        return None if file.startswith(WAITING[0]) or file.endswith(WAITING[1]) else note

    def note(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            lines["heatopt" if frame.f_code.co_filename.startswith(PACKAGE) else "others"] += 1
        return note

    before = sys.gettrace()
    gc.disable()  # what it would call is somebody else's
    sys.settrace(enter)
    try:
        action()
    finally:
        sys.settrace(before)
        gc.enable()
    return lines


def lines_per_parameter(wrap: Wrap) -> dict[str, float]:
    """What :func:`lines_of_a_step` grows by."""
    many = lines_of_a_step(wrap, MANY)
    many.subtract(lines_of_a_step(wrap, FEW))
    return {where: lines / (MANY - FEW) for where, lines in many.items()}


def lines_of_a_step(wrap: Wrap, count: int) -> Counter[str]:
    """Lines of ``zero_grad`` and ``step``, once all has been made that stays."""
    parameters = [nn.Parameter(torch.ones(4, 8)) for _ in range(count)]
    optimizer = wrap(torch.optim.Adam(parameters, foreach=True))
    lines: Counter[str] = Counter()
    for _ in range(3):
        lines = count_lines(optimizer.zero_grad)
        torch.stack([p.sum() for p in parameters]).sum().backward()
        lines += count_lines(optimizer.step)
    return lines


@pytest.mark.parametrize("shard", ["none", "state", "gradients"])
def test_no_loop_over_parameters_beyond_torch(ranks: Ranks, shard: str) -> None:
    """None in the package; and of torch's own lines a rank runs no more than with the plain optimizer."""

    def body(comm: Communicator) -> None:
        def wrap(plain: torch.optim.Optimizer) -> torch.optim.Optimizer:
            return DataParallelOptimizer(plain, comm=comm, blocking=True, bucket_mb=8, shard=shard)

        found, plain = lines_per_parameter(wrap), lines_per_parameter(lambda plain: plain)
        assert found["heatopt"] == 0
        assert plain["others"] > 1  # torch's own loops are seen
        assert found["others"] <= plain["others"]

    ranks(body, min_size=2)
