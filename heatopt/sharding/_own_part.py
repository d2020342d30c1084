"""What torch's LBFGS sees of the parameters and of its history where each rank has a part of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch

from heatopt.comm import Communicator
from heatopt.sharding._members import Member
from heatopt.sharding._partition import Block
from heatopt.sharding._vectors import SplitVector
from heatopt.sharding._views import Views

__all__ = ["OwnPart", "count_reals", "each_vector", "is_vector", "spans"]

# What LBFGS remembers with an element for each of all parameters, and lists of such. The rest of its state is numbers.
_VECTORS = ("d", "prev_flat_grad")
_HISTORIES = ("old_dirs", "old_stps")


def each_vector(state: Mapping[str, Any], change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """A copy of the state of LBFGS with ``change(vector, name)`` in the place of each vector over all parameters."""
    changed = dict(state)
    for name, value in state.items():
        if name in _VECTORS and value is not None:
            changed[name] = change(value, name)
        elif name in _HISTORIES and value is not None:
            changed[name] = [change(vector, name) for vector in value]
    return changed


def is_vector(name: str) -> bool:
    """Whether what LBFGS remembers by this name is a vector over all parameters, or a list of such."""
    return name in _VECTORS or name in _HISTORIES


def count_reals(parameter: torch.Tensor) -> int:
    """How many elements of a vector stand for ``parameter``: two for a complex number."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def spans(parameters: Sequence[torch.Tensor], blocks: Sequence[Block], rank: int) -> list[tuple[int, int]]:
    """Which elements ``start:stop`` of a vector over all parameters ``rank`` has, ascending, neighbours joined."""
    ends = list(accumulate(map(count_reals, parameters)))
    found: list[tuple[int, int]] = []
    for piece in sorted((p for block in blocks for p in block.pieces if p.rank == rank), key=lambda p: p.index):
        reals = 2 if parameters[piece.index].is_complex() else 1
        begin = ends[piece.index] - count_reals(parameters[piece.index])
        start, stop = begin + reals * piece.start, begin + reals * piece.stop
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found


class OwnPart(torch.optim.LBFGS):
    """Takes the place of the optimizer in one run of torch's ``LBFGS.step``, and gives it vectors of this rank's part.

    The methods overridden are all that ``step`` needs of the parameters.

    Args:
        groups: the optimizer's.
        parameters: all of them.
    """

    def __init__(self, groups: list[dict[str, Any]], parameters: list[torch.Tensor]) -> None:
        # Not torch's constructor, which would make groups of its own.
        self.param_groups = groups
        self._params = parameters
        self._entry: dict[str, Any] = {}
        self.state: Any = {parameters[0]: self._entry}
        self._dtype = reduce(torch.promote_types, (p.dtype.to_real() for p in parameters))
        self._members: list[Member] = []
        self._targets: list[torch.Tensor] = []
        self._changed = False
        self._views: Views | None = None
        self._comm: Communicator

    @property
    def is_ready(self) -> bool:
        """Whether it has been given views."""
        return self._views is not None

    def take(self, views: Views, comm: Communicator, state: Mapping[str, Any]) -> None:
        """Work on what ``views`` show, from ``state`` on, whose vectors are changed in place."""
        self._views, self._comm = views, comm
        self._members = [views.members[index] for index in sorted(views.members)]
        self._targets = [_as_reals(member.tensor) for member in self._members]
        self._entry.update(each_vector(state, lambda part, _: SplitVector(part, comm)))

    def plain_state(self) -> dict[str, Any]:
        """The state as the step has left it, with tensors."""
        return each_vector(self._entry, lambda vector, _: vector.part)

    def refresh(self) -> None:
        """See what has become of the parameters elsewhere."""
        assert self._views is not None
        self._views.refresh()

    def share(self) -> None:
        """Give all ranks this rank's part of the parameters, if the step has changed it. Collective."""
        if self._changed:
            assert self._views is not None
            with torch.no_grad():
                self._views.share(self._comm)
            self._changed = False

    def _begin(self) -> None:
        """This rank is about to change its part."""
        if not self._changed:
            assert self._views is not None
            self._views.begin()
            self._changed = True

    # What torch's step calls

    def _gather_flat_grad(self) -> SplitVector:
        parts = [_gradient(member).to(self._dtype) for member in self._members]
        empty = torch.empty(0, dtype=self._dtype, device=self._params[0].device)
        return SplitVector(torch.cat([empty, *parts]), self._comm)

    def _add_grad(self, step_size: Any, update: SplitVector) -> None:
        self._begin()
        parts = torch.split(update.part, [target.numel() for target in self._targets])
        for target, part in zip(self._targets, parts, strict=True):
            target.add_(part, alpha=step_size)

    def _clone_param(self) -> list[torch.Tensor]:
        return [target.clone() for target in self._targets]

    def _set_param(self, params_data: list[torch.Tensor]) -> None:
        self._begin()
        for target, data in zip(self._targets, params_data, strict=True):
            target.copy_(data)


def _as_reals(piece: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(piece).view(-1) if piece.is_complex() else piece


def _gradient(member: Member) -> torch.Tensor:
    """The member's part of the gradient; torch's LBFGS takes none for zero."""
    gradient, piece = member.parameter.grad, member.piece
    if gradient is None:
        return _as_reals(torch.zeros_like(member.tensor))
    dense = gradient.detach() if gradient.layout is torch.strided else gradient.detach().to_dense()
    return _as_reals(dense.reshape(-1)[piece.start : piece.stop].resolve_conj())
