"""Programs of several processes under a real launcher, each with a time limit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from tests.support.launch import REPOSITORY, child_environment, launch_command

PROGRAMS = REPOSITORY / "tests" / "launch" / "programs"

Kind = Literal["none", "mpi", "torch", "env"]

_LIMIT = 100.0  # less than a test may take, so that its message is this one


@dataclass(frozen=True)
class Finished:
    """How a launched program ended."""

    returncodes: tuple[int, ...]
    """Of the launcher; where there is none, of each process."""
    stdout: str
    stderr: str
    after_fault: float | None
    """Seconds between the line ``fault`` on stderr, if a program wrote one, and the end of the last process."""

    @property
    def returncode(self) -> int:
        """0 if all went well, else the first exit code that is not."""
        return next((code for code in self.returncodes if code), 0)

    @property
    def text(self) -> str:
        """All output, for messages."""
        return f"exit codes {self.returncodes}\n--- stdout ---\n{self.stdout}\n--- stderr ---\n{self.stderr}"


class _Reader(threading.Thread):
    """Reads one stream to its end, and remembers when a line ``fault`` came."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self.lines: list[str] = []
        self.fault_at: float | None = None
        self._stream = stream
        self.start()

    def run(self) -> None:
        with self._stream as stream:
            for line in stream:
                if line.strip(" \0\n") == "fault":  # mpirun ends its own notices with these
                    self.fault_at = self.fault_at or time.monotonic()
                else:
                    self.lines.append(line)


def launch(
    program: str,
    *arguments: object,
    size: int = 2,
    kind: Kind = "mpi",
    env: Mapping[str, str] | None = None,
    limit: float = _LIMIT,
) -> Finished:
    """Run a program of ``tests/launch/programs`` on ``size`` ranks and wait for its end.

    Args:
        program: Name of the file.
        arguments: Its command line.
        size: Number of ranks.
        kind: Launcher: mpiexec, torchrun, none at all, or "env": nobody but the variables of torch's ``env://``.
        env: Variables beside those of ``scripts/mpi.env``; the tests' own ``HEATOPT_*`` are not handed on.
        limit: Seconds after which all processes are killed and the test fails.

    Raises:
        AssertionError: The program has not ended in time.
    """
    script = [str(PROGRAMS / program), *map(str, arguments)]
    clean = {name: value for name, value in child_environment().items() if not name.startswith("HEATOPT_")}
    path = os.pathsep.join(filter(None, [(env or {}).get("PYTHONPATH"), str(REPOSITORY), clean.get("PYTHONPATH")]))
    clean |= {**(env or {}), "PYTHONPATH": path}
    if kind == "env":
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
        environments = [clean | rendezvous | {"RANK": str(rank)} for rank in range(size)]
        return _run([sys.executable, *script], environments, limit)
    return _run([*launch_command(kind, size), *script], [clean], limit)


def _run(command: Sequence[str], environments: Sequence[Mapping[str, str]], limit: float) -> Finished:
    processes = [
        subprocess.Popen(
            command,
            env=environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for environment in environments
    ]
    outputs = [(_Reader(_pipe(process.stdout)), _Reader(_pipe(process.stderr))) for process in processes]
    deadline = time.monotonic() + limit
    late = False
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            break
    ended = time.monotonic()
    if late:
        for process in processes:
            _kill(process)
    for readers in outputs:
        for reader in readers:
            reader.join(10.0)
    faults = [err.fault_at for _, err in outputs if err.fault_at is not None]
    finished = Finished(
        tuple(process.wait() for process in processes),
        "".join("".join(out.lines) for out, _ in outputs),
        "".join("".join(err.lines) for _, err in outputs),
        ended - min(faults) if faults else None,
    )
    assert not late, f"{' '.join(command)} has not ended after {limit:g} s\n{finished.text}"
    return finished


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _kill(process: subprocess.Popen[str]) -> None:
    """End the launcher, which ends its ranks, and then whatever is left of its session."""
    process.terminate()
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def blocked_module(folder: Path, name: str) -> str:
    """Make a folder for PYTHONPATH in which importing ``name`` fails as if it were not installed."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text(f'raise ModuleNotFoundError("No module named {name!r}", name={name!r})\n')
    return str(folder)
