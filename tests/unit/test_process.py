"""A neighbour that has ended is noticed, before and after its parent has asked how it ended."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from heatopt.comm._process import Process


def start() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


@pytest.mark.parametrize("how", ["file", "number"])
def test_end_of_a_process(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "number":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    elif not hasattr(os, "pidfd_open"):
        pytest.skip("this Python cannot open processes")
    with start() as child:
        process = Process(child.pid)
        assert not process.has_ended()
        child.communicate(b"\n")
        assert process.has_ended()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this Python cannot open processes")
def test_end_that_nobody_has_asked_for() -> None:
    with start() as child:
        process = Process(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process.has_ended()


def test_oneself_is_there() -> None:
    assert not Process(os.getpid()).has_ended()
