"""Is another process of this machine still there?"""

from __future__ import annotations

import os
import select
import weakref

__all__ = ["Process"]


class Process:
    """A process that runs now, and that is recognised when it has ended, whoever gets its number afterwards.

    Args:
        number: of a process that this one can see.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._file: int | None = None
        try:
            self._file = os.pidfd_open(number)
        except (AttributeError, OSError):
            return  # an older system, or one that allows it not
        weakref.finalize(self, os.close, self._file)

    def has_ended(self) -> bool:
        """True also before its parent has asked how it ended."""
        if self._file is not None:
            poll = select.poll()
            poll.register(self._file, select.POLLIN)
            return bool(poll.poll(0))
        try:
            os.kill(self._number, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # it is there, but not ours
        return False
