"""Many tensors as few flat ones, for the wire."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Packed", "weighed"]


def weighed(tensors: Sequence[torch.Tensor], weight: float | None) -> list[torch.Tensor]:
    """``tensors`` times ``weight``, at least in single precision; with None as they are, with 0 zeros in any case."""
    if weight is None:
        return list(tensors)
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    return [tensor * weight if weight else torch.zeros_like(tensor) for tensor in wide]


class Packed:
    """Copies of ``tensors`` in flat buffers, one or more for each device and dtype, of at most ``chunk`` elements."""

    def __init__(self, tensors: Sequence[torch.Tensor], chunk: int) -> None:
        places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, tensor in enumerate(tensors):
            places.setdefault((tensor.device, tensor.dtype), []).append(index)
        self.shapes = [tensor.shape for tensor in tensors]
        self._places = list(places.values())
        self._flats = [
            torch.cat([tensors[index].detach().reshape(-1) for index in indices]) for indices in self._places
        ]
        self.chunks = [part for flat in self._flats for part in torch.split(flat, chunk) if part.numel()]
        """Views of the buffers, in an order that is equal on all ranks: what travels."""

    def unpack(self) -> list[torch.Tensor]:
        """The tensors in their order, as views of the buffers."""
        tensors: list[torch.Tensor] = [torch.empty(0)] * len(self.shapes)
        for flat, indices in zip(self._flats, self._places, strict=True):
            parts = torch.split(flat, [self.shapes[index].numel() for index in indices])
            for index, part in zip(indices, parts, strict=True):
                tensors[index] = part.view(self.shapes[index])
        return tensors
