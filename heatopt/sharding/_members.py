"""What a rank updates in the place of parameters: pieces of them, or other tensors that stand for them.

[Note: Many members]
There may be thousands of members, of which each update asks the same. What concerns all of them is asked by loops that
are not Python's; a tensor's hash is a function of Python's too, so they are looked up by ``id``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch

from heatopt.buckets import Piece, gradient_dtype

__all__ = ["Member", "Members", "PieceMembers", "are_there", "whole_members"]

_GRADIENT, _KIND = attrgetter("grad"), attrgetter("dtype", "device")


class Member:
    """A parameter, or a piece of one, that this rank updates.

    Args:
        parameter: the whole.
        piece: the part of it.
        tensor: what the update changes: a view of that part, or the parameter itself.
    """

    def __init__(self, parameter: torch.Tensor, piece: Piece, tensor: torch.Tensor) -> None:
        self.parameter = parameter
        self.piece = piece
        self.tensor = tensor

    def gradient(self, kept: torch.Tensor | None) -> torch.Tensor | None:
        """The piece's part of the gradient; None if there is none.

        Args:
            kept: that part, if it is all that there is on this rank; the gradient is whole otherwise.
        """
        gradient = self.parameter.grad
        if kept is not None or gradient is None or self.tensor is self.parameter:
            return gradient if kept is None else kept
        return gradient.detach().reshape(-1)[self.piece.start : self.piece.stop]

    def take_gradient(self, kept: torch.Tensor | None) -> bool:
        """Show the update the piece's part of the gradient, and return True, if it does not see it by itself.

        Args:
            kept: as in :meth:`gradient`.
        """
        if kept is None and self.tensor is self.parameter:
            return False
        gradient = self.gradient(kept)
        if kept is not None:  # the model may have been converted since
            gradient = kept.to(self.tensor.device, gradient_dtype(self.parameter))
        if gradient is not None and gradient.dtype is not gradient_dtype(self.tensor):
            self.tensor.grad_dtype = gradient.dtype  # as the parameter has it
        self.tensor.grad = gradient
        return True

    def finish(self, state: Any) -> None:
        """After the update.

        Args:
            state: the optimizer's, by parameter.
        """


class Members:
    """What one update of this rank changes, and the parameters that it stands for.

    Args:
        members: at most one for each parameter.
    """

    def __init__(self, members: Iterable[Member]) -> None:
        self._members = list(members)
        self._tensor_of = {id(m.parameter): m.tensor for m in self._members}
        self._parameter_of = {id(m.tensor): m.parameter for m in self._members}
        self._took: list[torch.Tensor] = []  # those that have a gradient for the time of an update

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def tensors(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What stands for those of ``parameters`` that have a member, in their order."""
        found = list(map(self._tensor_of.get, map(id, parameters)))
        return list(compress(found, are_there(found)))  # type: ignore[arg-type]

    def states(self, state: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
        """The entries of ``state``, of the optimizer's parameters, by what stands for them."""
        return zip(map(self._tensor_of.get, map(id, state), state), state.values(), strict=True)

    def give_back(self, own_state: Mapping[Any, Any], state: Any) -> None:
        """Let ``state`` have the entries that an update has left in ``own_state``, which :meth:`states` has begun."""
        if len(own_state) == len(state) and all(map(is_, own_state.values(), state.values())):
            return  # it has changed nothing but what is in them
        state.update(zip(map(self._parameter_of.get, map(id, own_state), own_state), own_state.values(), strict=True))

    def take_gradients(self, kept: Mapping[int, torch.Tensor]) -> None:
        """Show the update the members' parts of the gradients; ``kept`` are some of them, by parameter index."""
        self._took = [m.tensor for m in self._members if m.take_gradient(kept.get(m.piece.index))]

    def finish(self, state: Any) -> None:
        """After the update: let go of the gradients, because whoever owns their memory counts the tensors in it.

        Args:
            state: the optimizer's, by parameter.
        """
        _set_gradients(self._took, repeat(None))
        self._took = []
        for member in self._members:
            member.finish(state)


class PieceMembers(Members):
    """Members that are all parameters, or pieces of them, and stay so over many updates; see [Note: Many members]."""

    def __init__(self, members: Iterable[Member]) -> None:
        super().__init__(members)
        self._tensors = [m.tensor for m in self._members]
        self._indices = [m.piece.index for m in self._members]
        cut = [m for m in self._members if m.tensor is not m.parameter]
        self._cut = [m.tensor for m in cut]
        self._cut_parameters = [m.parameter for m in cut]
        self._starts = [m.piece.start for m in cut]
        self._lengths = [m.piece.stop - m.piece.start for m in cut]

    def take_gradients(self, kept: Mapping[int, torch.Tensor]) -> None:
        if kept:
            self._take_kept(kept)
        else:
            self._take_pieces()

    def _take_kept(self, kept: Mapping[int, torch.Tensor]) -> None:
        found = list(map(kept.get, self._indices))
        there = are_there(found)
        gradients: Any = list(compress(found, there))
        self._took = list(compress(self._tensors, there))
        if list(map(_KIND, gradients)) != list(map(_KIND, self._took)):
            super().take_gradients(kept)
            return
        _set_gradients(self._took, gradients)
        others = compress(self._members, map(is_, found, repeat(None)))
        self._took += [m.tensor for m in others if m.take_gradient(None)]

    def _take_pieces(self) -> None:
        found = list(map(_GRADIENT, self._cut_parameters))
        there = are_there(found)
        gradients: Any = list(compress(found, there))
        self._took = list(compress(self._cut, there))
        if list(map(_KIND, gradients)) != list(map(_KIND, self._took)):
            super().take_gradients({})
            return
        flat = map(torch.Tensor.reshape, map(torch.Tensor.detach, gradients), repeat((-1,)))
        starts, lengths = compress(self._starts, there), compress(self._lengths, there)
        _set_gradients(self._took, map(torch.Tensor.narrow, flat, repeat(0), starts, lengths))

    def finish(self, state: Any) -> None:
        _set_gradients(self._took, repeat(None))
        self._took = []


def whole_members(parameters: Sequence[torch.Tensor]) -> list[Member]:
    """All ``parameters``, for an update of all of them by one rank."""
    return [Member(p, Piece(0, index, 0, p.numel()), p) for index, p in enumerate(parameters)]


def are_there(found: Iterable[object]) -> list[bool]:
    """Which of them are not None."""
    return list(map(is_not, found, repeat(None)))


def _set_gradients(tensors: Sequence[torch.Tensor], gradients: Iterable[torch.Tensor | None]) -> None:
    deque(map(setattr, tensors, repeat("grad"), gradients), maxlen=0)
