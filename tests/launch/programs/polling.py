"""Under gloo without a launcher: rank 1 dies in the middle of an allreduce that rank 0 polls."""

from __future__ import annotations

import os
import time

import torch

import heatopt


def main() -> None:
    comm = heatopt.world()
    tensor = torch.ones(400_000)
    work = comm.allreduce_async(tensor, "max")  # by owners, in two stages
    if comm.rank == 1:
        os._exit(1)  # after its first stage; the second one never comes
    while not work.done():
        time.sleep(0.01)
    print("completed", tensor.unique().tolist(), flush=True)


if __name__ == "__main__":
    main()
