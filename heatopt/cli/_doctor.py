"""What this machine and this launch give to heatopt, and whether it works.

A finding has a level: a fact, something that costs speed or will surprise, or something that makes results wrong or
training impossible. Rank 0 prints; the others only take part.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import torch

from heatopt._version import __version__
from heatopt.comm import Communicator, ReduceOptions, detect_launch, world

__all__ = ["Finding", "Level", "doctor"]

_BUCKET_BYTES = 8 * 2**20
_REPEATS = 5
_OLDEST_TORCH = (2, 9)


class Level(Enum):
    """How much a finding matters."""

    FACT = "    "
    NOTE = "note"
    FAULT = "FAIL"


class Finding(NamedTuple):
    """One line of the report."""

    level: Level
    subject: str
    text: str


def doctor() -> int:
    """Report on standard output; return 1 if there was a fault, on all ranks. Collective."""
    findings = list(_software())
    try:
        comm = world()
    except (RuntimeError, ValueError) as error:
        _print([*findings, Finding(Level.FAULT, "ranks", str(error))])
        return 1
    findings += _ranks(comm)
    findings += _settings()
    findings += _devices()
    findings += _exchange(comm)
    if comm.rank == 0:
        _print(findings)
    return int(any(finding.level is Level.FAULT for finding in findings))


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.subject) for finding in findings)
    lines = [f"{finding.level.value}  {finding.subject:{width}}  {finding.text}" for finding in findings]
    faults = sum(finding.level is Level.FAULT for finding in findings)
    lines += ["", f"{faults} faults" if faults else "all checks passed"]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _software() -> Iterator[Finding]:
    yield Finding(Level.FACT, "heatopt", f"{__version__}, Python {platform.python_version()}, {platform.system()}")
    number = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if number < _OLDEST_TORCH:
        yield Finding(Level.FAULT, "torch", f"{torch.__version__}; heatopt needs 2.9 or newer: pip install -U torch")
    else:
        yield Finding(Level.FACT, "torch", torch.__version__)
    launcher = shutil.which("mpirun") or shutil.which("mpiexec")
    where = f"mpirun: {launcher}" if launcher else "no mpirun on PATH"
    try:
        yield Finding(Level.FACT, "mpi4py", f"{importlib.metadata.version('mpi4py')}, {where}")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(Level.NOTE, "mpi4py", f"not installed ({where}); for MPI: pip install 'heatopt[openmpi]'")


def _ranks(comm: Communicator) -> Iterator[Finding]:
    launch = detect_launch(os.environ)
    evidence = f" ({launch.evidence})" if launch.evidence else ""
    yield Finding(Level.FACT, "launcher", f"{launch.kind}{evidence}")
    hosts = comm.all_gather_object((comm.node_index, socket.gethostname()))
    nodes = Counter(hosts)
    shown = ", ".join(f"{host}: {count}" for (_, host), count in sorted(nodes.items())[:16])
    more = f", and {len(nodes) - 16} more" if len(nodes) > 16 else ""
    kind = type(comm).__name__
    yield Finding(Level.FACT, "ranks", f"{comm.size} on {comm.num_nodes} node(s), {kind}; ranks by host: {shown}{more}")
    yield Finding(Level.FACT, "time-out", f"{comm.timeout:g} seconds")
    versions = comm.all_gather_object((__version__, torch.__version__, platform.python_version()))
    for rank, found in enumerate(versions):
        if found != versions[0]:
            yield Finding(Level.FAULT, "versions", f"rank {rank} has {found}, rank 0 has {versions[0]}")
    yield from _cores(comm)


def _cores(comm: Communicator) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    text = f"{cores} for this rank, {threads} thread(s) of torch, {comm.node_size} rank(s) on this node"
    total = max(cores, os.cpu_count() or 1)
    if threads * comm.node_size > total:
        advice = (
            f"{threads * comm.node_size} threads for {total} cores: set OMP_NUM_THREADS={total // comm.node_size or 1}"
        )
        yield Finding(Level.NOTE, "cores", f"{text}; {advice}")
    else:
        yield Finding(Level.FACT, "cores", text)


def _settings() -> Iterator[Finding]:
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("HEATOPT_")]
    yield Finding(Level.FACT, "settings", " ".join(found) or "no HEATOPT_ variable is set")


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding(Level.FACT, "GPUs", "none that torch can use")
        return
    names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    yield Finding(Level.FACT, "GPUs", ", ".join(f"{count} x {name}" for name, count in names.items()))


def _exchange(comm: Communicator) -> Iterator[Finding]:
    """A bucket summed as gradients are: whether it is right, where it was, and how long it took."""
    if comm.size == 1:
        yield Finding(Level.FACT, "sums", "one process: nothing is exchanged")
        return
    memory = comm.allocate(_BUCKET_BYTES // 4, torch.float32, torch.device("cpu"))
    seconds = []
    options = ReduceOptions(divisor=1, blocking=True)
    right = True
    for _ in range(_REPEATS):
        memory.own.fill_(comm.rank + 1)
        comm.barrier()
        start = time.perf_counter()
        comm.reduce_bucket(memory, options, "heatopt doctor")
        seconds.append(time.perf_counter() - start)
        right = right and bool((memory.own == comm.size * (comm.size + 1) // 2).all())
    wrong = [rank for rank, fine in enumerate(comm.all_gather_object(right)) if not fine]
    slowest = max(comm.all_gather_object(statistics.median(seconds)))
    text = f"{_BUCKET_BYTES // 2**20} MiB of float32 in {slowest * 1e3:.2f} ms"
    if wrong:
        yield Finding(Level.FAULT, "sums", f"wrong on ranks {wrong}; {text}")
    else:
        yield Finding(Level.FACT, "sums", f"right on all ranks; {text}")
    yield _memory(comm, memory.shared)


def _memory(comm: Communicator, shared: bool) -> Finding:
    if shared:
        return Finding(Level.FACT, "node memory", "gradients meet in memory that the ranks of a node share")
    if comm.num_nodes == comm.size:
        return Finding(Level.FACT, "node memory", "not shared: each node has one rank")
    if os.environ.get("HEATOPT_SHARED_MEMORY") == "0":
        return Finding(Level.NOTE, "node memory", "not shared: HEATOPT_SHARED_MEMORY=0; gradients take the slower way")
    reason = "the system does not let these ranks share memory (see the warning in the log)"
    return Finding(Level.NOTE, "node memory", f"not shared: {reason}; gradients travel through the backend")
