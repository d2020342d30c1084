"""The manifest: what is in a checkpoint, where, and how to tell that it is whole."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from heatopt._version import __version__
from heatopt.checkpoint._codec import named_dtype
from heatopt.checkpoint._pieces import extent_of
from heatopt.checkpoint._rank_file import hash_of
from heatopt.errors import CheckpointError

__all__ = ["FileEntry", "Manifest", "TensorEntry", "parse", "rank_key", "render"]

_FORMAT = "heatopt checkpoint"
_VERSION = 1
_FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")


@dataclass(frozen=True)
class FileEntry:
    """One rank's file."""

    name: str
    size: int
    header: str


@dataclass
class TensorEntry:
    """One tensor."""

    dtype: str
    shape: list[int]
    pieces: list[tuple[int, int, int, str]] = field(default_factory=list)
    """Number of the file, first and end element as stored, hash; in the order of the elements."""

    def count(self) -> int:
        """Number of elements as they are stored."""
        return math.prod(self.shape) * extent_of("", named_dtype(self.dtype)).count


@dataclass
class Manifest:
    """The contents of ``manifest.json``."""

    ranks: int
    kinds: dict[str, str]
    """Class of the optimizer, of the scheduler, ..., by section."""
    parameters: list[list[tuple[str, list[int]]]]
    """dtype and shape of the optimizer's parameters, by group."""
    sections: dict[str, Any]
    """What all ranks have in common, encoded; by the name of the argument of ``save``."""
    rank_sections: list[dict[str, Any]]
    """What each rank has for itself."""
    files: list[FileEntry] = field(default_factory=list)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    def has(self, section: str) -> bool:
        """Whether the checkpoint has this part."""
        return section in self.sections or section in self.rank_sections[0]

    def section(self, name: str, rank: int) -> Any:
        """A part as ``rank`` has saved it."""
        return self.sections[name] if name in self.sections else self.rank_sections[rank][name]

    def tensor(self, name: str, rank: int) -> TensorEntry:
        """A tensor as ``rank`` has saved it."""
        own = self.tensors.get(rank_key(rank, name))
        return self.tensors[name] if own is None else own


def rank_key(rank: int, name: str) -> str:
    """Name of a tensor that ``rank`` has for itself."""
    return f"rank{rank}:{name}"


def render(manifest: Manifest) -> str:
    """The text of the file."""
    body = {"heatopt": __version__, "torch": str(torch.__version__), **vars(manifest)}
    body["files"] = [vars(entry) for entry in manifest.files]
    body["tensors"] = {name: vars(entry) for name, entry in manifest.tensors.items()}
    return _render(body)


def _render(body: dict[str, Any]) -> str:
    digest = hash_of(_dump(body).encode())
    return _dump({"format": _FORMAT, "version": _VERSION, "blake2b": digest, **body}) + "\n"


def _dump(value: Any, levels: int = 2) -> str:
    """JSON, with a line for each entry of the outer levels; more lines would take much longer."""
    if not levels or not value or not isinstance(value, (dict, list)):
        return json.dumps(value, allow_nan=False)
    if isinstance(value, list):
        return "[\n" + ",\n".join(_dump(item, levels - 1) for item in value) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_dump(item, levels - 1)}" for key, item in value.items()) + "\n}"


def parse(text: str, path: str) -> Manifest:
    """Read the text of the file ``path``.

    Raises:
        CheckpointError: damaged, of a newer version, or not heatopt's.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, or not heatopt's: {error}") from None
    if not isinstance(body, dict) or body.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a heatopt checkpoint")
    version = body.get("version")
    if version != _VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, written by heatopt {body.get('heatopt')!r}; "
            f"heatopt {__version__} reads version {_VERSION}"
        )
    contents = {key: value for key, value in body.items() if key not in ("format", "version", "blake2b")}
    if _render(contents) != text:
        raise CheckpointError(f"{path} is damaged: its contents do not have the hash that was written")
    try:
        return _manifest(contents)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is malformed: {type(error).__name__}: {error}") from None


def _manifest(contents: dict[str, Any]) -> Manifest:
    del contents["heatopt"], contents["torch"]
    contents["files"] = [FileEntry(**entry) for entry in contents["files"]]
    contents["tensors"] = {
        name: TensorEntry(entry["dtype"], entry["shape"], [_piece(piece) for piece in entry["pieces"]])
        for name, entry in contents["tensors"].items()
    }
    manifest = Manifest(**contents)
    if len(manifest.files) != manifest.ranks or len(manifest.rank_sections) != manifest.ranks:
        raise ValueError(f"{manifest.ranks} ranks, {len(manifest.files)} files")
    for entry in manifest.files:
        if not _FILE_NAME.fullmatch(entry.name):
            raise ValueError(f"a file named {entry.name!r}")
    return manifest


def _piece(piece: Sequence[Any]) -> tuple[int, int, int, str]:
    file, start, stop, digest = piece
    return int(file), int(start), int(stop), str(digest)
