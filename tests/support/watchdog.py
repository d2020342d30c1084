"""No test session hangs: after a time limit the stacks of all ranks are printed and the job ends."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

TIMED_OUT = 124
"""Exit code of a job that was stopped because it took too long, as coreutils' timeout has it."""

_STACK_SIGNAL = signal.SIGUSR2
_LOOK_SECONDS = 0.1
_COLLECT_SECONDS = 5.0
# The time in which a rank's own thread leaves its stacks. Then a signal asks: its handler does not wait for the
# interpreter's lock, so it also reaches a rank that holds the lock, but reads stacks that may change meanwhile.
_ANSWER_SECONDS = 1.5
# For a rank that holds the interpreter's lock and so stops the watching thread too.
_LAST_RESORT_SECONDS = 15.0
_PYTEST_FRAME = re.compile(r'  File "(.*/(_pytest|pluggy|pytest|tests/support)/|.*/runpy\.py"|<frozen runpy>)')
# The main thread comes last; its outermost frame is that of the program.
_LAST_LINE = re.compile(r"( in <module>| in _run_module_as_main|  \.\.\.)\n*\Z")
_WATCHING = re.compile(r'/tests/support/watchdog\.py", line \d+ in _watch$', re.MULTILINE)


class Watchdog:
    """Watches the time of one rank from a thread, and ends the job with everybody's stacks.

    Args:
        rank: This rank.
        abort: Ends all ranks with an exit code; called from any thread.
        stderr: The terminal, past pytest's capture.
    """

    def __init__(self, rank: int, abort: Callable[[int], None], stderr: TextIO) -> None:
        self.rank = rank
        self._folder = Path()
        self._abort = abort
        self._stderr = stderr
        self._peers: list[tuple[str, int]] = []
        self._stacks: TextIO = tempfile.TemporaryFile("w+")
        self._task: tuple[str, float, float] | None = None
        self._once = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="test-watchdog", daemon=True)
        self._thread.start()

    def connect(self, peers: list[tuple[str, int]], folder: Path) -> None:
        """Learn the (host, process) of each rank and answer their calls for stacks, which are left in ``folder``."""
        self._folder = folder
        self._stacks.close()
        self._stacks = self._path(self.rank).open("w+")
        faulthandler.register(_STACK_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        self._peers = peers

    def start(self, task: str, seconds: float) -> None:
        """From now on ``task`` has ``seconds``; 0 for no limit."""
        if not seconds:
            self._task = None
            return
        self._task = (task, time.monotonic() + seconds, seconds)
        faulthandler.dump_traceback_later(seconds + _LAST_RESORT_SECONDS, exit=True, file=self._stderr)

    def end(self) -> None:
        """The task is done."""
        self._task = None
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Watch no longer."""
        self.end()
        self._stop.set()
        self._thread.join()
        if self._peers:
            faulthandler.unregister(_STACK_SIGNAL)
        self._stacks.close()

    def end_job(self, text: str, code: int) -> None:
        """Print ``text`` and the stacks of all ranks, then end the job with ``code``.

        One rank, the first to call, does so for all; the others wait for their end.
        """
        if self._once.acquire(blocking=False):
            if self._is_first():
                self._print(text)
                try:
                    self._print(self._all_stacks())
                except OSError as error:  # the job has to end all the same
                    self._print(f"--- the stacks are lost: {error} ---")
                self._print(f"=== the test session ends here, on all ranks, with exit code {code} ===")
                time.sleep(0.3)  # let the launcher pass the text on
                self._abort(code)
            else:
                time.sleep(2 * _COLLECT_SECONDS)
        else:
            time.sleep(3 * _COLLECT_SECONDS)
        os._exit(code)

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            task = self._task
            if task is not None and time.monotonic() > task[1]:
                self.end_job(f"=== rank {self.rank}: more than {task[2]:g} s in {task[0]} ===", TIMED_OUT)
            if self._peers and self._flag().exists():
                self._follow()

    def _follow(self) -> None:
        """Another rank ends the job: leave the stacks for it, then leave."""
        with self._once:  # unless this rank is the one
            faulthandler.dump_traceback(file=self._stacks, all_threads=True)
            time.sleep(3 * _COLLECT_SECONDS)
            os._exit(TIMED_OUT)

    def _flag(self) -> Path:
        return self._folder / "ending"

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.stacks"

    def _is_first(self) -> bool:
        if not self._peers:
            return True
        try:
            self._flag().touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # the folder has gone, but the job has to end
            pass
        return True

    def _all_stacks(self) -> str:
        """The stacks of all ranks in the order of the ranks, of those that answer in time (the flag asks them)."""
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        if not self._peers:
            self._stacks.seek(0)
            return _without_pytest(self._stacks.read())
        texts = self._read_stacks(_ANSWER_SECONDS)
        for text, (host, process) in zip(texts, self._peers, strict=True):
            if not text and host == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, _STACK_SIGNAL)
        if not all(texts):
            texts = self._read_stacks(_COLLECT_SECONDS)
        nothing = "(none: the process has ended, is on another host, or does not answer)"
        return "\n".join(
            f"--- stacks of rank {rank} ---\n{_without_pytest(text) if text else nothing}"
            for rank, text in enumerate(texts)
        )

    def _read_stacks(self, seconds: float) -> list[str]:
        """What each rank has left, once all have done so or the time is over."""
        paths = [self._path(rank) for rank in range(len(self._peers))]
        deadline = time.monotonic() + seconds
        while True:
            texts = [path.read_text() if path.exists() else "" for path in paths]
            if all(_LAST_LINE.search(text) for text in texts) or time.monotonic() > deadline:
                return texts
            time.sleep(_LOOK_SECONDS)

    def _print(self, text: str) -> None:
        self._stderr.write(f"\n{text}\n")
        self._stderr.flush()


def _without_pytest(stacks: str) -> str:
    """``stacks`` without pytest's frames, those of this package, and the thread that watches."""
    threads = re.split(r"\n+(?=Thread |Current thread )", stacks.strip())
    texts = []
    for thread in threads:
        lines = [line for line in thread.splitlines() if not _PYTEST_FRAME.match(line)]
        if not _WATCHING.search(thread):
            texts.append("\n".join(lines if len(lines) > 1 else [*lines, "  (not in a test: waits for the others)"]))
    return "\n".join(texts)
