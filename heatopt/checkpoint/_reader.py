"""Reads what this rank needs of a checkpoint, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from heatopt.checkpoint._codec import decode, items_of, name_of_tensor, named_dtype
from heatopt.checkpoint._manifest import Manifest, TensorEntry, rank_key
from heatopt.checkpoint._pieces import Piece, extent_of, stored
from heatopt.checkpoint._rank_file import RankFile
from heatopt.errors import CheckpointError
from heatopt.sharding import MASTER, MASTERS, Wanted

__all__ = ["Reader"]


class Reader:
    """Reads the parts of one rank.

    Args:
        directory: where the files are.
        manifest: what is in them.
        rank: the rank whose part is read, among those that saved.
    """

    def __init__(self, directory: str, manifest: Manifest, rank: int) -> None:
        self._directory = directory
        self._manifest = manifest
        self._rank = rank
        self._files: dict[int, RankFile] = {}

    def of_rank(self, rank: int) -> Reader:
        """Reads the parts of another rank, from the same open files."""
        other = Reader(self._directory, self._manifest, rank)
        other._files = self._files
        return other

    def check_files(self) -> None:
        """Check that all files are there and whole, but for their contents.

        Raises:
            CheckpointError: one is missing, truncated or has another header.
        """
        for number in range(len(self._manifest.files)):
            self._file(number)

    def outline(self, section: str) -> Any:
        """A part with :class:`TensorEntry` in the place of tensors."""
        return self._decode(section, lambda name: self._manifest.tensor(name, self._rank))

    def read(self, section: str) -> Any:
        """A part with its tensors.

        Raises:
            CheckpointError: a file is missing, truncated or damaged.
        """
        tensors: dict[str, torch.Tensor] = {}  # tied parameters

        def tensor(name: str) -> torch.Tensor:
            if name not in tensors:
                tensors[name] = self._tensor(name)
            return tensors[name]

        return self._decode(section, tensor)

    def read_entry(self, section: str, key: str) -> Any:
        """One entry of a part that is a dict, with its tensors.

        Raises:
            CheckpointError: a file is missing, truncated or damaged.
        """
        return self._malformed(section, lambda content: decode(dict(items_of(content))[key], self._tensor))

    def read_optimizer(self, wanted: Wanted) -> tuple[dict[str, Any], list[int]]:
        """The optimizer's state dict with no more than is ``wanted`` of its states.

        Returns:
            The state dict, without the parameters of which nothing is wanted; tensors in part are one-dimensional. And
            the indices of all parameters that have a state, in the order of the whole state dict.

        Raises:
            CheckpointError: a file is missing, truncated or damaged.
        """
        found: tuple[dict[str, Any], list[int]]
        found = self._malformed("optimizer", lambda content: self._read_optimizer(content, wanted))
        return found

    def _read_optimizer(self, content: Any, wanted: Wanted) -> tuple[dict[str, Any], list[int]]:
        in_parts = ("state", MASTERS)
        saved = {key: decode(value, self._tensor) for key, value in items_of(content) if key not in in_parts}
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        position = {index: number for number, index in enumerate(indices)}
        saved["state"] = {}
        order = []
        for key, entries in items_of(content["state"]):
            if key not in position:  # not a parameter's
                saved["state"][key] = decode(entries, self._tensor)
                continue
            order.append(position[key])
            if wanted(position[key], "", torch.Size()) is not None:
                saved["state"][key] = self._read_state(entries, position[key], wanted)
        for key, value in items_of(content.get(MASTERS, {})):
            order.append(position[key])
            if wanted(position[key], "", torch.Size()) is not None:
                found = self._read_state({MASTER: value}, position[key], wanted)
                saved.setdefault(MASTERS, {})[key] = found[MASTER]
        return saved, list(dict.fromkeys(order))

    def _read_state(self, entries: Any, parameter: int, wanted: Wanted) -> dict[str, Any]:
        def read(key: str, value: Any) -> Any:
            if isinstance(value, list):
                return [read(key, item) for item in value]
            name = name_of_tensor(value)
            if name is None:
                return decode(value, self._tensor)
            shape = torch.Size(self._manifest.tensor(name, self._rank).shape)
            found = self._elements(name, wanted(parameter, key, shape) or ())
            return found.view(shape) if found.numel() == shape.numel() else found

        return {key: read(key, value) for key, value in items_of(entries)}

    def _decode(self, section: str, tensor: Any) -> Any:
        return self._malformed(section, lambda content: decode(content, tensor))

    def _malformed(self, section: str, read: Callable[[Any], Any]) -> Any:
        """What ``read`` makes of a section; that it is no section is an error of the checkpoint."""
        try:
            return read(self._manifest.section(section, self._rank))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{self._directory}: {section} is malformed: {type(error).__name__}: {error}"
            ) from error

    def _tensor(self, name: str) -> torch.Tensor:
        shape = torch.Size(self._manifest.tensor(name, self._rank).shape)
        return self._elements(name, [(0, shape.numel())]).view(shape)

    def _elements(self, name: str, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Runs of elements of a tensor, one after the other; only the pieces that have some of them are read."""
        entry: TensorEntry = self._manifest.tensor(name, self._rank)
        dtype = named_dtype(entry.dtype)
        key = name if self._manifest.tensors.get(name) is entry else rank_key(self._rank, name)
        result = torch.empty(sum(stop - start for start, stop in runs), dtype=dtype, device="cpu")
        flat = stored(result)
        count = extent_of(name, dtype).count
        targets = torch.split(flat, [count * (stop - start) for start, stop in runs])
        position = 0
        for number, first, last, digest in entry.pieces:
            if first != position:
                raise ValueError(f"elements {position} to {first} of {name} are in no file")
            position = last
            inside = [(max(first, count * start), min(last, count * stop)) for start, stop in runs]
            if all(low >= high for low, high in inside):
                continue
            found = self._file(number).read(Piece(key, first, last), digest, flat.dtype)
            for target, (start, _), (low, high) in zip(targets, runs, inside, strict=True):
                if low < high:
                    target[low - count * start : high - count * start] = found[low - first : high - first]
        if position != entry.count():
            raise ValueError(f"elements {position} to {entry.count()} of {name} are in no file")
        return result

    def _file(self, number: int) -> RankFile:
        if number not in self._files:
            entry = self._manifest.files[number]
            self._files[number] = RankFile(os.path.join(self._directory, entry.name), entry.size, entry.header)
        return self._files[number]
