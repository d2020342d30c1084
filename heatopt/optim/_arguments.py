"""Checks of a user's arguments, with messages that say what was got and what is allowed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from heatopt.comm import Communicator, check_timeout
from heatopt.optim._flat import check_elementwise
from heatopt.sharding import check_shardable, check_takes_masters
from heatopt.sync import Compression, SyncSettings

__all__ = ["check_arguments", "listed_once", "parameter_names", "route_around_fused_sgd"]

_SHARDS = ("none", "state", "gradients")
_MODULES_WITH_SPARSE_WEIGHT = (torch.nn.Embedding, torch.nn.EmbeddingBag)


def check_arguments(
    optimizer: object,
    blocking: object = None,
    *,
    model: object,
    comm: object,
    timeout: object,
    shard: object,
    bucket_mb: object = None,
    accumulation_steps: object = 1,
    wire_dtype: object = None,
    reproducible: object = False,
    fuse: object = False,
    parameters_per_node: object = "own",
    master_dtype: object = None,
    compression: object = None,
) -> SyncSettings:
    """Return the settings.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of its range, an unknown choice, or an algorithm that cannot be fused or sharded, or
            have master weights.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"torch_optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            + (" (the class: make an instance of it first)" if isinstance(optimizer, type) else "")
        )
    if blocking is not None and not isinstance(blocking, bool):
        raise TypeError(f"blocking must be True, False or None, got {blocking!r}")
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
                name = parameter_names(model).get(id(parameter), position)
                raise ValueError(f"parameter {name!r} is not initialised (a lazy module's); run one forward pass first")
    if comm is not None and not isinstance(comm, Communicator):
        raise TypeError(f"comm must be a heatopt.comm.Communicator or None, got {type(comm).__name__}")
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int):
        raise TypeError(f"accumulation_steps must be an integer >= 1, got {accumulation_steps!r}")
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be an integer >= 1, got {accumulation_steps!r}")
    if not isinstance(fuse, bool):
        raise TypeError(f"fuse must be True or False, got {fuse!r}")
    if fuse:
        check_elementwise(optimizer)
    shard = _check_shard(shard, optimizer, fuse)
    return SyncSettings(
        algorithm=type(optimizer).__name__,
        bucket_mb=_check_bucket_mb(bucket_mb),
        accumulation_steps=accumulation_steps,
        blocking=blocking,
        wire_dtype=_check_wire_dtype(wire_dtype, reproducible),
        reproducible=bool(reproducible),
        timeout=None if timeout is None else check_timeout(timeout),
        sparse=_sparse_parameters(optimizer, model),
        fuse=fuse,
        shard=shard,
        parameters_per_node=_check_parameters_per_node(parameters_per_node, shard),
        master_dtype=_check_master_dtype(master_dtype, optimizer, fuse),
        compression=_check_compression(compression, optimizer, shard, wire_dtype),
    )


def _check_shard(shard: object, optimizer: torch.optim.Optimizer, fuse: bool) -> str:
    if not isinstance(shard, str):
        raise TypeError(f"shard must be one of {', '.join(map(repr, _SHARDS))}, got {shard!r}")
    if shard not in _SHARDS:
        raise ValueError(f"shard must be one of {', '.join(map(repr, _SHARDS))}, got {shard!r}")
    if shard != "none":
        check_shardable(optimizer, shard)
        if fuse:
            raise ValueError(f"fuse=True and shard={shard!r} cannot be combined yet; choose one of them")
    return shard


def _check_parameters_per_node(choice: object, shard: str) -> str:
    allowed = "parameters_per_node must be 'own' or 'shared'"
    if not isinstance(choice, str):
        raise TypeError(f"{allowed}, got {choice!r}")
    if choice not in ("own", "shared"):
        raise ValueError(f"{allowed}, got {choice!r}")
    if choice == "shared" and shard == "none":
        raise ValueError(
            "parameters_per_node='shared' needs shard='state' or 'gradients', with which each rank updates its part of "
            "the parameters, got shard='none'; choose one of these, or parameters_per_node='own'"
        )
    return choice


def _check_master_dtype(master_dtype: object, optimizer: torch.optim.Optimizer, fuse: bool) -> torch.dtype | None:
    if master_dtype is None:
        return None
    if not isinstance(master_dtype, torch.dtype):
        raise TypeError(f"master_dtype must be torch.float32, torch.float64 or None, got {master_dtype!r}")
    if master_dtype not in (torch.float32, torch.float64):
        raise ValueError(f"master_dtype must be torch.float32, torch.float64 or None, got {master_dtype}")
    check_takes_masters(optimizer)
    if fuse:
        raise ValueError("fuse=True and master_dtype cannot be combined yet; choose one of them")
    return master_dtype


