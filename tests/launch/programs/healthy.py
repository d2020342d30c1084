"""Right from start to end, in all that a program may do. LATE is a rank that ends three seconds after the others.

    healthy.py LATE [default-group]

With ``default-group`` the program has initialised torch.distributed itself, with the ranks in reverse order. Writes one
line per rank on stdout.
"""

from __future__ import annotations

import sys
import time
import warnings

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import heatopt
from heatopt.comm import Communicator


def train(comm: Communicator) -> None:
    torch.manual_seed(comm.rank)
    model = torch.nn.Linear(3, 2)
    optimizer = heatopt.DataParallelOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), model=model)
    data = torch.utils.data.TensorDataset(torch.randn(6 + 2 * comm.rank, 3))
    with optimizer.join():
        for (batch,) in torch.utils.data.DataLoader(data, batch_size=2):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
    weights = comm.all_gather(model.weight)
    assert all(torch.equal(found, weights[0]) for found in weights)


def use_nodes(comm: Communicator) -> tuple[int, ...]:
    within, across = comm.by_node()
    assert (within.size, within.num_nodes) == (comm.node_size, 1)
    assert across.num_nodes == across.size
    assert within.all_gather_object(comm.node_index) == [comm.node_index] * within.size
    nodes = across.all_gather_object(comm.node_index)
    assert nodes == sorted(set(nodes))
    assert across.all_gather_object(comm.node_rank) == [comm.node_rank] * across.size
    total = across.allreduce(within.allreduce(torch.ones(5000)))
    if comm.num_nodes * comm.node_size == comm.size:
        assert (total == comm.size).all()
    return comm.node_index, comm.node_rank, comm.node_size, comm.num_nodes


def catch_exit() -> None:
    try:
        sys.exit(4)
    except SystemExit:
        pass


def main() -> None:
    warnings.simplefilter("error")
    late = int(sys.argv[1])
    user_group = sys.argv[2:] == ["default-group"]
    if user_group:
        store, number, size = next(iter(rendezvous("env://")))
        dist.init_process_group("gloo", store=store, rank=size - 1 - number, world_size=size)
    comm = heatopt.world()
    assert heatopt.world() is comm
    if user_group:
        assert (comm.rank, comm.size) == (dist.get_rank(), dist.get_world_size())
    place = use_nodes(comm)
    train(comm)
    catch_exit()
    works = [comm.allreduce_async(torch.full((20_000,), float(turn))) for turn in range(3)]
    assert [work.wait()[0].item() for work in works] == [0.0, comm.size, 2.0 * comm.size]
    if user_group:
        # The default group stays the user's own.
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == comm.size
        dist.destroy_process_group()
    sys.stdout.write(
        f"rank {comm.rank} of {comm.size} | {type(comm).__name__} | {place}\n"
    )  # in one piece: ranks share the stream
    if comm.rank == late:
        time.sleep(3.0)


if __name__ == "__main__":
    main()
