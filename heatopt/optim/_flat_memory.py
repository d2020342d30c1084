"""Parameters and optimizer states that lie one after the other in flat memory."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heatopt.buckets import ParameterSpec, Slot, covers_its_memory, plan_buckets

__all__ = ["LARGE", "Run", "Space", "can_be_flat", "make_spaces"]

LARGE = 2**16
"""Parameters of so many elements are updated by themselves: there is nothing to win, and a copy to lose."""

# States that are one number per parameter, whatever its shape; all others are as the parameter is.
_NUMBERS = ("step", "mu_product", "eta", "mu")
_Kind = tuple[str, torch.dtype, torch.device]


@dataclass(frozen=True)
class Run:
    """Neighbours in flat memory that are updated as one tensor."""

    space: Space
    first: int
    """Position in the space."""
    end: int
    """Position after the last."""

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """The members."""
        return self.space.parameters[self.first : self.end]

    @property
    def elements(self) -> slice:
        """The parameters with the gap after each of them, or a large parameter without it.

        A kernel's last, incomplete vector may round differently. With the gaps, it never has an element of a small
        parameter, and so results do not depend on which neighbours are updated together.
        """
        slots = self.space.slots
        first = slots[self.first]
        if first.numel >= LARGE:
            return slice(first.offset, first.offset + first.numel)
        end = slots[self.end].offset if self.end < len(slots) else self.space.memory.numel()
        return slice(first.offset, end)

    def gaps(self) -> list[int]:
        """Number of elements after each member."""
        slots = self.space.slots[self.first : self.end]
        ends = [*(slot.offset for slot in slots[1:]), self.elements.stop]
        return [end - slot.offset - slot.numel for slot, end in zip(slots, ends, strict=True)]

    def views_of(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The members' parts of a tensor that is as large as the run."""
        return self.space.views_of(tensor, self.first, self.end)


