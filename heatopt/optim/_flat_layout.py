"""Which parameters of an optimizer are in flat memory, and whether they still are."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch

from heatopt._log import logger
from heatopt.buckets import find_overlaps
from heatopt.optim._flat_kinds import SameKind, kinds_of
from heatopt.optim._flat_memory import Run, can_be_flat, make_spaces

__all__ = ["Layout"]

# Options that decide how a group is updated.
_SWITCHES = ("fused", "foreach", "capturable", "differentiable")


class Layout:
    """The flat memory of an optimizer's parameters and states. Making it moves the parameters.

    Args:
        groups: the optimizer's.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.parameters = _parameters_of(groups)
        """All parameters, in the order of the groups. """
        self.group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
        """Group of each parameter."""
        self._switches = _switches_of(groups)
        excluded = find_overlaps(self.parameters)
        for index, parameter in enumerate(self.parameters):
            group = groups[self.group_of[index]]
            if not can_be_flat(parameter) or group.get("capturable") or group.get("differentiable"):
                excluded.add(index)
        if excluded:
            logger.debug("fuse=True: parameters %s are updated one by one", sorted(excluded))
        self._spaces = make_spaces(groups, excluded)
        places = [(space, position) for space in self._spaces for position in range(len(space.slots))]
        self._places = places
        slots = [space.slots[position] for space, position in places]
        self.indices = [slot.index for slot in slots]
        """Of the parameters in flat memory, in its order: their positions among all."""
        self.flat = [self.parameters[index] for index in self.indices]
        """Of the same: the parameters."""
        self.offsets = [slot.offset * parameter.itemsize for slot, parameter in zip(slots, self.flat, strict=True)]
        """Of the same: the place, in bytes from the start of their space."""
        self.strides = [parameter.stride() for parameter in self.flat]
        """Of the same: the strides."""
        self._addresses = list(map(torch.Tensor.data_ptr, self.flat))
        self._kinds = kinds_of(self.flat)
        self._same_kind = SameKind(self.flat)
        self._values: list[Any] | None = None  # of the states
        self._contents: list[list[object]] = []

    def is_current(self, groups: Sequence[dict[str, Any]]) -> bool:
        """False if somebody has exchanged parameters, their memory or the options that matter here."""
        return (
            _same_objects(_parameters_of(groups), self.parameters)
            and list(map(torch.Tensor.data_ptr, self.flat)) == self._addresses
            and self._have_kept_kind()  # the first part of one, or a view of it, has its address
            and _switches_of(groups) == self._switches
        )

    def _have_kept_kind(self) -> bool:
        if self._same_kind(self.flat):
            return True
        if kinds_of(self.flat) != self._kinds:
            return False
        self._same_kind = SameKind(self.flat)  # another thing has changed, such as requires_grad
        return True

    def attach_states(self, state: Mapping[Any, Any]) -> bool:
        """Move into flat memory what of ``state`` is not there; return False if there was something."""
        if self._values is None or not _same_objects(_values_of(state), self._values):
            for space in self._spaces:
                space.attach_states(state)
            self._values = _values_of(state)
            return False
        return self._contents == [space.contents() for space in self._spaces]

    def forget_states(self) -> None:
        """States have come that are not in flat memory: the next step moves all of them anew."""
        self._values = None

    def remember_contents(self) -> None:
        """What has been written into states until now is known."""
        self._contents = [space.contents() for space in self._spaces]

    def odd(self) -> set[int]:
        """Places of the parameters whose states cannot be flat."""
        return {place for place, (space, position) in enumerate(self._places) if position in space.odd}

    def situations(self) -> list[Hashable]:
        """By place: what must be equal for neighbours to be updated as one."""
        return [(number, situation) for number, space in enumerate(self._spaces) for situation in space.situations()]

    def run(self, first: int, last: int) -> Run:
        """The run from one place to another of the same space."""
        (space, start), (_, end) = self._places[first], self._places[last]
        return Run(space, start, end + 1)


def _parameters_of(groups: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    return list(chain.from_iterable(map(itemgetter("params"), groups)))


def _same_objects(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(found) == len(expected) and all(map(is_, found, expected))


def _switches_of(groups: Sequence[dict[str, Any]]) -> list[Any]:
    return [(len(group["params"]), *(group.get(key) for key in _SWITCHES)) for group in groups]


def _values_of(state: Mapping[Any, Any]) -> list[Any]:
    """All values of all parameters' states."""
    try:
        return list(chain.from_iterable(map(dict.values, state.values())))
    except TypeError:  # an entry that belongs to no parameter
        return [value for entry in state.values() if isinstance(entry, dict) for value in entry.values()]
