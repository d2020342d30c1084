"""What must be equal on all ranks, and the sentence that names the first difference. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = [
    "Fingerprint",
    "NumericOptions",
    "ParameterPrint",
    "first_difference",
    "numeric_options",
    "options_hash",
    "printable_options",
]

NumericOptions = tuple[tuple[str, "float | tuple[Any, ...]"], ...]
"""A group's options that are numbers, by name."""

_FEW = 16


@dataclass(frozen=True)
class ParameterPrint:
    """What must agree of one parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    group: int
    synchronised: str
    """"dense", "sparse" or "no" (frozen so far)."""

    def __str__(self) -> str:
        return f"{self.name!r} of shape {self.shape}, {self.dtype}, on {self.device}, in group {self.group}"


@dataclass(frozen=True)
class Fingerprint:
    """What must agree of one optimizer."""

    settings: tuple[tuple[str, str], ...]
    groups: tuple[tuple[tuple[str, str], ...], ...]
    parameters: tuple[ParameterPrint, ...]

    def digest(self) -> int:
        """64 bits that differ where the fingerprints do."""
        data = repr((self.settings, self.groups, self.parameters)).encode()
        return int(np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), dtype=np.int64)[0])


def printable_options(group: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """A group's options as text; tensors on a GPU only by their kind, because reading them would wait for the GPU."""
    return tuple(
        (key, _printable(value)) for key, value in sorted(group.items()) if key not in ("params", "param_names")
    )


def _printable(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        numbers = _numbers(value)
        return f"tensor of shape {tuple(value.shape)} on {value.device.type}" if numbers is None else repr(numbers)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_printable, value))})"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))  # a repr would hold an address
    return repr(value)


def numeric_options(group: Mapping[str, Any]) -> NumericOptions:
    """A group's options that are numbers, sorted by name: what a schedule or a user changes from step to step."""
    items = ((key, _numbers(value)) for key, value in sorted(group.items()) if key not in ("params", "param_names"))
    return tuple((key, value) for key, value in items if value is not None)


def _numbers(value: Any) -> float | tuple[Any, ...] | None:
    """The number, or the tuple of numbers, that an option is; None for anything else.

    Tensors count where reading them costs nothing: few elements, on the CPU.
    """
    if isinstance(value, (float, int)):
        return value
    if isinstance(value, (tuple, list)):
        parts = tuple(_numbers(item) for item in value)
        return None if None in parts else parts
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.numel() <= _FEW:
        return tuple(value.flatten().tolist()) if value.dim() else value.item()
    return None


def options_hash(groups: Sequence[Mapping[str, Any]]) -> int:
    """64 bits of the numeric options, equal in every process for equal options."""
    # repr of a float is exact; True, 1 and 1.0 are the same option.
    text = repr([[(key, _plain(value)) for key, value in numeric_options(group)] for group in groups])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _plain(value: float | tuple[Any, ...]) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, tuple) else float(value)


def first_difference(prints: Sequence[Fingerprint]) -> str:
    """Describe the first difference between rank 0 and the first rank that differs from it."""
    other = next((rank for rank, found in enumerate(prints) if found != prints[0]), None)
    if other is None:
        return "the ranks' parameters changed while they were being compared"
    ours, theirs = prints[0], prints[other]
    if ours.settings != theirs.settings:
        for (name, value), (_, found_value) in zip(ours.settings, theirs.settings, strict=False):
            if value != found_value:
                return f"setting {name}: rank 0 has {value}, rank {other} has {found_value}"
    if len(ours.parameters) == len(theirs.parameters):
        same_names = sorted(p.name for p in ours.parameters) == sorted(p.name for p in theirs.parameters)
        for position, (mine, found) in enumerate(zip(ours.parameters, theirs.parameters, strict=True)):
            if mine != found:
                hint = "; the same names in another order" if same_names and mine.name != found.name else ""
                if str(mine) == str(found):
                    hint = f"; synchronised: {mine.synchronised} on rank 0, {found.synchronised} on rank {other}"
                return f"parameter {position}: rank 0 has {mine}, rank {other} has {found}{hint}"
    else:
        return _describe_count(ours, theirs, other)
    if len(ours.groups) != len(theirs.groups):
        return f"number of parameter groups: rank 0 has {len(ours.groups)}, rank {other} has {len(theirs.groups)}"
    for index, (ours_group, theirs_group) in enumerate(zip(ours.groups, theirs.groups, strict=True)):
        mine_options, their_options = dict(ours_group), dict(theirs_group)
        for key in sorted({*mine_options, *their_options}):
            value, theirs_value = mine_options.get(key, "none"), their_options.get(key, "none")
            if value != theirs_value:
                return f"option {key!r} of parameter group {index}: rank 0 has {value}, rank {other} has {theirs_value}"
    return f"rank 0 and rank {other} have different parameter groups"


def _describe_count(ours: Fingerprint, theirs: Fingerprint, other: int) -> str:
    mine, found = ours.parameters, theirs.parameters
    shorter = min(len(mine), len(found))
    position = next((i for i in range(shorter) if mine[i] != found[i]), shorter)
    at_zero = mine[position] if position < len(mine) else "none"
    at_other = found[position] if position < len(found) else "none"
    return (
        f"number of parameters: rank 0 has {len(mine)}, rank {other} has {len(found)}; the first difference is "
        f"parameter {position}: rank 0 has {at_zero}, rank {other} has {at_other}"
    )
