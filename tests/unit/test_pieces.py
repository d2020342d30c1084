"""Checkpoints are cut evenly, and nothing is cut off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heatopt.checkpoint import _pieces
from heatopt.checkpoint._pieces import Extent, cut, fingerprint
from tests.support.launch import LAUNCH

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="pure: one process is enough")


@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 2, 4, 8])), max_size=8),
    size=st.integers(1, 6),
    limit=st.sampled_from([8, 64, 2**20]),
)
def test_parts_are_even_and_complete(sizes: list[tuple[int, int]], size: int, limit: int) -> None:
    extents = [Extent(f"t{number}", count, itemsize) for number, (count, itemsize) in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pieces, "PIECE_BYTES", limit)
        parts = cut(extents, size)
    widths = {extent.name: extent.itemsize for extent in extents}
    found: dict[str, int] = {}
    for part in parts:
        for piece in part:
            assert found.get(piece.name, 0) == piece.start < piece.stop
            assert (piece.stop - piece.start) * widths[piece.name] <= limit
            found[piece.name] = piece.stop
    assert found == {extent.name: extent.count for extent in extents if extent.count}
    loads = [sum((piece.stop - piece.start) * widths[piece.name] for piece in part) for part in parts]
    assert max(loads) - min(loads) <= 16


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.complex128, torch.int64])
def test_fingerprints_tell_tensors_apart(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype).view(2, 3)
    other = tensor.clone()
    assert fingerprint(tensor) == fingerprint(other)
    assert fingerprint(tensor.T) == fingerprint(other.T.contiguous())
    other[1, 2] = 0
    assert fingerprint(tensor) != fingerprint(other)
    assert fingerprint(tensor[:0]) == fingerprint(other[:0])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
def test_fingerprints_tell_orders_and_signs_apart(dtype: torch.dtype) -> None:
    """The same elements at other places, two signs exchanged, and zeros with a sign."""
    length = 2**16 + 5
    tensors = []
    for places in ([], [0], [2], [4], [2**15], [2**15 + 2], [length - 1], [0, 6], [2, 4]):
        tensor = torch.zeros(length, dtype=dtype)
        tensor[places] = 1
        tensors.append(tensor)
        if dtype.is_floating_point:
            tensors += [-tensor, torch.where(torch.arange(length) % 4 == 2, tensor, -tensor)]
    assert len({fingerprint(tensor) for tensor in tensors}) == len(tensors)
