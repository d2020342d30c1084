"""Opens worlds one after the other, and looks at what is left of each: threads, descriptors, memory.

What MPI or torch.distributed has opened for the user is there before. The first world is closed, the parent before its
groups; the second one becomes garbage; the third one is closed by a finalizer. A late rank
gives the watchdogs time to meet what was posted in an earlier world.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref

import torch
import torch.distributed as dist

import heatopt
from heatopt.comm import Communicator

LATE = 1.6
WATCH = "heatopt-watchdog"


def start() -> type[Communicator]:
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        from mpi4py import MPI

        MPI.COMM_WORLD.Dup().Alltoall(torch.ones(1000).numpy(), torch.ones(1000).numpy())
        return heatopt.comm.MPICommunicator  # type: ignore[no-any-return]
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1000))
    return heatopt.comm.TorchCommunicator  # type: ignore[no-any-return]


def possessions() -> tuple[set[str], list[str]]:
    files = "/proc/self/fd"
    held = set()
    for number in os.listdir(files):
        try:
            held.add(f"{number} {os.readlink(f'{files}/{number}')}")
        except OSError:
            pass  # the one that lists
    with open("/proc/self/maps") as maps:
        held |= {line for line in maps if "memfd:heatopt" in line}
    return held, sorted(thread.name for thread in threading.enumerate())


def use(comm: Communicator, late: float = 0.0) -> None:
    """Also as optimizers do: with memory of the node, and groups of their own."""
    layer = torch.nn.Linear(300, 2)
    optimizer = heatopt.DataParallelOptimizer(torch.optim.Adam(layer.parameters()), comm=comm, shard="state")
    layer(torch.ones(2, 300)).sum().backward()
    optimizer.step()
    if comm.rank == 1:
        time.sleep(late)
    comm.barrier()
    assert WATCH in possessions()[1]


def expect(before: tuple[set[str], list[str]]) -> None:
    """After a look of the watchdog, if nobody has closed."""
    for _ in range(100):
        gc.collect()
        held, threads = possessions()
        if (held <= before[0]) and threads == before[1]:
            return
        time.sleep(0.1)
    raise AssertionError(f"left: {held - before[0]}, {threads}")


def main() -> None:
    opened = start()
    torch.optim.Adam([torch.ones(1)])  # imports what it needs
    before = possessions()

    comm = opened()
    groups = [comm.split(0), *comm.by_node(), comm.duplicate(), comm.background()]
    for group in [comm, *groups[:2]]:
        use(group)
    work = groups[-1].allreduce_async(torch.ones(50_000))
    comm.close()
    for group in groups:
        assert WATCH in possessions()[1]
        group.close()
    assert threading.active_count() == len(before[1])
    assert work.wait().mean() == groups[-1].size
    comm.close()
    del comm, groups, group, work
    expect(before)

    comm = opened()
    twin = comm.duplicate()
    use(comm, LATE)
    del comm
    use(twin)
    del twin
    expect(before)

    comm = opened()
    use(comm)
    owner = threading.Event()  # any object
    weakref.finalize(owner, comm.close)
    del owner
    assert threading.active_count() == len(before[1])
    del comm
    expect(before)

    sys.stdout.write(f"rank {os.environ.get('RANK', os.environ.get('OMPI_COMM_WORLD_RANK'))} has finished\n")
    if "OMPI_COMM_WORLD_RANK" not in os.environ:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
