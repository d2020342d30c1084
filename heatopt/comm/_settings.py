"""Settings that come from the environment, checked once with messages that name the variable."""

from __future__ import annotations

import math
import os

__all__ = [
    "DEFAULT_TIMEOUT",
    "check_timeout",
    "default_timeout",
    "mpi_defaults_wanted",
    "ranks_per_node",
    "ranks_per_node_text",
    "shared_memory_wanted",
]

DEFAULT_TIMEOUT = 600.0


def check_timeout(value: object, name: str = "timeout") -> float:
    """Return ``value`` as seconds; 0 means no time-out (``math.inf``).

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is negative or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, got {value!r} of type {type(value).__name__}")
    seconds = float(value)
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"{name} must be >= 0 seconds (0: no time-out), got {value!r}")
    return seconds if seconds > 0 else math.inf


def default_timeout() -> float:
    """Seconds after which a waiting collective ends the job: ``HEATOPT_TIMEOUT`` or 600."""
    text = os.environ.get("HEATOPT_TIMEOUT")
    if text is None or not text.strip():
        return DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"environment variable HEATOPT_TIMEOUT must be a number of seconds, got {text!r}") from None
    if not seconds >= 0:
        raise ValueError(f"environment variable HEATOPT_TIMEOUT must be >= 0 seconds (0: no time-out), got {text!r}")
    return check_timeout(seconds)


def ranks_per_node() -> int | None:
    """Value of ``HEATOPT_RANKS_PER_NODE``, which overrides the detected grouping of ranks into nodes."""
    text = ranks_per_node_text()
    if not text:
        return None
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"environment variable HEATOPT_RANKS_PER_NODE must be an integer >= 1, got {text!r}")
    return count


def ranks_per_node_text() -> str:
    """The same as it is written; empty if it is not set."""
    return os.environ.get("HEATOPT_RANKS_PER_NODE", "").strip()


def shared_memory_wanted() -> bool:
    """False if ``HEATOPT_SHARED_MEMORY=0`` sends gradients through MPI or gloo within a node too."""
    return _switch("HEATOPT_SHARED_MEMORY")


def mpi_defaults_wanted() -> bool:
    """False if ``HEATOPT_MPI_DEFAULTS=0`` leaves the settings of Open MPI as they are."""
    return _switch("HEATOPT_MPI_DEFAULTS")


def _switch(name: str) -> bool:
    text = os.environ.get(name, "").strip() or "1"
    if text not in ("0", "1"):
        raise ValueError(f"environment variable {name} must be 0 or 1, got {text!r}")
    return text == "1"
