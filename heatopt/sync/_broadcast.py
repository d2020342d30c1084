"""Make all ranks start equal: parameters, buffers, optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from heatopt.comm import Communicator
from heatopt.errors import RankMismatchError

__all__ = ["average_tensors", "broadcast_state", "broadcast_tensors", "start_equal"]

# Many small tensors travel together, up to this many bytes.
_CHUNK_BYTES = 16 * 2**20


@torch.no_grad()
def broadcast_tensors(comm: Communicator, tensors: Iterable[torch.Tensor], root: int, what: str) -> None:
    """Overwrite ``tensors`` with those of ``root``, bit for bit, whatever their dtypes. Collective."""
    if comm.size == 1:
        return
    for chunk in _chunks(tensors):
        packed = torch.cat([_as_bytes(t.detach()).to(chunk[0].device) for t in chunk])
        comm.broadcast_bytes(packed, root, what)
        if comm.rank != root:
            offset = 0
            for tensor in chunk:
                piece = packed[offset : offset + tensor.nbytes].to(tensor.device)
                offset += tensor.nbytes
                tensor.detach().copy_(piece.clone().view(tensor.dtype).view(tensor.shape))


def _chunks(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        if chunk and (size + tensor.nbytes > _CHUNK_BYTES or tensor.device != chunk[0].device):
            yield chunk
            chunk, size = [], 0
        chunk.append(tensor)
        size += tensor.nbytes
    if chunk:
        yield chunk


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@torch.no_grad()
def average_tensors(comm: Communicator, tensors: Iterable[torch.Tensor]) -> None:
    """Replace floating tensors by their mean over ranks, others by those of rank 0. Collective."""
    discrete = []
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            comm.allreduce(tensor, "mean")
        else:
            discrete.append(tensor)
    broadcast_tensors(comm, discrete, 0, "broadcast of integer buffers")


@torch.no_grad()
def broadcast_state(comm: Communicator, optimizer: torch.optim.Optimizer, root: int) -> None:
    """Overwrite the state and the groups' options of ``optimizer`` with those of ``root``, bit for bit. Collective.

    The parameters of the groups must correspond. Tensors are written in place where shape and dtype allow. What the
    optimizer has a state for is in the order of ``root`` then, as are its state dict's entries.
    """
    if comm.size == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {p: index for index, p in enumerate(parameters)}
    mine = {index_of[p]: _skeleton(entries) for p, entries in optimizer.state.items() if p in index_of}
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    theirs, their_options = comm.exchange_objects((mine, options) if comm.rank == root else None)[root] or (
        mine,
        options,
    )
    tensors: list[torch.Tensor] = []
    former = {p: optimizer.state.pop(p) for p in parameters if p in optimizer.state}
    for index, wanted in theirs.items():
        parameter = parameters[index]
        optimizer.state[parameter] = entries = former.get(parameter, {})
        old = dict(entries)
        entries.clear()
        entries.update((key, _fill(old.get(key), value, parameter, tensors)) for key, value in wanted.items())
    for group, found in zip(optimizer.param_groups, their_options, strict=True):
        group.update({k: v for k, v in found.items() if not isinstance(v, torch.Tensor)})
        for key, value in found.items():
            if isinstance(value, torch.Tensor):
                group[key] = group[key].copy_(value) if isinstance(group.get(key), torch.Tensor) else value
    broadcast_tensors(comm, tensors, root, "broadcast of optimizer state")


class _Placeholder:
    """Stands for a tensor while the structure of a state travels."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.on_cpu = tensor.device.type == "cpu"
        self.sparse_parts = _sparse_parts(tensor) if tensor.is_sparse else None

    def allocate(self, parameter: torch.Tensor) -> torch.Tensor:
        """Memory for the tensor on this rank."""
        device = torch.device("cpu") if self.on_cpu else parameter.device
        if self.sparse_parts is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        indices, values = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in self.sparse_parts)
        return torch.sparse_coo_tensor(indices, values, self.shape, is_coalesced=True, check_invariants=False)

    def fits(self, present: object) -> bool:
        """True if ``present`` can be overwritten in place."""
        if not isinstance(present, torch.Tensor) or (tuple(present.shape), present.dtype) != (self.shape, self.dtype):
            return False
        parts = _sparse_parts(present) if present.is_sparse else None
        return parts == self.sparse_parts and (parts is None or present.is_coalesced())


def _sparse_parts(tensor: torch.Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the indices and values of the coalesced tensor."""
    tensor = tensor.coalesce()
    return [(tuple(part.shape), part.dtype) for part in (tensor.indices(), tensor.values())]


def _skeleton(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Placeholder(value)
    if isinstance(value, dict):
        return {key: _skeleton(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_skeleton(item) for item in value)
    return value


def _fill(present: Any, wanted: Any, parameter: torch.Tensor, tensors: list[torch.Tensor]) -> Any:
    """Return ``wanted`` with memory for its tensors, which are appended to ``tensors`` in a fixed order."""
    if isinstance(wanted, _Placeholder):
        if wanted.sparse_parts is not None and isinstance(present, torch.Tensor) and present.is_sparse:
            present = present.coalesce()
        target = present if wanted.fits(present) else wanted.allocate(parameter)
        tensors.extend((target._indices(), target._values()) if target.is_sparse else (target,))
        return target
    if isinstance(wanted, dict):
        old = present if isinstance(present, dict) else {}
        return {key: _fill(old.get(key), value, parameter, tensors) for key, value in wanted.items()}
    if isinstance(wanted, (list, tuple)):
        old_items = list(present) if isinstance(present, (list, tuple)) else []
        old_items += [None] * (len(wanted) - len(old_items))
        return type(wanted)(_fill(o, w, parameter, tensors) for o, w in zip(old_items, wanted, strict=False))
    return wanted


def start_equal(comm: Communicator, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> None:
    """Give every rank rank 0's parameters, the buffers of ``model`` and the optimizer's state. Collective."""
    if comm.size == 1:
        return
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    if model is not None:
        known = {id(tensor) for tensor in tensors}
        tensors += [p for p in model.parameters() if id(p) not in known]
        tensors += list(model.buffers())
    broadcast_tensors(comm, tensors, 0, "the broadcast of parameters")
    counts = comm.exchange_objects(len(optimizer.state), "comparison of optimizer states")
    for rank, count in enumerate(counts):
        if count != counts[0]:
            raise RankMismatchError(
                f"optimizer state: rank 0 has it for {counts[0]} parameters, rank {rank} for {count}; load it on "
                "all ranks before the construction, or on rank 0 after it and call broadcast_optimizer_state"
            )
    if counts[0]:
        broadcast_state(comm, optimizer, 0)
