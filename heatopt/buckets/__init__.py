"""Where a parameter's gradient lives in a flat buffer: the plan (pure) and the memory. No communication."""

from __future__ import annotations

from heatopt.buckets._bucket import SMALL_BYTES, Bucket, GradientBucket, covers_its_memory, find_overlaps
from heatopt.buckets._layout import BucketPlan, ParameterSpec, Piece, Slot, gradient_dtype, plan_buckets
from heatopt.buckets._scattered import RowPlan, ScatteredBucket, plan_rows

__all__ = [
    "SMALL_BYTES",
    "Bucket",
    "BucketPlan",
    "GradientBucket",
    "ParameterSpec",
    "Piece",
    "RowPlan",
    "ScatteredBucket",
    "Slot",
    "covers_its_memory",
    "find_overlaps",
    "gradient_dtype",
    "plan_buckets",
    "plan_rows",
]
