"""What one rank says to all others before they do anything together; see [Note: Headers]."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from heatopt.sync._weights import NO_WEIGHT

__all__ = ["ALL", "REPLAN", "SPARSE", "TOGETHER", "Call", "Row", "bucket_bit", "describe", "whereabouts"]


class Call(IntEnum):
    """What a rank is in; the values travel in headers."""

    BACKWARD = 1
    STEP = 2
    SYNCHRONIZE = 3
    CLOSURE = 4
    UNSCALE = 5
    JOIN = 6
    CONSTRUCT = 7
    ADD_PARAM_GROUP = 8
    CLIP = 9
    STATE = 10
    MERGE = 11
    EPOCH = 12
    SAVE = 13
    END_SAVE = 14
    LOAD = 15
    PERIOD = 16

    def __str__(self) -> str:
        return _CALL_NAMES[self]


_CALL_NAMES = {
    Call.BACKWARD: "backward()",
    Call.STEP: "step()",
    Call.SYNCHRONIZE: "synchronize()",
    Call.CLOSURE: "step(closure)",
    Call.UNSCALE: "GradScaler.unscale_()",
    Call.JOIN: "the end of join()",
    Call.CONSTRUCT: "the construction of the optimizer (or first use of its copy)",
    Call.ADD_PARAM_GROUP: "add_param_group()",
    Call.CLIP: "clip_grad_norm_()",
    Call.STATE: "state_dict() or another look at sharded states",
    Call.MERGE: "an average of local updates",
    Call.EPOCH: "epoch_loss_logic()",
    Call.SAVE: "save()",
    Call.END_SAVE: "the end of a save() in the background",
    Call.LOAD: "load()",
    Call.PERIOD: "the first period, of another length than at construction",
}

TOGETHER = (Call.SAVE, Call.END_SAVE, Call.LOAD)
"""Calls that serve no other: all ranks are in them, or none is. They belong to no optimizer."""

# What a header's mask asks for: bit b for the buckets whose number is b modulo 61, and two more.
_BUCKET_BITS = 61
SPARSE = 1 << 61
"""Mask bit: average the sparse gradients."""
REPLAN = 1 << 62
"""Mask bit: parameters have come or changed; make a new plan first."""
ALL = SPARSE | (SPARSE - 1)
"""Mask of everything that there is to reduce."""


def bucket_bit(number: int) -> int:
    """Mask bit of a bucket; far buckets share a bit, and are then reduced together."""
    return 1 << (number % _BUCKET_BITS)


class Row(NamedTuple):
    """What one rank announced."""

    call: int
    member: int
    mask: int
    plan: int
    """Digest of the member's fingerprint."""
    options: int
    """Hash of the numeric options of the groups; 0 where the call does not need them to agree."""
    payload: float
    """A number that travels along: the loss in CLOSURE, the overflow flag in UNSCALE."""
    weight: float = NO_WEIGHT
    """Of the member's gradients on this rank; see :attr:`SampleWeights.word`."""

    def words(self) -> npt.NDArray[np.int64]:
        """As it travels."""
        return np.array([*self[:5], *struct.unpack("<2q", struct.pack("<2d", *self[5:]))], dtype=np.int64)

    @classmethod
    def of(cls, words: Sequence[int]) -> Row:
        """The inverse of :meth:`words`."""
        payload, weight = struct.unpack("<2d", struct.pack("<2q", *words[5:]))
        call, member, mask, plan, options = words[:5]
        return cls(call, member, mask, plan, options, payload, weight)


def describe(row: Row) -> str:
    """The call, and whose it is."""
    return str(Call(row.call)) if row.call in TOGETHER else f"{Call(row.call)} of optimizer number {row.member}"


def whereabouts(rows: Sequence[Row]) -> str:
    """Which call ranks are in: the first rank of each."""
    first = {describe(row): rank for rank, row in reversed(list(enumerate(rows)))}
    return ", ".join(f"rank {rank} is in {call}" for call, rank in sorted(first.items(), key=lambda item: item[1]))
