"""Directories that appear as a whole or not at all. Everything written is on the disk before it gets its name."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterable

from heatopt._log import logger
from heatopt.errors import CheckpointError, NoCheckpointError

__all__ = [
    "MANIFEST",
    "discard",
    "find",
    "make_directories",
    "make_temporary",
    "publish",
    "read_text",
    "sync_directory",
    "write_file",
]

MANIFEST = "manifest.json"

Buffer = bytes | memoryview

_OURS = re.compile(rf"{re.escape(MANIFEST)}|rank-\d{{5,}}\.safetensors")


def write_file(path: str, chunks: Iterable[Buffer]) -> None:
    """Write a new file and return once it is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest.nbytes:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error  # of a descriptor, the system names no file
    finally:
        os.close(descriptor)


def read_text(path: str) -> str:
    """The text of a file, whose line ends are as they stand."""
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def sync_directory(path: str) -> None:
    """Return once the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: str) -> None:
    """Make a directory and those above it, as far as they are missing, and return once their names are on the disk."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_directories(parent)
    with contextlib.suppress(FileExistsError):  # another job was faster; if it is a file, whoever uses it says so
        os.mkdir(path)
    sync_directory(parent)


def make_temporary(path: str) -> str:
    """Clear what a killed save has left beside ``path``, and make the directory to write to.

    For who has the :class:`Claim` to ``path``.

    Raises:
        CheckpointError: what is at ``path`` is not a checkpoint and must not be replaced.
    """
    if _is_vacant(path):
        old = _last_replaced(path)
        if old is not None:
            os.rename(old, path)
    elif not os.path.isdir(path):
        raise CheckpointError(f"{path} is a file; a checkpoint is a directory")
    elif not all(_OURS.fullmatch(name) for name in os.listdir(path)):
        raise CheckpointError(f"{path} is a directory with other files than a checkpoint's; it is left as it is")
    for left in _siblings(path, "tmp") + _siblings(path, "old"):
        discard(left)
    temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    os.mkdir(temporary)
    return temporary


def publish(temporary: str, path: str) -> None:
    """Give the complete directory ``temporary`` the name ``path``; whoever had it before is removed."""
    sync_directory(temporary)
    parent = os.path.dirname(path)
    old = f"{path}.old-{temporary[-8:]}"
    replaces = os.path.isdir(path)
    if replaces:
        os.rename(path, old)
    try:
        os.rename(temporary, path)
        sync_directory(parent)
    except OSError:
        _go_back(temporary, path, old if replaces else None)
        raise
    if replaces:
        discard(old)


def _go_back(temporary: str, path: str, old: str | None) -> None:
    """A step failed after which nobody may see the new directory: the old one gets its name again."""
    try:
        if os.path.isdir(path):
            os.rename(path, temporary)
        if old is not None:
            os.rename(old, path)
    except OSError as error:
        logger.warning("cannot give %s its name again (%s); load finds it all the same", path, error)


def discard(directory: str) -> None:
    """Remove a directory of files; that this fails is no reason to stop, and the next save tries again."""
    try:
        # Without its manifest it is no checkpoint, so that none is ever seen with some of its files.
        names = sorted(os.listdir(directory), key=lambda name: name != MANIFEST)
        for name in names:
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)
    except OSError as error:
        logger.warning("cannot remove %s: %s", directory, error)


def find(path: str) -> str:
    """The directory with the checkpoint ``path``: another one if a save was killed while it exchanged names.

    Raises:
        NoCheckpointError: there is none.
        CheckpointError: there is something else.
    """
    if os.path.isfile(os.path.join(path, MANIFEST)):
        return path
    if _is_vacant(path):
        old = _last_replaced(path)
        if old is not None:
            return old
        raise NoCheckpointError(f"there is no checkpoint {path}")
    if not os.path.isdir(path):
        raise CheckpointError(f"{path} is a file; a checkpoint is a directory")
    raise CheckpointError(f"{path} is not a checkpoint of heatopt: {os.path.join(path, MANIFEST)} is missing")


def _is_vacant(path: str) -> bool:
    """Nothing is at ``path``, or an empty directory: scripts make those before they start a job again."""
    return not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path))


def _last_replaced(path: str) -> str | None:
    """The newest checkpoint that has lost the name ``path``; older ones are there if they could not be removed."""
    manifests = [os.path.join(old, MANIFEST) for old in _siblings(path, "old")]
    newest = max(filter(os.path.isfile, manifests), key=os.path.getmtime, default=None)
    return None if newest is None else os.path.dirname(newest)


def _siblings(path: str, kind: str) -> list[str]:
    parent, name = os.path.split(path)
    pattern = re.compile(rf"{re.escape(name)}\.{kind}-[0-9a-f]{{8}}")
    names = os.listdir(parent) if os.path.isdir(parent) else []
    found = [os.path.join(parent, other) for other in sorted(names) if pattern.fullmatch(other)]
    return [other for other in found if os.path.isdir(other)]
