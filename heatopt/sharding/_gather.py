"""Whole states from the pieces of all ranks, and what can be said of them without moving any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heatopt.comm import Communicator
from heatopt.errors import RankMismatchError
from heatopt.sharding._declaration import NUMBERS
from heatopt.sharding._partition import Piece

__all__ = ["Ownership", "Part", "cut_state", "flatten_state", "gather_states", "is_part", "outline_states"]

# States travel together, up to about so many bytes of each rank.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Ownership:
    """What this rank owns."""

    pieces: Mapping[int, Piece]
    """By parameter index."""
    cut: frozenset[int]
    """Indices of the parameters that are cut, whoever owns their pieces."""

    def elements(
        self, index: int, key: str, shape: torch.Size, parameter: torch.Tensor
    ) -> Sequence[tuple[int, int]] | None:
        """First and end elements that this rank holds of the state ``key``, of ``shape``; None if it holds nothing."""
        piece = self.pieces.get(index)
        if piece is None:
            return None
        is_cut = index in self.cut and _is_cut_with(key, shape, parameter.shape)
        return [(piece.start, piece.stop) if is_cut else (0, shape.numel())]


@dataclass(frozen=True)
class Part:
    """Stands in a state dict for a tensor of which each rank has some elements, or none."""

    shape: torch.Size
    """Of the whole tensor."""
    dtype: torch.dtype
    own: Sequence[tuple[int, torch.Tensor]] = ()
    """Elements that this rank has: the number of the first of some neighbours, and the memory of the state itself."""


@dataclass(frozen=True)
class _Described:
    """A tensor of a state, while it is elsewhere."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool
    start: int
    """Where it begins in the parameter's."""
    is_part: bool

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


_Table = dict[int, dict[str, Any]]  # state by parameter index, with descriptions for tensors


def cut_state(state: dict[str, Any], shape: torch.Size, piece: Piece) -> None:
    """Reduce a whole state, in place, to that of ``piece`` of a parameter of ``shape``, with memory of its own."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            is_cut = _is_cut_with(key, value.shape, shape)
            state[key] = (value.detach().reshape(-1)[piece.start : piece.stop] if is_cut else value).clone()


def flatten_state(state: dict[str, Any], shape: torch.Size) -> None:
    """Give what is cut with a parameter of ``shape``, but is the whole here, the form of a piece. In place."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and _is_cut_with(key, value.shape, shape):
            state[key] = value.reshape(-1)


def _is_cut_with(key: str, shape: torch.Size, parameter_shape: torch.Size) -> bool:
    """Whether the state ``key`` is cut where a parameter is."""
    return key not in NUMBERS and shape == parameter_shape


def is_part(key: str, value: Any, piece: Piece) -> bool:
    """Whether the state ``key`` of a parameter that is cut is that of ``piece`` alone."""
    return isinstance(value, torch.Tensor) and key not in NUMBERS and value.shape == (piece.stop - piece.start,)


def outline_states(
    comm: Communicator,
    parameters: Sequence[torch.Tensor],
    state: Mapping[Any, dict[str, Any]],
    owned: Ownership,
) -> _Table:
    """Return the states of all parameters that have any, with a :class:`Part` for each tensor. Collective.

    Descriptions travel, numbers do not: what all ranks have of one value is that of the lowest.

    Raises:
        RankMismatchError: there are elements that no rank has, or more than one.
    """
    own = {index: state[parameters[index]] for index in owned.pieces if parameters[index] in state}
    mine = {index: _describe(values, owned, index) for index, values in own.items()}
    result: _Table = {}
    missing: dict[tuple[int, str], int] = {}
    for rank, table in enumerate(comm.exchange_objects(mine, "outline of sharded optimizer states")):
        for index, entries in table.items():
            whole = result.setdefault(index, {})
            for key, found in entries.items():
                value = own[index][key] if rank == comm.rank and isinstance(found, _Described) else None
                if not isinstance(found, _Described) or (key in whole and not found.is_part):
                    whole.setdefault(key, found)
                    continue
                shape = parameters[index].shape if found.is_part else torch.Size(found.shape)
                missing[index, key] = missing.get((index, key), shape.numel()) - torch.Size(found.shape).numel()
                if key not in whole or value is not None:
                    own_part = () if value is None else [(found.start if found.is_part else 0, value)]
                    whole[key] = Part(shape, found.dtype, own_part)
    for (index, key), count in missing.items():
        if count:
            raise RankMismatchError(f"the ranks do not have all of the state {key!r} of parameter {index}")
    return {index: result[index] for index in sorted(result)}


