"""One rank's safetensors file: written in one pass, read piece by piece, each checked by its hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from heatopt.checkpoint._files import write_file
from heatopt.checkpoint._pieces import STORED_AS, Content, Piece
from heatopt.errors import CheckpointError

__all__ = ["RankFile", "Written", "file_name", "hash_of", "write_pieces"]

_LENGTH_BYTES = 8


def file_name(rank: int) -> str:
    """Name of the file that ``rank`` writes."""
    return f"rank-{rank:05d}.safetensors"


def hash_of(data: Any) -> str:
    """BLAKE2b, 128 bits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Written:
    """What the manifest has to know of a file."""

    size: int
    header: str
    """Hash of everything before the first piece."""
    hashes: dict[str, str]
    """Of each piece, by its name in the file."""


def write_pieces(path: str, contents: Sequence[Content]) -> Written:
    """Write pieces of tensors to a new file; one after the other passes through host memory."""
    # Wide elements first: readers map the file and need each element at a multiple of its size.
    ordered = sorted(contents, key=lambda content: -content.stored_dtype().itemsize)
    entries: dict[str, Any] = {}
    offset = 0
    for content in ordered:
        dtype = content.stored_dtype()
        for piece in content.pieces:
            count = piece.stop - piece.start
            end = offset + count * dtype.itemsize
            entries[piece.key] = {"dtype": STORED_AS[dtype], "shape": [count], "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    hashes: dict[str, str] = {}

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for piece, flat in chain.from_iterable(content.elements() for content in ordered):
            data = flat.cpu().view(torch.uint8).numpy().data
            hashes[piece.key] = hash_of(data)
            yield data

    write_file(path, chunks())
    return Written(len(header) + offset, hash_of(header), hashes)


class RankFile:
    """A file of a checkpoint, open for reading.

    Args:
        path: the file.
        size: its size as the manifest has it.
        header: the hash of its header.

    Raises:
        CheckpointError: missing, truncated or damaged.
    """

    def __init__(self, path: str, size: int, header: str) -> None:
        self._path = path
        try:
            found = os.path.getsize(path)
            if found != size:
                raise CheckpointError(f"{path} has {found} bytes instead of {size}: it is truncated or another file")
            with open(path, "rb") as file:
                length = file.read(_LENGTH_BYTES)
                text = file.read(min(int.from_bytes(length, "little"), size))
            if hash_of(length + text) != header:
                raise CheckpointError(f"{path} is damaged: its header is not the one that was written")
            self._file: Any = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def read(self, piece: Piece, digest: str, dtype: torch.dtype) -> torch.Tensor:
        """The stored elements of a piece, which are of ``dtype``.

        Raises:
            CheckpointError: it is not what was written.
        """
        try:
            found: torch.Tensor = self._file.get_tensor(piece.key)
            intact = hash_of(found.view(torch.uint8).numpy()) == digest
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._path} cannot be read: {error}") from error
        if not intact or found.dtype != dtype or found.shape != (piece.stop - piece.start,):
            raise CheckpointError(
                f"{self._path} is damaged: elements {piece.start} to {piece.stop} of {piece.name} "
                "are not what was written"
            )
        return found
