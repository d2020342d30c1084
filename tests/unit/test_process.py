"""A neighbour that has ended is noticed, before and after its parent has asked how it ended."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from heatopt.comm import _process
from heatopt.comm._process import Process, numbering


def start() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell of processes")


@pytest.mark.parametrize("told", [True, False])
def test_end_of_a_process(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not told:
        monkeypatch.setattr(_process, "_began", no_descriptor_left)
    with start() as child:
        process = Process(child.pid)
        assert not process.has_ended()
        child.communicate(b"\n")
        assert process.has_ended()


def no_descriptor_left(number: int) -> NoReturn:
    raise OSError(errno.EMFILE, "too many open files")


@needs_proc
def test_end_that_nobody_has_asked_for() -> None:
    with start() as child:
        process = Process(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process.has_ended()


@needs_proc
def test_another_process_of_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(os.getpid())
    monkeypatch.setattr(_process, "_began", lambda number: b"later")
    assert process.has_ended()


@needs_proc
def test_what_cannot_be_looked_at_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(os.getpid())
    monkeypatch.setattr(_process, "_began", no_descriptor_left)
    assert not process.has_ended()


@needs_proc
def test_numbers_mean_the_same_in_a_child() -> None:
    program = "from heatopt.comm._process import numbering; print(numbering())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert numbering() is not None
    assert found.stdout == f"{numbering()}\n"


def test_oneself_is_there() -> None:
    assert not Process(os.getpid()).has_ended()
