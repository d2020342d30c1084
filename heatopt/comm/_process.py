"""Is another process of this machine still there?"""

from __future__ import annotations

import os

__all__ = ["Process", "numbering"]


def numbering() -> tuple[str, str] | None:
    """What two processes have in common if a number means the same process to both; None if that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


class Process:
    """A process that runs now, and that is recognised when it has ended, whoever gets its number afterwards.

    It holds no descriptor: a node may have many ranks, each with an eye on all others.

    Args:
        number: of a process that this one can see.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        try:
            self._began = _began(number)
        except OSError:
            self._began = None  # the system does not tell

    def has_ended(self) -> bool:
        """True also before its parent has asked how it ended."""
        try:
            if self._began is not None:
                return _began(self._number) != self._began
            os.kill(self._number, 0)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            pass  # it is there, but not ours; or there is no descriptor left to look at it
        return False


def _began(number: int) -> bytes | None:
    """When a process began, in the system's count; None if it has ended and its parent has not asked yet."""
    with open(f"/proc/{number}/stat", "rb") as file:
        words = file.read().rpartition(b")")[2].split()  # its name may hold spaces, and parentheses
    return None if words[0] in (b"Z", b"X") else words[19]
