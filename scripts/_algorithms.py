"""The optimizers and schedulers of torch, by name."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Their arguments are functions or other schedulers, which a command line cannot hold.
NOT_BY_NAME = ("ChainedScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR")
# These are made to move at each step, not at each epoch.
PER_STEP = ("CyclicLR", "OneCycleLR")


def optimizer_names() -> list[str]:
    """The algorithms of this torch.optim."""
    return _subclasses(torch.optim, Optimizer)


def scheduler_names() -> list[str]:
    """The schedulers of this torch.optim.lr_scheduler that can be made from plain values."""
    return [name for name in _subclasses(torch.optim.lr_scheduler, LRScheduler) if name not in NOT_BY_NAME]


def _subclasses(module: Any, base: type) -> list[str]:
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return sorted(name for name, cls in classes.items() if issubclass(cls, base) and cls is not base and name[0] != "_")


def check_optimizer_name(name: str) -> str:
    """The name of an algorithm that can train these models.

    Raises:
        argparse.ArgumentTypeError: torch.optim has no such algorithm, or it needs sparse gradients.
    """
    if name not in optimizer_names():
        raise argparse.ArgumentTypeError(
            f"torch.optim has no algorithm {name!r}; it has {', '.join(optimizer_names())}"
        )
    if name == "SparseAdam":
        raise argparse.ArgumentTypeError("SparseAdam needs sparse gradients, and this model has dense ones")
    return name


def check_scheduler_name(name: str) -> str:
    """The name of a scheduler that plain values can make.

    Raises:
        argparse.ArgumentTypeError: torch has no such scheduler, or a command line cannot hold its arguments.
    """
    if name in NOT_BY_NAME:
        raise argparse.ArgumentTypeError(f"{name} takes functions or schedulers, which cannot be given here")
    if name not in scheduler_names():
        raise argparse.ArgumentTypeError(f"torch has no scheduler {name!r}; it has {', '.join(scheduler_names())}")
    return name


def make_optimizers(name: str, model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> list[Optimizer]:
    """The torch optimizers that together train all parameters of the model.

    One optimizer, but for Muon: it takes matrices only, so the weights of linear layers are given to it and
    all other parameters to an AdamW.

    Args:
        name: the algorithm.
        model: what is trained.
        arguments: keyword arguments of the algorithm.
        adamw_lr: learning rate of the AdamW beside Muon.

    Raises:
        ValueError: the algorithm does not have such an argument, or does not accept its value.
    """
    algorithm = getattr(torch.optim, name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name != "Muon":
        return [_construct(algorithm, parameters, arguments, "--optimizer-args")]
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return [
        _construct(algorithm, [p for p in parameters if id(p) in matrices], arguments, "--optimizer-args"),
        torch.optim.AdamW([p for p in parameters if id(p) not in matrices], lr=adamw_lr),
    ]


def make_scheduler(name: str, optimizer: Optimizer, arguments: dict[str, Any], updates: int) -> LRScheduler:
    """The scheduler for one optimizer.

    Args:
        name: the scheduler.
        optimizer: whose learning rate it sets.
        arguments: keyword arguments of the scheduler.
        updates: how often it will move: the length of CosineAnnealingLR and OneCycleLR where none is given.

    Raises:
        ValueError: the scheduler does not have such an argument, or does not accept its value.
    """
    if name == "CosineAnnealingLR":
        arguments = {"T_max": updates} | arguments
    if name == "OneCycleLR" and not arguments.keys() & {"total_steps", "epochs", "steps_per_epoch"}:
        arguments = arguments | {"total_steps": updates}
    scheduler: LRScheduler = _construct(
        getattr(torch.optim.lr_scheduler, name), optimizer, arguments, "--scheduler-args"
    )
    return scheduler


def _construct(cls: type, target: Any, arguments: dict[str, Any], option: str) -> Any:
    """Call ``cls(target, **arguments)``; what is wrong with the arguments becomes one clear ValueError."""
    known = list(inspect.signature(cls).parameters.values())[1:]
    names = [p.name for p in known]
    unknown = [name for name in arguments if name not in names]
    if unknown:
        raise ValueError(f"{option}: {cls.__name__} has no argument {unknown[0]!r}; it has {', '.join(names)}")
    missing = [p.name for p in known if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ValueError(f"{cls.__name__} needs {option} {' '.join(f'{name}=...' for name in missing)}")
    try:
        return cls(target, **arguments)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        values = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"{cls.__name__}({values}): {error}") from error
