"""Checkpoints: written by all ranks together, atomic, without pickle, loaded at any number of ranks."""

from __future__ import annotations

from heatopt.checkpoint._load import load
from heatopt.checkpoint._sampler import ResumableSampler
from heatopt.checkpoint._save import save

__all__ = ["ResumableSampler", "load", "save"]
