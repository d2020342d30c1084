"""Does a checkpoint fit the objects that it is to be loaded into? Asked before any of them is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from heatopt.checkpoint._codec import dtype_name
from heatopt.checkpoint._contents import kind_of, parameters_of
from heatopt.checkpoint._manifest import Manifest, TensorEntry
from heatopt.checkpoint._reader import Reader
from heatopt.errors import CheckpointError

__all__ = ["check_fit"]


def check_fit(directory: str, manifest: Manifest, reader: Reader, given: Mapping[str, Any]) -> None:
    """Compare names, shapes, dtypes and classes.

    Raises:
        CheckpointError: names the first difference.
    """
    for name, thing in given.items():
        if not manifest.has(name):
            raise CheckpointError(f"{directory} has no {name}; it has {', '.join(sorted(manifest.kinds)) or 'none'}")
        saved, found = manifest.kinds[name], kind_of(thing)
        if name in ("optimizer", "scheduler") and saved != found:
            raise CheckpointError(f"{directory} has the {name} {saved}, which does not fit {found}")
    if "model" in given:
        _check_model(directory, reader.outline("model"), given["model"])
    if "optimizer" in given:
        _check_parameters(directory, manifest, given["optimizer"])


def _check_model(directory: str, saved: Mapping[str, Any], model: torch.nn.Module) -> None:
    present = model.state_dict()
    for name in present:
        if name not in saved:
            raise CheckpointError(f"{directory} does not fit the model: it has no {name!r}")
    for name, entry in saved.items():
        if name not in present:
            raise CheckpointError(f"{directory} does not fit the model, which has no {name!r}")
        tensor = present[name]
        if isinstance(entry, TensorEntry) and isinstance(tensor, torch.Tensor):
            theirs, ours = (entry.dtype, list(entry.shape)), (dtype_name(tensor.dtype), list(tensor.shape))
            if theirs != ours:
                raise CheckpointError(
                    f"{directory} does not fit the model: {name!r} is {theirs[0]} of shape {tuple(theirs[1])} there, "
                    f"but {ours[0]} of shape {tuple(ours[1])} in the model"
                )


def _check_parameters(directory: str, manifest: Manifest, optimizer: torch.optim.Optimizer) -> None:
    saved = [[(dtype, list(shape)) for dtype, shape in group] for group in manifest.parameters]
    present = parameters_of(optimizer)
    counts = [[len(group) for group in groups] for groups in (saved, present)]
    if counts[0] != counts[1]:
        raise CheckpointError(
            f"{directory} does not fit the optimizer: its groups have {counts[0]} parameters there, "
            f"but {counts[1]} here"
        )
    for number, (theirs, ours) in enumerate(zip(saved, present, strict=True)):
        for index, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            if their != our:
                raise CheckpointError(
                    f"{directory} does not fit the optimizer: parameter {index} of group {number} is {their[0]} "
                    f"of shape {tuple(their[1])} there, but {our[0]} of shape {tuple(our[1])} here"
                )
