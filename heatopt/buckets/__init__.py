"""Where a parameter's gradient lives in a flat buffer: the plan (pure) and the memory. No communication."""

from __future__ import annotations

from heatopt.buckets._bucket import SMALL_BYTES, Bucket, covers_its_memory
from heatopt.buckets._layout import BucketPlan, ParameterSpec, Slot, gradient_dtype, plan_buckets

__all__ = [
    "SMALL_BYTES",
    "Bucket",
    "BucketPlan",
    "ParameterSpec",
    "Slot",
    "covers_its_memory",
    "gradient_dtype",
    "plan_buckets",
]
