"""A program that ends, well or badly, while works are on their way in the background.

    background.py forgotten    nobody waits for them; the last rank ends three seconds after the others
    background.py missing      the last rank launches none

Writes one line per rank on stdout, from where nothing but the end of the process follows.
"""

from __future__ import annotations

import atexit
import sys
import time

import torch

import heatopt


def main() -> None:
    flats = [torch.full((count,), 1.0) for count in (3, 40_000, 400_000)]
    atexit.register(lambda: sys.stdout.write(f"arrived: {[flat.unique().tolist() for flat in flats]}\n"))  # runs last
    comm = heatopt.world()
    background = comm.background()
    last = comm.rank == comm.size - 1
    if not (last and sys.argv[1] == "missing"):
        for flat in flats:
            background.reduce_async(flat, "sum", "a forgotten average")
    if last and sys.argv[1] == "forgotten":
        time.sleep(3.0)
    sys.stderr.write("fault\n")


if __name__ == "__main__":
    main()
