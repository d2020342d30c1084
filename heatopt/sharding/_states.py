"""What a data-parallel optimizer needs of its optimizer's states, and the case that each rank has all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from heatopt.sharding._layout import Layout

__all__ = [
    "AroundStates",
    "Carried",
    "States",
    "Wanted",
    "WholeStates",
    "as_state",
    "copied",
    "replace_entry",
    "uncast",
]

Wanted = Callable[[int, str, torch.Size], Sequence[tuple[int, int]] | None]
"""First and end elements of what a rank takes of a state; None if it takes no state of that parameter.

By index of the parameter, name and shape of the state.
"""


class Carried(NamedTuple):
    """What a copy of an optimizer has from it beside its attributes."""

    layout: Layout | None = None
    """Which pieces its states are of; None if they are whole."""
    unsent: Any = None
    """What :meth:`Residuals.contents` gives; None if gradients are not compressed."""


class States(ABC):
    """The states of one torch optimizer.

    Args:
        optimizer: whose states they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def require(self, parameter: torch.Tensor) -> int:
        """Return the index of ``parameter``; ValueError if it is not the optimizer's."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for index, own in enumerate(parameters):
            if own is parameter:
                return index
        raise ValueError("param is not a parameter of this optimizer")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The plain optimizer's state dict."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the plain optimizer's state dict."""

    # For checkpoints. A rank that holds a part of the states writes and reads that part, and never has the whole.

    def state_dict_in_parts(self) -> dict[str, Any]:
        """The plain optimizer's state dict, with a ``Part`` for each tensor that ranks hold in parts. Collective."""
        return self.state_dict()

    def wanted_elements(self) -> Wanted | None:
        """What this rank takes of states that are loaded in parts; None if it takes the whole. Collective."""
        return None

    def hold_parts(self, order: Sequence[int]) -> None:  # noqa: B027 (whoever wants the whole never gets parts)
        """Take what has just been loaded for what ``wanted_elements`` asked for. Do so on all ranks.

        Args:
            order: indices of all parameters that have a state on some rank, in the order of the whole state dict.
        """

    @abstractmethod
    def get(self, parameter: torch.Tensor) -> dict[str, Any]:
        """A copy of the whole state of ``parameter``. Raises ValueError if it is not the optimizer's."""

    @abstractmethod
    def set(self, parameter: torch.Tensor, name: str, value: Any) -> None:
        """Replace one entry of the state of ``parameter``.

        Raises:
            TypeError: the entry is a tensor, and ``value`` cannot be one.
            ValueError: not the optimizer's parameter, or of another shape than the entry.
        """

    def write(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Overwrite a parameter of the optimizer with ``value``, which is equal on all ranks. Do so on all ranks."""
        with torch.no_grad():
            parameter.copy_(value)

    @abstractmethod
    def gather(self, root: int | None = None) -> None:
        """Let each rank hold the whole states until the next update; at least ``root``, if its are about to be sent."""

    @abstractmethod
    def kept_whole(self) -> AbstractContextManager[None]:
        """Context in which each rank holds, and updates, all."""

    @abstractmethod
    def carried(self) -> Carried:
        """What a copy of the optimizer needs beside its attributes."""


class AroundStates(States):
    """States that are held by others; a subclass adds to what these do.

    Args:
        optimizer: whose states they are.
        states: hold them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, states: States) -> None:
        super().__init__(optimizer)
        self._states = states

    def wanted_elements(self) -> Wanted | None:
        return self._states.wanted_elements()

    def hold_parts(self, order: Sequence[int]) -> None:
        self._states.hold_parts(order)

    def get(self, parameter: torch.Tensor) -> dict[str, Any]:
        return self._states.get(parameter)

    def set(self, parameter: torch.Tensor, name: str, value: Any) -> None:
        self._states.set(parameter, name, value)

    def write(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        self._states.write(parameter, value)

    def gather(self, root: int | None = None) -> None:
        self._states.gather(root)

    def kept_whole(self) -> AbstractContextManager[None]:
        return self._states.kept_whole()

    def carried(self) -> Carried:
        return self._states.carried()


class WholeStates(States):
    """Each rank has all states, equal on all of them: nothing is to be done."""

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)

    def get(self, parameter: torch.Tensor) -> dict[str, Any]:
        self.require(parameter)
        return copied(self._optimizer.state.get(parameter, {}))

    def set(self, parameter: torch.Tensor, name: str, value: Any) -> None:
        self.require(parameter)
        replace_entry(self._optimizer.state[parameter], name, value)

    def gather(self, root: int | None = None) -> None:
        pass

    def kept_whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def carried(self) -> Carried:
        return Carried()


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with memory of its own."""
    return {key: _copy(value) for key, value in state.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [_copy(item) for item in value] if isinstance(value, list) else value


def as_state(name: str, value: Any, shape: torch.Size) -> torch.Tensor:
    """``value`` as a tensor that can replace the state ``name`` of ``shape``.

    Raises:
        TypeError: nothing that a tensor can be made of.
        ValueError: of another shape.
    """
    try:
        given = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"state {name!r} is a tensor, which cannot be made of this {type(value).__name__}: {error}"
        ) from None
    if given.shape != shape:
        raise ValueError(f"state {name!r} has shape {tuple(shape)}, got {tuple(given.shape)}")
    return given


def replace_entry(state: dict[str, Any], name: str, value: Any) -> None:
    """Set one entry; a tensor that is there keeps its dtype, device and memory."""
    present = state.get(name)
    if not isinstance(present, torch.Tensor):
        state[name] = _copy(value)
        return
    with torch.no_grad():
        present.copy_(as_state(name, value, present.shape))


def uncast(loaded: Any, saved: Any) -> Any:
    """``loaded``, what torch has made of ``saved``, with tensors of ``saved`` where the dtypes differ, and its texts.

    torch takes a text for a sequence of values to be cast, and makes the text of a generator of it.
    """
    if isinstance(loaded, torch.Tensor) and isinstance(saved, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(saved, dict):
        for key in loaded:
            if key in saved:
                loaded[key] = uncast(loaded[key], saved[key])
        return loaded
    if isinstance(loaded, (list, tuple)) and isinstance(saved, (list, tuple)) and len(loaded) == len(saved):
        return type(loaded)(uncast(one, other) for one, other in zip(loaded, saved, strict=True))
    return saved if isinstance(saved, str) else loaded
