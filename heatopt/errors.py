"""Errors that heatopt raises beside torch's own ``ValueError`` and ``TypeError`` for wrong arguments.

::

    RuntimeError
      HeatoptError
        RankMismatchError        ranks disagree: parameters, settings, or the call that they make
        CollectiveTimeoutError   a collective operation outlasted its time-out
        RankFailedError          a rank failed, died or left while others waited for it
        CheckpointError          a checkpoint is missing, damaged or foreign
          NoCheckpointError      there is none at the path
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CollectiveTimeoutError",
    "HeatoptError",
    "NoCheckpointError",
    "RankFailedError",
    "RankMismatchError",
]


class HeatoptError(RuntimeError):
    """Base class of the errors that are about several ranks working together."""


class RankMismatchError(HeatoptError):
    """Ranks disagree on something that must be equal; raised on every rank that takes part.

    The message names the first rank and the parameter, setting or call that differs.
    """


class CollectiveTimeoutError(HeatoptError):
    """A collective operation waited longer than its time-out; the message names the late ranks."""


class RankFailedError(HeatoptError):
    """A rank failed, died or left the program while this rank waited for it."""


class CheckpointError(HeatoptError):
    """A checkpoint is missing, damaged, truncated or not one of heatopt's."""


class NoCheckpointError(CheckpointError):
    """There is no checkpoint at the path, nor beside it; raised on all ranks. A run that begins may expect it."""
