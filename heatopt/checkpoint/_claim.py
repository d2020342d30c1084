"""The right to save at a path: one save has it at a time, of whatever communicator, process or job."""

from __future__ import annotations

import contextlib
import fcntl
import os

from heatopt._log import logger
from heatopt.errors import CheckpointError

__all__ = ["Claim"]


class Claim:
    """Holds the right to save at ``path`` until it is released, or the process dies.

    A lock (``flock``) of a file beside the checkpoint, which is there as long as the lock is held. A killed process
    leaves the file but no lock, so that the next save takes it over.

    Args:
        path: of the checkpoint; its directory is there.

    Raises:
        CheckpointError: another save has it.
    """

    def __init__(self, path: str) -> None:
        self._path = f"{path}.lock-heatopt"
        self._descriptor: int | None = None
        while self._descriptor is None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if self._lock(descriptor, path):
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def _lock(self, descriptor: int, path: str) -> bool:
        """Lock the open file; False if it has lost its name meanwhile, so that others would lock another one."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another save is writing {path}; wait for it, or save at another path (it holds {self._path})"
            ) from None
        except OSError as error:
            logger.info("%s cannot be locked (%s): nobody notices two saves at one path at a time", self._path, error)
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others save there. Again, it does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            os.unlink(self._path)
        except OSError as error:
            logger.warning("cannot remove %s: %s", self._path, error)
        finally:
            with contextlib.suppress(OSError):
                # Closing alone does not do: a process that was forked meanwhile has the open file, too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            with contextlib.suppress(OSError):
                os.close(descriptor)
