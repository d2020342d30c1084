"""One rank's failure ends the job: what a process does when its program ends, well or badly."""

from __future__ import annotations

import atexit
import io
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

__all__ = ["end_job_on_exception", "tell_on_exit", "write_last_words"]

_installed = False


def end_job_on_exception(rank: int, end_job: Callable[[str], None]) -> None:
    """Make an uncaught exception end all ranks, after its traceback has been printed. Installed once."""
    global _installed  # the hook belongs to the process, as sys.excepthook does
    if _installed:
        return
    _installed = True
    previous = sys.excepthook
    process = os.getpid()

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        if os.getpid() != process:
            return  # a forked child is no rank
        if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None:
            sys.__stderr__.write(sys.stderr.getvalue())
        end_job(f"rank {rank} failed with {kind.__name__}: {error}; ending the job on all ranks")

    sys.excepthook = excepthook


def write_last_words(message: str) -> None:
    """Print ``message`` on stderr, before the job is ended."""
    sys.stdout.flush()
    # torch.distributed's exception hook collects what is printed meanwhile, for a later that does not come.
    collected = isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None
    stream: TextIO = sys.__stderr__ if collected else sys.stderr  # type: ignore[assignment]
    stream.write(f"heatopt: {message}\n")
    stream.flush()


def tell_on_exit(leave: Callable[[], None]) -> None:
    """Tell the other ranks when this process's program ends, so that none waits for it."""
    process = os.getpid()

    def leave_once() -> None:
        if os.getpid() == process:  # not in a forked child
            leave()

    atexit.register(leave_once)
