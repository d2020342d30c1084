"""Says which communicator this process has, and what was imported for it."""

from __future__ import annotations

import sys

import heatopt


def main() -> None:
    comm = heatopt.world()
    imported = "imported" if "mpi4py.MPI" in sys.modules else "not imported"
    sys.stdout.write(
        f"rank {comm.rank} of {comm.size} | {type(comm).__name__} | mpi4py {imported} | {comm.timeout:g} s\n"
    )  # in one piece: ranks share the stream


if __name__ == "__main__":
    main()
