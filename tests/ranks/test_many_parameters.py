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


def lines_of_a_step(wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer], count: int) -> Counter[str]:
    """Lines of ``zero_grad`` and ``step``, once all has been made that stays."""
    parameters = [nn.Parameter(torch.ones(4, 8)) for _ in range(count)]
    optimizer = wrap(torch.optim.Adam(parameters, foreach=True))
    lines: Counter[str] = Counter()
    for _ in range(3):
        lines = count_lines(optimizer.zero_grad)
        torch.stack([p.sum() for p in parameters]).sum().backward()
        lines += count_lines(optimizer.step)
    return lines


@pytest.mark.parametrize(
    "options",
    [{}, {"shard": "state"}, {"shard": "gradients"}, {"shard": "state", "parameters_per_node": "shared"}],
    ids=lambda options: "-".join(options.values()) or "none",
)
def test_no_loop_over_parameters_beyond_torch(ranks: Ranks, options: dict[str, Any]) -> None:
    """None in the package; and all that a rank runs is at most what the plain optimizer does, of which it has a part.

    Tensors are looked up by hash, a line of torch's; so 1 for each parameter may be above, where a rank has all of them.
    """

    def body(comm: Communicator) -> None:
        def wrap(plain: torch.optim.Optimizer) -> torch.optim.Optimizer:
            return DataParallelOptimizer(plain, comm=comm, blocking=True, bucket_mb=8, **options)

        few, many = lines_of_a_step(wrap, FEW), lines_of_a_step(wrap, MANY)
        assert many["heatopt"] == few["heatopt"]
        plain = lines_of_a_step(lambda plain: plain, MANY)["others"] - lines_of_a_step(lambda plain: plain, FEW)["others"]
        assert plain > MANY - FEW  # torch's own loops are seen
        assert many["others"] - few["others"] <= plain

    ranks(body, min_size=2)
