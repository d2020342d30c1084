"""The local-update engine: pure schedules and merge rules, delayed averages, and what carries them out."""

from __future__ import annotations

from heatopt.local._cycle import Cycle, DasoPeriods, DetectMetricPlateau, Phase
from heatopt.local._engine import LocalEngine
from heatopt.local._outer import CO2Momentum, OuterFactory, SlowMomentum, made_by
from heatopt.local._resume import check_state
from heatopt.local._samples import PLAIN
from heatopt.local._schedule import PeriodicSchedule, SyncPlan
from heatopt.local._settings import LocalSettings
from heatopt.local._subject import PERIOD, Subject

__all__ = [
    "PERIOD",
    "PLAIN",
    "CO2Momentum",
    "Cycle",
    "DasoPeriods",
    "DetectMetricPlateau",
    "LocalEngine",
    "LocalSettings",
    "OuterFactory",
    "PeriodicSchedule",
    "Phase",
    "SlowMomentum",
    "Subject",
    "SyncPlan",
    "check_state",
    "made_by",
]
