"""How an average meets what a rank has done since: pure functions of tensors of one dtype and shape."""

from __future__ import annotations

import torch

__all__ = ["keep_progress", "mix", "weigh_stale"]


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
