"""Reads what this rank needs of a checkpoint, and nothing else."""

from __future__ import annotations

import os
from typing import Any

import torch

from heatopt.checkpoint._codec import decode, named_dtype
from heatopt.checkpoint._manifest import Manifest, TensorEntry
from heatopt.checkpoint._pieces import Piece, stored
from heatopt.checkpoint._rank_file import RankFile
from heatopt.errors import CheckpointError

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

    def _decode(self, section: str, tensor: Any) -> Any:
        try:
            return decode(self._manifest.section(section, self._rank), tensor)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{self._directory}: {section} is malformed: {type(error).__name__}: {error}"
            ) from error

    def _tensor(self, name: str) -> torch.Tensor:
        entry: TensorEntry = self._manifest.tensor(name, self._rank)
        own = self._manifest.tensors.get(name) is not entry
        tensor = torch.empty(entry.shape, dtype=named_dtype(entry.dtype))
        flat = stored(tensor)
        position = 0
        for number, start, stop, digest in entry.pieces:
            if start != position:
                raise ValueError(f"elements {position} to {start} of {name} are in no file")
            key = f"rank{self._rank}:{name}" if own else name
            self._file(number).read(Piece(key, start, stop), digest, flat[start:stop])
            position = stop
        if position != flat.numel():
            raise ValueError(f"elements {position} to {flat.numel()} of {name} are in no file")
        return tensor

    def _file(self, number: int) -> RankFile:
        if number not in self._files:
            entry = self._manifest.files[number]
            self._files[number] = RankFile(os.path.join(self._directory, entry.name), entry.size, entry.header)
        return self._files[number]
