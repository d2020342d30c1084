"""An average over the replicas on its way."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from heatopt.comm import Handle
from heatopt.local._outer import Outer
from heatopt.local._packing import Packed, weighed
from heatopt.local._replicas import Replicas
from heatopt.local._rules import keep_progress, mix, weigh_stale
from heatopt.local._schedule import Send
from heatopt.local._settings import LocalSettings

__all__ = ["DelayedAverage", "Kind", "Parcel", "kind_of"]


class Kind(str, Enum):
    """What travels."""

    MEAN = "mean"
    """The values; their mean."""
    TOTAL = "total"
    """The values; their sum over replicas, each counted once."""
    DELTA = "delta"
    """Differences from the anchor; their mean."""


def kind_of(action: Send, settings: LocalSettings, outer: Outer | None) -> Kind:
    """What is to be sent."""
    if settings.merge == "daso" and action.delay:
        return Kind.TOTAL
    if action.full or outer is None or (outer.is_average and settings.wire_dtype is None):
        return Kind.MEAN
    return Kind.DELTA


@dataclass(frozen=True)
class Parcel:
    """What is sent, and what a merge must know of it."""

    fragment: int
    kind: Kind
    indices: tuple[int, ...]
    """Of the parameters."""
    delay: int
    due: int
    """Number of the update after which it is merged."""
    turn: int
    """Number of the average, which chooses the delegates."""
    count: int
    """Number of replicas."""
    sent: tuple[torch.Tensor, ...] | None
    """The parameters when they were sent, where the merge needs them."""

    def merged(self, place: int, center: torch.Tensor, now: torch.Tensor, share: float) -> torch.Tensor:
        """What becomes of a parameter, at least in single precision.

        Args:
            place: the parameter's in ``indices``.
            center: what has arrived.
            now: its present value.
            share: of that, where some of it is kept.
        """
        wide = torch.promote_types(now.dtype, torch.float32)
        center, now = center.to(wide), now.to(wide)
        if self.kind is Kind.TOTAL:
            return weigh_stale(center, now, self.delay, self.count)
        if self.delay == 0:
            return center
        return mix(center, now, share) if self.sent is None else keep_progress(center, now, self.sent[place].to(wide))


class DelayedAverage:
    """Owns the buffers of one average until it has been waited for."""

    def __init__(self, parcel: Parcel, packed: Packed | None, replicas: Replicas | None) -> None:
        self.parcel = parcel
        self._packed = packed
        self._replicas = replicas
        self._works: list[Handle[None]] = []
        self._result: list[torch.Tensor] | None = None

    @classmethod
    def begin(
        cls, parcel: Parcel, tensors: list[torch.Tensor], replicas: Replicas, chunk: int, weight: float | None = None
    ) -> DelayedAverage:
        """Send ``tensors``; with a delay of 0 the result is there when this returns. Collective.

        Args:
            parcel: what they are.
            tensors: on this rank.
            replicas: who averages.
            chunk: most elements of one message.
            weight: of this replica in a mean, on average 1; None: all count alike.
        """
        packed = Packed(tensors if parcel.kind is Kind.TOTAL else weighed(tensors, weight), chunk)
        average = cls(parcel, packed, replicas)
        op = "sum" if parcel.kind is Kind.TOTAL else "mean"
        group = replicas.background(parcel.turn) if parcel.delay else replicas.group(parcel.turn)
        if group is None:
            return average
        for part in packed.chunks:
            if parcel.delay:
                average._works.append(group.reduce_async(part, op, f"delayed average number {parcel.turn}"))
            else:
                group.reduce_now(part, op, f"average number {parcel.turn}")
        return average

    def wait(self) -> list[torch.Tensor]:
        """The result for each index. Collective in the replica at the first call."""
        if self._result is None:
            assert self._packed is not None
            assert self._replicas is not None
            for work in self._works:
                work.wait()
            self._works = []
            self._replicas.spread(self._packed, self.parcel.turn)
            self._result = self._packed.unpack()
        return self._result

    def state_dict(self) -> dict[str, Any]:
        """Everything that a merge needs, as plain objects and tensors."""
        parcel = self.parcel
        return {
            "fragment": parcel.fragment,
            "kind": parcel.kind.value,
            "indices": list(parcel.indices),
            "delay": parcel.delay,
            "due": parcel.due,
            "turn": parcel.turn,
            "count": parcel.count,
            "sent": None if parcel.sent is None else [tensor.clone() for tensor in parcel.sent],
            "result": [tensor.clone() for tensor in self.wait()],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], parameters: list[torch.Tensor]) -> DelayedAverage:
        """The inverse of :meth:`state_dict`: an average that has arrived."""
        devices = [parameters[index].device for index in state["indices"]]

        def restored(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return [t.detach().to(device, copy=True) for t, device in zip(tensors, devices, strict=True)]

        parcel = Parcel(
            state["fragment"],
            Kind(state["kind"]),
            tuple(state["indices"]),
            state["delay"],
            state["due"],
            state["turn"],
            state["count"],
            None if state["sent"] is None else tuple(restored(state["sent"])),
        )
        average = cls(parcel, None, None)
        average._result = restored(state["result"])
        return average
