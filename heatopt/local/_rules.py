"""How an average meets what a rank has done since: pure functions of tensors of one dtype and shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["keep_progress", "mix", "weigh_stale", "weight_of"]


def mix(center: torch.Tensor, now: torch.Tensor, share: float) -> torch.Tensor:
    """``(1 - share) center + share now``; exactly ``center`` for share 0."""
    return center if share == 0 else center + (now - center) * share


def keep_progress(center: torch.Tensor, now: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
    """``center + (now - sent)``: what was done since the sending is added in full."""
    return center + (now - sent)


def weigh_stale(total: torch.Tensor, now: torch.Tensor, delay: int, count: int) -> torch.Tensor:
    """DASO's merge: ``(2 S now + total) / (2 S + P)``; with S = 0 ``(now + total) / (1 + P)``.

    Args:
        total: sum of the values that ``count`` (P) nodes sent ``delay`` (S) updates ago.
        now: this rank's values.
        delay: S.
        count: P.
    """
    weight = 2.0 * delay if delay else 1.0
    return (now * weight + total) / (weight + count)


def weight_of(payloads: Sequence[float], rank: int) -> float:
    """How much ``rank`` counts in a mean, on average 1: those with a payload of 1 count for nothing, unless all do."""
    counted = sum(payload < 1 for payload in payloads)
    return 1.0 if counted in (0, len(payloads)) else len(payloads) / counted * (payloads[rank] < 1)
