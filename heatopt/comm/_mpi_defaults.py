"""Settings of Open MPI that fit what this package does, given before MPI starts and only where the user set nothing.

Open MPI reads them from the environment; other MPIs ignore them. docs/environment.md says what each is for.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from heatopt.comm._settings import mpi_defaults_wanted

__all__ = ["MPI_DEFAULTS", "set_mpi_defaults"]

MPI_DEFAULTS = (
    ("mpi_yield_when_idle", "1"),
    ("coll", "^han"),
    ("coll_libnbc_iallreduce_algorithm", "1"),
    ("btl_tcp_links", "4"),
)


def set_mpi_defaults(environ: MutableMapping[str, str], home: Path | None = None) -> list[str]:
    """Add the settings to ``environ``, unless they, or the user's own file of settings, are there already.

    Args:
        environ: the environment, where ``mpirun --mca`` puts what it is given as well.
        home: the user's folder, with Open MPI's ``.openmpi/mca-params.conf``; default: that of this process's user.

    Returns:
        The variables that were set.
    """
    if not mpi_defaults_wanted():
        return []
    if home is None:
        home = Path(os.path.expanduser("~"))  # not Path.home(), which fails for a user without one, as in containers
    known = _names_in(home / ".openmpi" / "mca-params.conf")
    added = []
    for name, value in MPI_DEFAULTS:
        variable = f"OMPI_MCA_{name}"
        if variable not in environ and name not in known:
            environ[variable] = value
            added.append(variable)
    return added


def _names_in(path: Path) -> set[str]:
    """Parameters that a file of ``name = value`` lines sets."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {line.split("=")[0].strip() for line in lines if "=" in line and not line.lstrip().startswith("#")}
