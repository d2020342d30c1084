"""Which rank writes which elements of which tensor: pure arithmetic; and tensors as flat stored elements."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "PIECE_BYTES",
    "STORED_AS",
    "Content",
    "Extent",
    "Piece",
    "cut",
    "extent_of",
    "fingerprint",
    "pieces_of",
    "stored",
]

PIECE_BYTES = 4 * 2**20
"""No piece is larger. Who needs some of its elements reads all of it, for its hash: no more than this in vain."""

STORED_AS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""What safetensors calls them. Complex tensors are stored as pairs, all others as bytes."""


@dataclass(frozen=True)
class Extent:
    """How large a tensor is where it is stored."""

    name: str
    count: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.count * self.itemsize


@dataclass(frozen=True)
class Piece:
    """The stored elements ``start`` to ``stop`` of a tensor."""

    name: str
    start: int
    stop: int

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.name}:{self.start}"


@dataclass(frozen=True)
class Content:
    """Neighbouring pieces, and the tensor that has them: the state's own, which is not copied before it is written."""

    pieces: list[Piece]
    tensor: torch.Tensor
    first: int = 0
    """The stored element of the whole with which ``tensor`` begins."""

    def stored_dtype(self) -> torch.dtype:
        """That of the elements in the file."""
        return stored(torch.empty(1, dtype=self.tensor.dtype, device="cpu")).dtype

    def elements(self) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each piece with its stored elements; memory that they need is that of this tensor alone."""
        flat = stored(self.tensor)
        for piece in self.pieces:
            yield piece, flat[piece.start - self.first : piece.stop - self.first]

    def on_host(self) -> Content:
        """A copy of the pieces, in host memory."""
        start, stop = self.pieces[0].start, self.pieces[-1].stop
        own = stored(self.tensor)[start - self.first : stop - self.first]
        return Content(self.pieces, own.to("cpu", copy=True), start)


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as they are stored, one-dimensional; a view where the memory allows."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.view(-1)
    return flat if flat.dtype in STORED_AS else flat.view(torch.uint8)


def extent_of(name: str, dtype: torch.dtype, numel: int = 1) -> Extent:
    """What a tensor of ``numel`` elements will take."""
    one = stored(torch.empty(1, dtype=dtype, device="cpu"))
    return Extent(name, numel * one.numel(), one.element_size())


def cut(extents: Sequence[Extent], size: int) -> list[list[Piece]]:
    """Divide the tensors, laid end to end, among ``size`` ranks: each gets as many bytes, up to one element."""
    total = sum(extent.nbytes for extent in extents)
    bounds = [total * rank // size for rank in range(size + 1)]
    parts: list[list[Piece]] = [[] for _ in range(size)]
    offset = 0
    for extent in extents:
        elements = [min(max(-(-(bound - offset) // extent.itemsize), 0), extent.count) for bound in bounds]
        elements[-1] = extent.count if offset + extent.nbytes <= bounds[-1] else elements[-1]
        for rank in range(size):
            parts[rank] += pieces_of(extent, elements[rank], elements[rank + 1])
        offset += extent.nbytes
    return parts


def pieces_of(extent: Extent, start: int, stop: int) -> list[Piece]:
    """The stored elements ``start`` to ``stop``, in pieces of at most ``PIECE_BYTES``."""
    step = PIECE_BYTES // extent.itemsize
    return [Piece(extent.name, first, min(first + step, stop)) for first in range(start, stop, step)]


def fingerprint(tensor: torch.Tensor) -> tuple[int, int]:
    """Two words that differ, but for a freak of chance, where the bits of two tensors differ: BLAKE2b, 128 bits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in torch.split(stored(tensor).view(torch.uint8), PIECE_BYTES):
        digest.update(part.cpu().numpy().data)
    first, second = struct.unpack("<qq", digest.digest())
    return first, second