def _check_compression(
    compression: object, optimizer: torch.optim.Optimizer, shard: str, wire_dtype: object
) -> Compression | None:
    if compression is None:
        return None
    if not isinstance(compression, Compression):
        raise TypeError(
            "compression must be a heatopt.Compression, such as heatopt.TopK(0.01), or None, got "
            + (f"the class {compression.__name__}: make an instance of it" if isinstance(compression, type) else "")
            + ("" if isinstance(compression, type) else repr(compression))
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "compression is not for LBFGS: its line search and history compare gradients at different points, which "
            "gradients that are sent later cannot be; use compression=None or another algorithm"
        )
    if shard == "gradients":
        raise ValueError(
            "compression and shard='gradients' cannot be combined: every rank receives the compressed gradients of all "
            "and sums them up whole, so there is no part to keep alone; use shard='state' with compression"
        )
    if wire_dtype is not None:
        raise ValueError(
            "compression and wire_dtype cannot be combined: both say what travels of a gradient; choose one of them, "
            "or round the values in a heatopt.Compression of your own"
        )
    return compression


def _check_bucket_mb(bucket_mb: object) -> float | None:
    if bucket_mb is None:
        return None
    if isinstance(bucket_mb, bool) or not isinstance(bucket_mb, (int, float)):
        raise TypeError(f"bucket_mb must be a number of MiB or None, got {bucket_mb!r}")
    if not bucket_mb > 0 or math.isinf(bucket_mb):
        raise ValueError(f"bucket_mb must be a positive, finite number of MiB, got {bucket_mb!r}")
    return float(bucket_mb)


def _check_wire_dtype(wire_dtype: object, reproducible: object) -> torch.dtype | None:
    if not isinstance(reproducible, bool):
        raise TypeError(f"reproducible must be True or False, got {reproducible!r}")
    if wire_dtype is None:
        return None
    if not isinstance(wire_dtype, torch.dtype):
        raise TypeError(f"wire_dtype must be torch.bfloat16, torch.float16 or None, got {wire_dtype!r}")
    if wire_dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"wire_dtype must be torch.bfloat16, torch.float16 or None, got {wire_dtype}")
    if reproducible:
        raise ValueError(
            "wire_dtype rounds what crosses the network, so the result depends on which ranks share a node; "
            "reproducible=True promises that it does not: choose one of them"
        )
    return wire_dtype


def _sparse_parameters(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> tuple[int, ...]:
    """Indices of the parameters that are known to get sparse gradients, so that no dense buffer is made for them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, torch.optim.SparseAdam):
        return tuple(range(len(parameters)))
    modules = model.modules() if model is not None else ()
    sparse = {id(m.weight) for m in modules if isinstance(m, _MODULES_WITH_SPARSE_WEIGHT) and m.sparse}
    return tuple(index for index, parameter in enumerate(parameters) if id(parameter) in sparse)


def parameter_names(model: torch.nn.Module | None) -> dict[int, str]:
    """Name of each parameter of ``model``, by ``id``."""
    return {id(p): name for name, p in model.named_parameters()} if model is not None else {}


def listed_once(param_group: Any) -> tuple[Any, list[torch.Tensor]]:
    """The group, with a list in the place of a generator, which can be read once, and its parameters."""
    members = param_group.get("params") if isinstance(param_group, dict) else None
    if isinstance(members, torch.Tensor):
        return param_group, [members]
    if not isinstance(members, Iterable):
        return param_group, []
    listed = list(members)
    found = [member[1] if isinstance(member, tuple) else member for member in listed]
    # A set is torch's to refuse.
    return (param_group if isinstance(members, set) else {**param_group, "params": listed}), found


def route_around_fused_sgd(optimizer: torch.optim.Optimizer, groups: Iterable[dict[str, Any]]) -> None:
    """Turn ``fused`` off where torch's fused SGD is wrong: half types on a CPU are not updated (pytorch#191763)."""
    for group in groups if isinstance(optimizer, torch.optim.SGD) else ():
        on_cpu = (p.dtype for p in group["params"] if p.device.type == "cpu")
        if group.get("fused") and any(dtype in (torch.float16, torch.bfloat16) for dtype in on_cpu):
            group["fused"] = False
            warnings.warn(
                "torch's fused SGD does not update float16 and bfloat16 parameters on a CPU correctly; "
                "heatopt uses fused=False for this parameter group",
                UserWarning,
                stacklevel=4,
            )
