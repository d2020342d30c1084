"""Can MPI read device memory? Found out by a real transfer, in a process of its own, because a "no" is a crash."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

__all__ = ["mpi_reads_cuda_memory"]

# One process sends a device buffer to itself; an MPI that is not CUDA-aware reads the pointer on the host and dies.
_PROBE = """
import torch
from mpi4py import MPI
sent = torch.arange(4096, dtype=torch.float32, device="cuda")
received = torch.zeros_like(sent)
torch.cuda.synchronize()
MPI.COMM_SELF.Sendrecv(sent, 0, recvbuf=received, source=0)
torch.cuda.synchronize()
raise SystemExit(0 if torch.equal(sent, received) else 1)
"""

_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYDRA_", "SLURM_")
# Settings of the transport, as opposed to the identity of this rank.
_KEPT_PREFIXES = ("OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_opal", "OMPI_ALLOW")


def _singleton_environment() -> dict[str, str]:
    """The environment without what would make the probe believe to be this rank."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_KEPT_PREFIXES) or not name.startswith(_LAUNCHER_PREFIXES)
    }


@functools.cache
def mpi_reads_cuda_memory() -> bool:
    """True if a transfer of device memory worked; asked once per process, at the first CUDA tensor."""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=_singleton_environment(),
            capture_output=True,
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0
