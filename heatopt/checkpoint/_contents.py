"""What the arguments of save and load hold: checks, and their state as encoded sections and tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from heatopt.checkpoint._codec import TensorTable, dtype_name, encode
from heatopt.comm import Communicator, world
from heatopt.errors import CheckpointError, HeatoptError
from heatopt.sharding import States

__all__ = [
    "REPLICATED",
    "check_objects",
    "check_path",
    "choose_communicator",
    "encode_all",
    "kind_of",
    "parameters_of",
    "states_of",
]

REPLICATED = ("model", "optimizer")
"""Sections whose structure must be equal on all ranks."""

_HOOKS = tuple(
    f"_optimizer_{call}_{when}_hooks" for call in ("state_dict", "load_state_dict") for when in ("pre", "post")
)

_STATEFUL = ("scheduler", "scaler", "sampler")


def check_path(path: object) -> str:
    """The absolute path, symbolic links followed.

    Raises:
        TypeError: not a path.
        ValueError: an empty one, or one with a null character.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"path must be a str or an os.PathLike of one, got {path!r} of type {type(path).__name__}")
    text = str(os.fspath(path))
    if not text or "\0" in text:
        raise ValueError(f"path must name a directory, got {text!r}")
    return os.path.realpath(text)


def check_objects(objects: Mapping[str, object]) -> None:
    """Check the arguments that are neither the path nor ``extra``.

    Raises:
        TypeError: one of them is not what its name says.
    """
    model, optimizer = objects.get("model"), objects.get("optimizer")
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    for name in _STATEFUL:
        thing = objects.get(name)
        methods = [getattr(thing, method, None) for method in ("state_dict", "load_state_dict")]
        if thing is not None and (isinstance(thing, type) or not all(map(callable, methods))):
            raise TypeError(f"{name} must have state_dict() and load_state_dict(), got {type(thing).__name__}")


def choose_communicator(comm: object, optimizer: object) -> Communicator:
    """The given one, or the optimizer's, or the world.

    Raises:
        TypeError: not a communicator.
    """
    if comm is not None and not isinstance(comm, Communicator):
        raise TypeError(f"comm must be a heatopt.comm.Communicator or None, got {type(comm).__name__}")
    if comm is None:
        # A plain torch optimizer has none; the wrapper is a layer above this one.
        comm = getattr(optimizer, "_comm", None)
    return comm if isinstance(comm, Communicator) else world()


def kind_of(thing: object) -> str:
    """Name of the class; of a wrapped optimizer that of torch's."""
    return type(getattr(thing, "torch_optimizer", thing)).__name__


def parameters_of(optimizer: torch.optim.Optimizer) -> list[list[tuple[str, list[int]]]]:
    """dtype and shape of the parameters, by group."""
    return [[(dtype_name(p.dtype), list(p.shape)) for p in group["params"]] for group in optimizer.param_groups]


def states_of(thing: object) -> States | None:
    """What holds the states of a wrapped optimizer in parts, perhaps; None for anything else.

    None too if the user's hooks look at its state dicts: they know torch's format, in which tensors are whole.
    """
    states = getattr(thing, "_states", None)  # the wrapper is a layer above this one
    if not isinstance(states, States):
        return None
    hooks = [getattr(each, name) for each in (thing, getattr(thing, "torch_optimizer", thing)) for name in _HOOKS]
    return None if any(hooks) else states


def _state_of(name: str, thing: Any) -> Any:
    states = states_of(thing)
    if states is not None:
        return states.state_dict_in_parts()
    try:
        return thing.state_dict()
    except HeatoptError:
        raise  # of a wrapped optimizer, whose ranks have met: all of them raise it
    except Exception as error:
        raise CheckpointError(f"the {name} cannot give its state: {type(error).__name__}: {error}") from error


def encode_all(objects: Mapping[str, Any], extra: object, tensors: TensorTable) -> dict[str, Any]:
    """Encode the state of each object that is not None, and ``extra``.

    Raises:
        TypeError: something that a checkpoint cannot hold.
        ValueError: the same, where it is a matter of the value.
        CheckpointError: an object cannot give its state.
    """
    names = [name for name, thing in objects.items() if thing is not None]
    # The optimizer's first: ranks may meet for it, so that none may have failed before.
    states = {name: _state_of(name, objects[name]) for name in sorted(names, key=lambda name: name != "optimizer")}
    sections = {name: encode(states[name], name, tensors) for name in names}
    sections["extra"] = encode(extra, "extra", tensors)
    return sections
