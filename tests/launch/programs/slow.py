"""A right program whose ranks are late, poll, and go on after a disagreement; nobody may be taken for stuck.

Run it with HEATOPT_TIMEOUT=3: ranks then look around after 0.75 s, and at each other's posts after 1 s.
"""

from __future__ import annotations

import sys
import time

import torch

import heatopt
from heatopt.comm import Communicator

LATE = 1.6


def polled(comm: Communicator, twin: Communicator) -> None:
    """Rank 1 completes by polling what rank 0 waits for."""
    work = comm.allreduce_async(torch.ones(50_000, dtype=torch.bfloat16))
    if comm.rank == 0:
        work.wait()
    else:
        time.sleep(LATE)
        while not work.done():
            time.sleep(0.001)
    if comm.rank == 0:
        time.sleep(LATE)
    twin.barrier()


def after_disagreement(comm: Communicator, twin: Communicator) -> None:
    try:
        if comm.rank == 0:
            comm.allreduce(torch.ones(3))
        else:
            comm.barrier()
    except heatopt.RankMismatchError:
        pass
    if comm.rank != 0:
        time.sleep(LATE)
    comm.barrier()
    if comm.rank == 0:
        time.sleep(LATE)
    twin.barrier()


def main() -> None:
    comm = heatopt.world()
    twin = comm.duplicate()
    polled(comm, twin)
    after_disagreement(comm, twin)
    sys.stdout.write(f"rank {comm.rank} has finished\n")  # in one piece: ranks share the stream


if __name__ == "__main__":
    main()
