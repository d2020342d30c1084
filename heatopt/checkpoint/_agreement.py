"""All ranks go on, or all raise the same error."""

from __future__ import annotations

from heatopt.comm import Communicator
from heatopt.errors import CheckpointError, HeatoptError, NoCheckpointError, RankMismatchError

__all__ = ["describe", "raise_together"]

# Errors of arguments and data, which read the same on all ranks. All others become CheckpointError, with the rank.
_PLAIN: tuple[type[Exception], ...] = (TypeError, ValueError, RankMismatchError, NoCheckpointError, CheckpointError)


def describe(error: Exception | None, rank: int) -> tuple[int, str] | None:
    """An error as it travels: its kind in the list above, and its text."""
    if error is None:
        return None
    for index, kind in enumerate(_PLAIN):
        if type(error) is kind:
            return index, str(error)
    text = str(error) if isinstance(error, HeatoptError) else f"{type(error).__name__}: {error}"
    return len(_PLAIN) - 1, f"rank {rank}: {text}"


def raise_together(comm: Communicator, error: Exception | None, what: str) -> None:
    """Raise the first rank's error on all ranks, if any has one. Collective."""
    found = comm.exchange_objects(describe(error, comm.rank), what)
    first = next((entry for entry in found if entry is not None), None)
    if first is not None:
        raise _PLAIN[first[0]](first[1]) from error
