"""How each algorithm may be sharded without changing what it computes. Pure."""

from __future__ import annotations

from enum import Enum

import torch

__all__ = ["NUMBERS", "Manner", "check_shardable", "check_takes_masters", "cost_of", "keeps_state", "manner_of"]


class Manner(Enum):
    """What of a parameter an update of it needs."""

    ELEMENTWISE = "elementwise"  # an element needs itself alone: tensors may be cut anywhere
    WHOLE_TENSOR = "whole tensor"  # norms or products of the tensor: it has one owner
    WHOLE_PROBLEM = "whole problem"  # inner products over all parameters
    UNKNOWN = "unknown"  # not torch's own: taken for one that needs whole tensors


_MANNERS: dict[type[torch.optim.Optimizer], Manner] = {
    torch.optim.ASGD: Manner.ELEMENTWISE,
    torch.optim.Adadelta: Manner.ELEMENTWISE,
    torch.optim.Adagrad: Manner.ELEMENTWISE,
    torch.optim.Adam: Manner.ELEMENTWISE,
    torch.optim.AdamW: Manner.ELEMENTWISE,
    torch.optim.Adamax: Manner.ELEMENTWISE,
    torch.optim.NAdam: Manner.ELEMENTWISE,
    torch.optim.RAdam: Manner.ELEMENTWISE,
    torch.optim.RMSprop: Manner.ELEMENTWISE,
    torch.optim.Rprop: Manner.ELEMENTWISE,
    torch.optim.SGD: Manner.ELEMENTWISE,
    torch.optim.Adafactor: Manner.WHOLE_TENSOR,
    torch.optim.Muon: Manner.WHOLE_TENSOR,
    torch.optim.SparseAdam: Manner.WHOLE_TENSOR,
    torch.optim.LBFGS: Manner.WHOLE_PROBLEM,
}

NUMBERS = ("step", "mu_product", "eta", "mu")
"""Names of the states that are one number per parameter, in elementwise algorithms."""


def manner_of(optimizer: torch.optim.Optimizer) -> Manner:
    """What the updates of ``optimizer`` need. A subclass may compute anything, so its base says nothing."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return Manner.WHOLE_PROBLEM
    return _MANNERS.get(type(optimizer), Manner.UNKNOWN)


def check_shardable(optimizer: torch.optim.Optimizer, shard: str) -> None:
    """Raise ValueError if what ``shard`` names of ``optimizer`` cannot be sharded."""
    whole_problem = manner_of(optimizer) is Manner.WHOLE_PROBLEM
    if whole_problem and shard == "gradients":
        raise ValueError(
            f"shard='gradients' cannot shard {type(optimizer).__name__} yet; use shard='state', which divides its "
            "history: that is most of what it keeps"
        )
    if whole_problem and type(optimizer) is not torch.optim.LBFGS:
        raise ValueError(
            f"shard='state' can shard LBFGS itself, but not {type(optimizer).__name__}: what a subclass computes with "
            "vectors over all parameters is not known; use shard='none'"
        )
    _refuse_delegation(optimizer, f"shard={shard!r}")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(f"shard={shard!r} cannot update parameter groups with differentiable=True; use shard='none'")


def check_takes_masters(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if ``optimizer`` cannot update other tensors in the place of its parameters."""
    name = type(optimizer).__name__
    if manner_of(optimizer) is Manner.WHOLE_PROBLEM:
        raise ValueError(
            f"master_dtype cannot be used with {name}, whose closure needs the parameters rounded within a step; leave "
            "it out, and give the model parameters of a wider dtype"
        )
    _refuse_delegation(optimizer, "master_dtype")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("master_dtype cannot be used with parameter groups with differentiable=True; leave it out")


def _refuse_delegation(optimizer: torch.optim.Optimizer, setting: str) -> None:
    """Raise ValueError if another optimizer makes the updates of ``optimizer``, with groups of its own."""
    for name, value in vars(optimizer).items():
        if isinstance(value, torch.optim.Optimizer):
            raise ValueError(
                f"{setting} cannot be used with {type(optimizer).__name__}, which has another optimizer, {name!r}, "
                "update the parameters: that one would not see the tensors that are to be updated in their place; "
                "wrap that one, or leave the setting out"
            )


def keeps_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether parameters that are updated have a state afterwards. Of algorithms that are not torch's it is assumed."""
    return type(optimizer) is not torch.optim.SGD or any(group["momentum"] for group in optimizer.param_groups)


def cost_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    """What an update of the whole ``parameter`` costs, in comparison with others of the same optimizer."""
    if isinstance(optimizer, torch.optim.Muon) and parameter.dim() == 2:
        small, large = sorted(parameter.shape)  # Newton-Schulz multiplies it with its square of the smaller side
        return large * small * small
    return parameter.numel()
