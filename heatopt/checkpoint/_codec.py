"""Python objects as JSON and named tensors, and back: no pickle, and every float with its bits."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from heatopt.sharding import Part

__all__ = ["TensorTable", "decode", "dtype_name", "encode", "items_of", "name_of_tensor", "named_dtype"]

# An object with one of these as its only key stands for something that JSON does not have.
_FLOAT, _TUPLE, _DICT, _COUNTER = "$float", "$tuple", "$dict", "$counter"
_TENSOR, _SPARSE, _DTYPE = "$tensor", "$sparse", "$dtype"

# Python refuses to write, or to read, a decimal number of more than 4300 digits.
_INT_BITS = 2**13

# Whoever reads needs more of Python's stack for a level than whoever writes, and may begin deeper in it.
_MAX_DEPTH = 100


class TensorTable(dict[str, torch.Tensor]):
    """Tensors by name; one that is met again under another name (tied parameters) is there once."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Part] = {}
        """What ranks hold in parts, by name."""
        self._names: dict[tuple[object, ...], str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Add a tensor and return its name: another one where ``name`` is taken or the tensor is there already."""
        same = (
            tensor.data_ptr(),
            tensor.device,
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.is_conj(),
            tensor.is_neg(),
        )
        if tensor.numel() and same in self._names:
            return self._names[same]
        unique = self._unique(name)
        self[unique] = tensor
        self._names[same] = unique
        return unique

    def add_part(self, name: str, part: Part) -> str:
        """Add what this rank has of a tensor and return its name, which is another one where ``name`` is taken."""
        unique = self._unique(name)
        self.parts[unique] = part
        return unique

    def _unique(self, name: str) -> str:
        name = name.encode("utf-8", "backslashreplace").decode()  # safetensors reads no lone surrogates
        unique, number = name, 1
        while unique in self or unique in self.parts:
            unique, number = f"{name}~{number}", number + 1
        return unique


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str) -> torch.dtype:
    """The inverse of :func:`dtype_name`.

    Raises:
        ValueError: this torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {name!r}")
    return dtype


def encode(value: Any, name: str, tensors: TensorTable) -> Any:
    """Return what :mod:`json` can write; tensors are added to ``tensors`` and named after their place.

    Raises:
        TypeError: something that a checkpoint cannot hold; the message names its place.
        ValueError: a container that holds itself or is nested too deeply, or an integer that is too large.
    """
    return _encode(value, name, tensors, 0)


def _encode(value: Any, name: str, tensors: TensorTable, depth: int) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        if value.bit_length() > _INT_BITS:
            raise ValueError(f"{name} is an integer of {value.bit_length()} bits; a checkpoint holds up to {_INT_BITS}")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: struct.pack(">d", value).hex()}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, name, tensors)
    if isinstance(value, Part):
        return {_TENSOR: tensors.add_part(name, value)}
    if isinstance(value, torch.dtype):
        return {_DTYPE: dtype_name(value)}
    if depth > _MAX_DEPTH:
        whole = name.partition("/")[0]
        raise ValueError(f"{whole} holds itself, or is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, list):
        return [_encode(item, f"{name}/{index}", tensors, depth + 1) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(item, f"{name}/{index}", tensors, depth + 1) for index, item in enumerate(value)]}
    if isinstance(value, dict):
        return _encode_dict(value, name, tensors, depth + 1)
    raise TypeError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold; it holds None, bool, int, float, str, "
        "tensors, and lists, tuples and dicts of these"
    )


def _encode_dict(value: dict[Any, Any], name: str, tensors: TensorTable, depth: int) -> Any:
    plain = not isinstance(value, Counter) and all(isinstance(key, str) and not key.startswith("$") for key in value)
    if plain:
        return {str(key): _encode(item, f"{name}/{key}", tensors, depth) for key, item in value.items()}
    for key in value:
        if not (key is None or isinstance(key, (str, int, float, tuple))):
            raise TypeError(f"{name} has a key {key!r} of type {type(key).__name__}, which a checkpoint cannot hold")
    pairs = [
        [_encode(key, f"{name} (a key)", tensors, depth), _encode(item, f"{name}/{key}", tensors, depth)]
        for key, item in value.items()
    ]
    return {_COUNTER if isinstance(value, Counter) else _DICT: pairs}


def _encode_tensor(tensor: torch.Tensor, name: str, tensors: TensorTable) -> Any:
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        parts = [
            _encode_tensor(part, f"{name}/{kind}", tensors)
            for kind, part in (("indices", tensor._indices()), ("values", tensor._values()))
        ]
        return {_SPARSE: [*parts, list(tensor.shape), tensor.is_coalesced()]}
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"{name} is a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}: not supported")
    return {_TENSOR: tensors.add(name, tensor)}


def name_of_tensor(value: Any) -> str | None:
    """The name of the tensor for which an encoded value stands; None if it stands for something else."""
    return value[_TENSOR] if isinstance(value, dict) and len(value) == 1 and _TENSOR in value else None


def items_of(value: Any) -> list[tuple[Any, Any]]:
    """The keys of an encoded dict, with their encoded values.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a dict")
    if len(value) == 1 and _DICT in value:
        return [(decode(key, lambda name: name), item) for key, item in value[_DICT]]
    return list(value.items())


def decode(value: Any, tensor: Callable[[str], Any]) -> Any:
    """The inverse of :func:`encode`; ``tensor`` gives the tensor, or what stands for it, of a name.

    Raises:
        ValueError: not written by :func:`encode`.
    """
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if len(value) != 1 or not kind.startswith("$"):
        return {key: decode(item, tensor) for key, item in value.items()}
    return _decode_special(kind, value[kind], tensor)


def _decode_special(kind: str, content: Any, tensor: Callable[[str], Any]) -> Any:
    if kind == _FLOAT:
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if kind == _TENSOR:
        return tensor(content)
    if kind == _TUPLE:
        return tuple(decode(item, tensor) for item in content)
    if kind in (_DICT, _COUNTER):
        pairs: Mapping[Any, Any] = {decode(key, tensor): decode(item, tensor) for key, item in content}
        return Counter(pairs) if kind == _COUNTER else pairs
    if kind == _DTYPE:
        return named_dtype(content)
    if kind == _SPARSE:
        indices, values = (decode(part, tensor) for part in content[:2])
        if not isinstance(indices, torch.Tensor):
            return (indices, values)
        return torch.sparse_coo_tensor(
            indices, values, content[2], is_coalesced=content[3] or None, check_invariants=False
        )
    raise ValueError(f"unknown mark {kind!r}")
