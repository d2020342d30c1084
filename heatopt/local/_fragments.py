"""Which parameter is in which fragment. Pure."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["cut"]


def cut(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Cut neighbouring parameters into ``count`` fragments of about equal size, none without a parameter.

    Args:
        sizes: number of elements of each parameter.
        count: at most the number of parameters.

    Returns:
        The indices of each fragment.
    """
    fragments: list[list[int]] = [[] for _ in range(count)]
    total, before, current = sum(sizes), 0, 0
    for index, size in enumerate(sizes):
        full = count * (2 * before + size) >= 2 * total * (current + 1)  # its middle lies beyond the cut
        needed = len(sizes) - index <= count - current - 1
        if fragments[current] and current < count - 1 and (full or needed):
            current += 1
        fragments[current].append(index)
        before += size
    return fragments
