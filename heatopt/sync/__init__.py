"""When and how gradients and parameters meet: hooks, rounds, agreements, broadcasts."""

from __future__ import annotations

from heatopt.sync._broadcast import average_tensors, broadcast_state, broadcast_tensors, start_equal
from heatopt.sync._compression import Compression, Threshold, TopK
from heatopt.sync._coordinator import Coordinator, OwnedOptions, coordinator_of, meet_for
from heatopt.sync._fingerprint import Fingerprint, ParameterPrint, numeric_options, options_hash, printable_options
from heatopt.sync._gradients import GradientSync
from heatopt.sync._graphs import outside_graphs
from heatopt.sync._header import Call, Row
from heatopt.sync._local import Gradients, LocalGradients
from heatopt.sync._residuals import Residuals
from heatopt.sync._settings import SyncSettings
from heatopt.sync._shards import Divide, GradientShards
from heatopt.sync._weights import NO_WEIGHT, Mean, check_weight, mean_of

__all__ = [
    "NO_WEIGHT",
    "Call",
    "Compression",
    "Coordinator",
    "Divide",
    "Fingerprint",
    "GradientShards",
    "GradientSync",
    "Gradients",
    "LocalGradients",
    "Mean",
    "OwnedOptions",
    "ParameterPrint",
    "Residuals",
    "Row",
    "SyncSettings",
    "Threshold",
    "TopK",
    "average_tensors",
    "broadcast_state",
    "broadcast_tensors",
    "check_weight",
    "coordinator_of",
    "mean_of",
    "meet_for",
    "numeric_options",
    "options_hash",
    "outside_graphs",
    "printable_options",
    "start_equal",
]
