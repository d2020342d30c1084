"""Under mpirun: a torch.distributed communicator that finds its ranks through MPI, without environment variables.

    bootstrap.py LATE

LATE is a rank that ends two seconds after the others.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
from mpi4py import MPI

import heatopt
from heatopt.comm import Communicator, MPICommunicator, TorchCommunicator, rendezvous_store


def train(comm: Communicator) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, comm=comm)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.full((2, 3), float(comm.rank + step))).square().mean().backward()
        optimizer.step()
    return model.weight.detach()


def main() -> None:
    assert not any(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    world = heatopt.world()
    assert isinstance(world, MPICommunicator)
    comm = TorchCommunicator(rendezvous_store(world), world.rank, world.size)
    total = world.size * (world.size + 1) / 2
    for dtype in (torch.float32, torch.bfloat16):
        assert (comm.allreduce(torch.full((9000,), world.rank + 1.0, dtype=dtype)) == total).all()
    assert comm.by_node().within.all_gather_object(world.rank) == list(range(world.size))
    # The same bits whatever carries them.
    assert torch.equal(train(comm), train(world))
    # A second one, and the user's own default group, from stores of their own.
    second = TorchCommunicator(rendezvous_store(world), world.rank, world.size)
    assert second.all_gather_object(world.rank) == list(range(world.size))
    dist.init_process_group("gloo", store=rendezvous_store(world), rank=world.rank, world_size=world.size)
    ones = torch.ones(1)
    dist.all_reduce(ones)
    assert ones.item() == world.size
    dist.destroy_process_group()
    # Part of the processes, through a communicator of mpi4py's.
    pair = MPICommunicator(MPI.COMM_WORLD.Split(world.rank // 2, world.rank), timeout=30.0)
    assert pair.timeout == 30.0
    assert pair.all_gather_object(world.rank) == [r for r in range(world.size) if r // 2 == world.rank // 2]
    world.barrier()
    sys.stdout.write(f"rank {world.rank} has finished\n")  # in one piece: ranks share the stream
    if world.rank == int(sys.argv[1]):
        time.sleep(2.0)


if __name__ == "__main__":
    main()