class Space:
    """The flat memory of the parameters of one group, device and dtype.

    Args:
        group: number of the parameter group.
        slots: where each parameter lies; ``index`` is its position among all parameters of the optimizer.
        parameters: the parameter of each slot.
        numel: elements of the memory.
    """

    def __init__(self, group: int, slots: Sequence[Slot], parameters: Sequence[torch.Tensor], numel: int) -> None:
        self.group = group
        self.slots = tuple(slots)
        self.parameters = tuple(parameters)
        self.shapes = [(tuple(p.shape), p.stride()) for p in parameters]
        self.memory = parameters[0].detach().new_zeros(numel)
        self.odd: set[int] = set()
        """Positions whose state cannot be flat."""
        self._states: dict[str, torch.Tensor] = {}
        self._numbers: dict[_Kind, torch.Tensor] = {}
        self._names: list[tuple[str, ...]] = []
        self._kinds: list[tuple[_Kind, ...]] = []
        views = self.views_of(self.memory)
        torch._foreach_copy_(views, [p.detach() for p in parameters])
        for parameter, view in zip(parameters, views, strict=True):
            parameter.data = view

    def views_of(self, memory: torch.Tensor, first: int = 0, end: int | None = None) -> list[torch.Tensor]:
        """Each parameter's part of ``memory``, which starts where the slot ``first`` does."""
        start = memory.storage_offset() - self.slots[first].offset
        return [
            memory.as_strided(*shape, start + slot.offset)
            for slot, shape in zip(self.slots[first:end], self.shapes[first:end], strict=True)
        ]

    # States

    def attach_states(self, state: Mapping[torch.Tensor, dict[str, Any]]) -> None:
        """Move the states of all parameters into new flat memory, and make the entries of ``state`` views of it.

        The memory is new, because somebody may keep the tensors that were the states so far.
        """
        self.odd = set()
        self._states, self._numbers = {}, {}
        self._names = [()] * len(self.slots)
        self._kinds = [()] * len(self.slots)
        for position, parameter in enumerate(self.parameters):
            own = state.get(parameter)
            if not own:
                continue
            if not all(_fits(key, value, parameter) for key, value in own.items()):
                self.odd.add(position)
                continue
            given = {key: value for key, value in own.items() if value is not None}
            self._names[position] = tuple(key for key in given if key not in _NUMBERS)
            self._kinds[position] = tuple((k, v.dtype, v.device) for k, v in given.items() if k in _NUMBERS)
            for key, value in given.items():
                own[key] = self._place(key, value, position).copy_(value)

    def _place(self, key: str, value: torch.Tensor, position: int) -> torch.Tensor:
        if key in _NUMBERS:
            kind = (key, value.dtype, value.device)
            if kind not in self._numbers:
                self._numbers[kind] = value.new_zeros(len(self.slots))
            return self._numbers[kind][position]
        if key not in self._states:
            self._states[key] = torch.zeros_like(self.memory)
        return self._states[key].as_strided(*self.shapes[position], self.slots[position].offset)

    def contents(self) -> list[object]:
        """Changes whenever somebody writes into one of the numbers."""
        # A GPU is not waited for: there, writing through .data is not seen.
        return [
            numbers.view(torch.uint8).numpy().tobytes() if numbers.is_cpu else numbers._version
            for numbers in self._numbers.values()
        ]

    def situations(self) -> list[Hashable]:
        """What must be equal for parameters to be updated as one: the names of their states, and their numbers."""
        table = {kind: numbers.tolist() for kind, numbers in self._numbers.items()}
        return [
            (names, tuple((kind, table[kind][position]) for kind in kinds))
            for position, (names, kinds) in enumerate(zip(self._names, self._kinds, strict=True))
        ]

    def state_of(self, run: Run) -> dict[str, torch.Tensor]:
        """The states of a run, as one parameter has them: tensors are views, numbers are copies."""
        tensors = {key: self._states[key][run.elements] for key in self._names[run.first]}
        return tensors | {kind[0]: self._numbers[kind][run.first].clone() for kind in self._kinds[run.first]}

    def numbers_of(self, run: Run) -> dict[str, torch.Tensor]:
        """The numbers of a run's parameters, one after the other."""
        return {kind[0]: self._numbers[kind][run.first : run.end] for kind in self._kinds[run.first]}


def _fits(key: str, value: object, parameter: torch.Tensor) -> bool:
    """True if this state can be flat."""
    if value is None:
        return key == "momentum_buffer"  # so older versions of SGD wrote it
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.requires_grad:
        return False
    if key in _NUMBERS:
        return value.dim() == 0
    return (value.shape, value.dtype, value.device) == (parameter.shape, parameter.dtype, parameter.device)


def can_be_flat(parameter: torch.Tensor) -> bool:
    """True if the parameter may be moved, and its elements updated in any order."""
    return (
        type(parameter.data) is torch.Tensor
        and parameter.layout is torch.strided
        and parameter.is_leaf
        and parameter.is_floating_point()
        and parameter.numel() > 0
        and parameter.device.type != "meta"
        and covers_its_memory(parameter)
        # Other processes would not see where it went.
        and (parameter.device.type != "cpu" or not parameter.untyped_storage().is_shared())
    )


def make_spaces(groups: Sequence[dict[str, Any]], excluded: set[int]) -> list[Space]:
    """Move the parameters into flat memory, except those at the positions ``excluded``.

    The layout is that of the buckets, whose gradients can so be used where they are.
    """
    spaces: list[Space] = []
    start = 0
    for number, group in enumerate(groups):
        parameters = dict(enumerate(group["params"], start))
        start += len(parameters)
        specs = [
            ParameterSpec(index, "", tuple(p.shape), p.dtype, p.device)
            for index, p in parameters.items()
            if index not in excluded
        ]
        for plan in plan_buckets(specs, sys.maxsize):
            members = [parameters[slot.index] for slot in plan.slots]
            spaces.append(Space(number, plan.slots, members, plan.flags_offset))
    return spaces
