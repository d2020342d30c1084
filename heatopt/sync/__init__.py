"""When and how gradients and parameters meet: hooks, rounds, agreements, broadcasts."""

from __future__ import annotations

from heatopt.sync._broadcast import average_tensors, broadcast_state, broadcast_tensors
from heatopt.sync._coordinator import Call, Row
from heatopt.sync._gradients import make_gradients
from heatopt.sync._graphs import outside_graphs
from heatopt.sync._local import Gradients
from heatopt.sync._settings import SyncSettings

__all__ = [
    "Call",
    "Gradients",
    "Row",
    "SyncSettings",
    "average_tensors",
    "broadcast_state",
    "broadcast_tensors",
    "make_gradients",
    "outside_graphs",
]
