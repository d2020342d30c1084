"""What this rank has not sent yet of its gradients.

[Note: Residuals]
A residual changes when an update uses the averages to which it belongs, and not before: a reduction leaves the next
residuals beside those in use, an update takes them over, and clearing the gradients, or giving them up because they
overflowed, drops them. So a step that is skipped leaves no trace. A further reduction before the update goes on from
the next residuals, since ``p.grad`` has what was sent.

A gradient that is not finite on a rank travels as it is, so that every rank sees it, and leaves the residual of that
parameter on that rank as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from heatopt._log import logger
from heatopt.comm import Communicator

__all__ = ["Residuals", "residual_dtype"]

_HALF = (torch.float16, torch.bfloat16)


class Residuals:
    """The residuals of one optimizer's parameters, by index; see [Note: Residuals].

    Args:
        comm: the ranks.
        contents: those of the object of which this one is a copy; see :meth:`contents`.
    """

    def __init__(self, comm: Communicator, contents: Any = None) -> None:
        self._place = (comm.rank, comm.size)
        self._kept: dict[int, torch.Tensor] = {}  # flat, in the order of the parameter's indices
        self._next: dict[int, torch.Tensor | None] = {}  # after the last reduction; None: all has been sent
        self._untouched: set[int] = set()  # of these, with an average that was not zero and has got nothing since
        # Those that some rank may have something of, so that state dicts of all ranks have the same names.
        self._known: set[int] = set()
        self.sent_bytes = 0
        """Bytes that this rank has handed over for each of the others, so far."""
        if contents is not None and contents["place"] == self._place:
            self._kept, self._next, self._known = contents["kept"], contents["next"], contents["known"]
        elif contents is not None and comm.size > 1:
            logger.warning(
                "the copy of an optimizer has the residuals of rank %d of %d, this is rank %d of %d: it starts without",
                *(*contents["place"], *self._place),
            )

    def current(self, index: int) -> torch.Tensor | None:
        """What a reduction is to add to the gradient; None for nothing."""
        return self._next[index] if index in self._next else self._kept.get(index)

    def leave(self, index: int, residual: torch.Tensor | None, averages: bool) -> None:
        """A reduction has left this, which belongs to the residuals from now on.

        Args:
            index: of the parameter.
            residual: what is still to be sent.
            averages: whether the average has other elements than 0.
        """
        self._next[index] = residual
        (self._untouched.add if averages else self._untouched.discard)(index)

    def note_reduced(self, index: int) -> None:
        """Some rank has had a gradient of this parameter, and may have a residual. Alike on all ranks."""
        self._known.add(index)

    def note_arrival(self, index: int) -> None:
        """Something is being added to the average of this parameter."""
        self._untouched.discard(index)

    @property
    def are_open(self) -> bool:
        """True between a reduction and the update that uses it."""
        return bool(self._next)

    def open_indices(self) -> list[int]:
        """The parameters of which that is so."""
        return list(self._next)

    def commit(self) -> None:
        """An update has used the averages."""
        for index, residual in self._next.items():
            if residual is None:
                self._kept.pop(index, None)
            else:
                self._kept[index] = residual
        self.roll_back()

    def roll_back(self) -> None:
        """The averages will not be used, or have been."""
        self._next = {}
        self._untouched = set()

    def roll_back_cleared(self, parameters: Sequence[torch.Tensor], zeros: bool = False) -> None:
        """The same for parameters without a gradient; copies, made before the update, have none.

        Args:
            parameters: all.
            zeros: an average that was not zero, and is now, has been cleared as well.
        """
        for index in self.open_indices():
            gradient = parameters[index].grad
            if gradient is None or (zeros and index in self._untouched and not gradient.count_nonzero()):
                del self._next[index]

    def rescale(self, factor: float) -> None:
        """Gradients come multiplied by ``factor`` from now on."""
        self._kept = {index: residual * factor for index, residual in self._kept.items()}
        self._next = {index: None if e is None else e * factor for index, e in self._next.items()}

    # State dicts and copies

    def __contains__(self, index: int) -> bool:
        return index in self._known

    def state(self, parameters: Mapping[str, tuple[int, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Those in use by the name of their parameter, in its shape; zeros for one that has none here.

        A frozen parameter is left out, unless some rank may have something of it.

        Args:
            parameters: number and tensor of each.
        """
        return {
            name: self._kept[index].view(parameter.shape)
            if index in self._kept
            else torch.zeros(parameter.shape, dtype=residual_dtype(parameter.dtype), device=parameter.device)
            for name, (index, parameter) in parameters.items()
            if parameter.requires_grad or index in self._known
        }

    def load(self, saved: Mapping[str, torch.Tensor], parameters: Mapping[str, tuple[int, torch.Tensor]]) -> None:
        """Take over what :meth:`state` has given.

        Raises:
            ValueError: it has a name that no parameter has here, or a residual of another shape.
        """
        found: dict[int, torch.Tensor] = {}
        known: set[int] = set()
        for name, residual in saved.items():
            if name not in parameters:
                raise ValueError(
                    f"the state dict has a residual of {name!r}, which is none of the parameters that are compressed "
                    f"here ({', '.join([*parameters][:3])}, ...); names come from model=: give it as it was given then"
                )
            index, parameter = parameters[name]
            if residual.shape != parameter.shape:
                raise ValueError(
                    f"the residual of {name!r} has shape {tuple(residual.shape)}, but the parameter "
                    f"{tuple(parameter.shape)}"
                )
            known.add(index)
            if residual.count_nonzero():
                dtype = residual_dtype(parameter.dtype)
                found[index] = residual.detach().to(parameter.device, dtype, copy=True).reshape(-1)
        self._kept, self._known = found, known
        self.roll_back()

    def contents(self) -> Any:
        """What a copy of the optimizer needs; None if there is nothing."""
        if not self._known:
            return None
        return {"kept": self._kept, "next": self._next, "known": self._known, "place": self._place}


def residual_dtype(dtype: torch.dtype) -> torch.dtype:
    """Wide enough for sums of many gradients that are each smaller than the last bit of what is there."""
    return torch.float32 if dtype in _HALF else dtype
