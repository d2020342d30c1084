"""Wider copies of narrow parameters, which the update changes in their place.

[Note: Master weights]
A bfloat16 parameter has 8 bits: an update of less than 1/256 of it is lost in rounding. With ``master_dtype`` the
update changes a wider copy, its master, by the gradient cast to that dtype, and the parameter is the master rounded.
So moments are of the master's dtype too, and training is that of a model of that dtype whose weights are rounded for
forward and backward alone.

A master is one more entry of the parameter's state: it is divided, gathered, broadcast, copied and saved as any of
them. torch's update must not see it (an empty state is one to be initialised), nor does a state dict show it among
torch's entries: there all masters are one entry beside ``state``.

It is made at the first update with a gradient, from the parameter. Before each later one the parameter is compared with
the rounded master: an element that differs has been written by somebody else since, and its master becomes that value.
Comparing values, and not version counters, sees writes through ``p.data``, and does not depend on the order in which a
model and its optimizer are loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from heatopt.sharding._declaration import NUMBERS
from heatopt.sharding._members import Member, Members

__all__ = ["MASTER", "Masters"]

MASTER = "master_weight"
"""Name of a master among the states of its parameter."""


class Masters:
    """The masters of one optimizer; see [Note: Master weights]. They live in its state.

    Args:
        dtype: theirs.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def has_one(self, parameter: torch.Tensor) -> bool:
        """Whether ``parameter`` is narrower than a master, and so has one."""
        return parameter.is_floating_point() and parameter.dtype.itemsize < self.dtype.itemsize

    def widen_states(self, optimizer: torch.optim.Optimizer) -> None:
        """Give states that were made beside a narrow parameter the dtype that they have beside its master."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if self.has_one(parameter) and parameter in optimizer.state:
                    self._widen(optimizer.state[parameter], group)

    def _widen(self, entries: dict[str, Any], group: Mapping[str, Any]) -> None:
        for key, value in entries.items():
            dtype = torch.float32 if key in NUMBERS else self.dtype
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize < dtype.itemsize:
                entries[key] = value.to(dtype)
                if key == "sum" and "initial_accumulator_value" in group and entries["step"] == 0:
                    entries[key].fill_(group["initial_accumulator_value"])  # Adagrad rounds it at its construction

    def take_places(
        self,
        members: Iterable[Member],
        kept: Mapping[int, torch.Tensor],
        state: Mapping[torch.Tensor, dict[str, Any]],
    ) -> Members:
        """The members in the order of their parameters, with masters in the place of those that have one.

        The masters are taken out of ``state``, to which ``finish`` of each member gives its own back.
        """
        result = []
        for member in sorted(members, key=lambda member: member.piece.index):
            entries = state.get(member.parameter, {})
            master = entries.pop(MASTER, None)
            has_gradient = member.parameter.grad is not None or member.piece.index in kept
            if self.has_one(member.parameter) and (has_gradient or master is not None):
                if master is None:
                    master = member.tensor.detach().to(self.dtype)
                else:
                    master = master.to(member.tensor.device, self.dtype)
                    _follow(master, member.tensor)
                member = _MasterMember(member, master)
            result.append(member)
        return Members(result)


class _MasterMember(Member):
    """Stands for a member of a narrow dtype: the update changes its master."""

    def __init__(self, member: Member, master: torch.Tensor) -> None:
        super().__init__(member.parameter, member.piece, master)
        self._narrow = member

    def take_gradient(self, kept: torch.Tensor | None) -> bool:
        gradient = self._narrow.gradient(kept)
        self.tensor.grad = None if gradient is None else gradient.to(self.tensor.device, self.tensor.dtype)
        return True

    def finish(self, state: Any) -> None:
        self._narrow.tensor.copy_(self.tensor)
        state[self.parameter][MASTER] = self.tensor


def _follow(master: torch.Tensor, narrow: torch.Tensor) -> None:
    """Give ``master`` the elements of ``narrow`` that are not its own, rounded."""
    rounded = master.to(narrow.dtype)
    if narrow.is_cpu and torch.equal(rounded, narrow):  # elsewhere the answer would have to be waited for
        return
    master.copy_(torch.where(rounded == narrow, master, narrow))