@torch.no_grad()
def gather_states(
    comm: Communicator,
    parameters: Sequence[torch.Tensor],
    state: Mapping[Any, dict[str, Any]],
    owned: Ownership,
    indices: Iterable[int],
) -> _Table:
    """Return the whole states of the parameters ``indices``, for those that have any. Collective."""
    wanted = [index for index in indices if index in owned.pieces and parameters[index] in state]
    mine = {index: _describe(state[parameters[index]], owned, index) for index in wanted}
    tables: list[_Table] = comm.exchange_objects(mine, "gathering of sharded optimizer states")
    result: _Table = {}
    for chunk in _chunks(tables):
        own = [_as_bytes(state[parameters[index]][key]) for index in chunk for key in _keys(mine, index)]
        wholes = [_make_room(chunk, table, parameters, result) for table in tables]
        longest = max(sum(flat.numel() for flat in flats) for flats in wholes)
        # In rounds: of one large parameter, too, no rank has more at a time than its part, the whole and a round.
        for start in range(0, longest, _CHUNK_BYTES):
            sent = torch.zeros(min(_CHUNK_BYTES, longest - start), dtype=torch.uint8, device="cpu")
            for place, flat in _window(sent, own, start):
                place.copy_(flat)
            rows = comm.gather_rows(sent, "gathering of sharded optimizer states")
            for row, flats in zip(rows, wholes, strict=True):
                for place, flat in _window(row, flats, start):
                    flat.copy_(place)
    return result


def _describe(state: Mapping[str, Any], owned: Ownership, index: int) -> dict[str, Any]:
    piece = owned.pieces[index]
    return {
        key: _Described(
            tuple(value.shape),
            value.dtype,
            value.device.type == "cpu",
            piece.start,
            index in owned.cut and is_part(key, value, piece),
        )
        if isinstance(value, torch.Tensor)
        else value
        for key, value in state.items()
    }


def _keys(table: _Table, index: int) -> list[str]:
    return [key for key, value in table.get(index, {}).items() if isinstance(value, _Described)]


def _nbytes(described: dict[str, Any]) -> int:
    return sum(value.nbytes for value in described.values() if isinstance(value, _Described))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _window(
    buffer: torch.Tensor, flats: Sequence[torch.Tensor], start: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Stretches of ``buffer``, each with its bytes of ``flats``, which lie end to end and fill it from ``start`` on."""
    position = -start
    for flat in flats:
        low, high = max(position, 0), min(position + flat.numel(), buffer.numel())
        if low < high:
            yield buffer[low:high], flat[low - position : high - position]
        position += flat.numel()


def _chunks(tables: Sequence[_Table]) -> Iterator[list[int]]:
    """Indices that any rank has, in ascending order."""
    chunk: list[int] = []
    sizes = [0] * len(tables)
    for index in sorted(set().union(*tables)):
        more = [_nbytes(table.get(index, {})) for table in tables]
        if chunk and max(map(sum, zip(sizes, more, strict=True))) > _CHUNK_BYTES:
            yield chunk
            chunk, sizes = [], [0] * len(tables)
        chunk.append(index)
        sizes = list(map(sum, zip(sizes, more, strict=True)))
    if chunk:
        yield chunk


def _make_room(
    chunk: list[int], table: _Table, parameters: Sequence[torch.Tensor], result: _Table
) -> list[torch.Tensor]:
    """Where the bytes of one rank's states of ``chunk`` belong. Numbers are those of the lowest rank with a piece."""
    flats = []
    for index in chunk:
        if index not in table:
            continue
        whole = result.setdefault(index, {})
        device = parameters[index].device
        for key, found in table[index].items():
            if not isinstance(found, _Described):
                whole.setdefault(key, found)
                continue
            room = whole.get(key) if found.is_part else None
            if room is None:
                shape = parameters[index].shape if found.is_part else found.shape
                room = torch.empty(shape, dtype=found.dtype, device="cpu" if found.on_cpu else device)
                whole.setdefault(key, room)
            start = found.start * found.dtype.itemsize if found.is_part else 0
            flats.append(_as_bytes(room)[start : start + found.nbytes])
    return flats
