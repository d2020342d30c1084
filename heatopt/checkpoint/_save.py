"""Saving: what each rank writes is decided together, written apart, and published by rank 0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch

from heatopt.checkpoint._agreement import raise_together
from heatopt.checkpoint._claim import Claim
from heatopt.checkpoint._codec import TensorTable, dtype_name, encode
from heatopt.checkpoint._contents import (
    REPLICATED,
    check_objects,
    check_path,
    choose_communicator,
    encode_all,
    kind_of,
    parameters_of,
)
from heatopt.checkpoint._files import make_directories, make_temporary
from heatopt.checkpoint._manifest import Manifest, TensorEntry, rank_key
from heatopt.checkpoint._pieces import Content, cut, extent_of, fingerprint, pieces_of
from heatopt.checkpoint._random import generator_states
from heatopt.checkpoint._rank_file import hash_of
from heatopt.checkpoint._writing import SaveHandle, Writer, finish_pending
from heatopt.comm import Communicator
from heatopt.errors import CheckpointError, RankMismatchError
from heatopt.sharding import Part
from heatopt.sync import Call, meet_for

__all__ = ["save"]

Tensors = dict[str, torch.Tensor]


def save(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    sampler: Any = None,
    extra: Any = None,
    background: bool = False,
    comm: Communicator | None = None,
) -> SaveHandle:
    """Write a checkpoint: the directory ``path``, to which each rank adds its part. Collective.

    The state of the random generators of each rank is saved too. A checkpoint that is already at ``path`` is replaced
    when the new one is complete and on the disk, not before; whenever the job dies, :func:`heatopt.load` finds one of
    the two. Tensors that are equal on all ranks are written once, in even parts; one that differs (the running
    statistics of a BatchNorm layer, say) is written by each rank.

    Args:
        path: a directory, on a file system that all ranks share.
        model: its ``state_dict()`` is saved.
        optimizer: a :class:`DataParallelOptimizer` or any other torch optimizer.
        scheduler: anything with ``state_dict()`` and ``load_state_dict()``; likewise:
        scaler: a ``GradScaler``.
        sampler: a :class:`ResumableSampler`, say.
        extra: None, bool, int, float, str, tensors, and lists, tuples and dicts of these; ``load`` returns it.
        background: return once all is copied to host memory; a thread writes it.
        comm: the ranks; default: the optimizer's, or else :func:`heatopt.world`.

    Returns:
        A handle. With ``background=True`` its ``wait()``, which is collective, returns once the checkpoint is in place,
        or raises what went wrong, as does the next ``save``.

    Raises:
        TypeError: an argument of the wrong type, or a state or ``extra`` with something that a checkpoint cannot hold;
            the message names its place.
        ValueError: ``path`` is empty; or a state or ``extra`` holds itself, or a number of thousands of digits.
        RankMismatchError: on all ranks, if they save different things, or some are in another call of an optimizer.
        CheckpointError: on all ranks, if one of them cannot write, or its scheduler, say, cannot give its state, or
            another save is writing ``path``; whatever was at ``path`` is still there.
    """
    chosen = choose_communicator(comm, optimizer)
    finish_pending(chosen)
    meet_for(chosen, Call.SAVE)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "sampler": sampler}
    target = _check(chosen, path, objects, background)
    manifest, contents = _plan(chosen, objects, extra)
    temporary, claim = _make_temporary(chosen, target)
    writer = Writer(chosen.rank, chosen.size, temporary, target, manifest, contents)
    handle = SaveHandle(chosen, writer, claim, background)
    if not background:
        handle.wait()
    return handle


def _check(comm: Communicator, path: object, objects: dict[str, Any], background: object) -> str:
    """Compare the arguments of all ranks and return the absolute path."""
    target, error = "", None
    try:
        target = check_path(path)
        check_objects(objects)
        if not isinstance(background, bool):
            raise TypeError(f"background must be True or False, got {background!r}")
    except (TypeError, ValueError) as caught:
        error = caught
    raise_together(comm, error, "save(): comparison of arguments")
    given = [name for name, thing in objects.items() if thing is not None]
    comm.agree_on([os.path.basename(target), given, background], "save()")
    return target


def _plan(comm: Communicator, objects: dict[str, Any], extra: object) -> tuple[Manifest, list[Content]]:
    """Agree on what is in the checkpoint, and find this rank's pieces of it."""
    tensors, generators = TensorTable(), TensorTable()
    sections: dict[str, Any] = {}
    error = None
    try:
        sections = encode_all(objects, extra, tensors)
        random = encode(generator_states(), "random", generators)
    except (TypeError, ValueError, CheckpointError) as caught:
        error = caught
    raise_together(comm, error, "save(): reading of states")
    differing = _compare(comm, sections, tensors)
    _compare_tensors(comm, {name: t for name, t in tensors.items() if _section(name) not in differing}, differing)
    private = {name: t for name, t in tensors.items() if name in differing or _section(name) in differing}
    private |= generators
    common = {name: t for name, t in tensors.items() if name not in private}
    own_sections = {name: sections.pop(name) for name in differing if name in sections} | {"random": random}

    rows = comm.exchange_objects((own_sections, _entries(private)), "save(): states of each rank")
    manifest = Manifest(
        ranks=comm.size,
        kinds={name: kind_of(thing) for name, thing in objects.items() if thing is not None},
        parameters=parameters_of(objects["optimizer"]) if objects["optimizer"] is not None else [],
        sections=sections,
        rank_sections=[row[0] for row in rows],
        tensors=_entries(common) | _entries(tensors.parts),
    )
    for rank, (_, entries) in enumerate(rows):
        manifest.tensors |= {rank_key(rank, name): entry for name, entry in entries.items()}
    own = {rank_key(comm.rank, name): tensor for name, tensor in private.items()}
    return manifest, [*_share_of(comm, common), *_all_of(own), *_pieces_of_parts(tensors.parts)]


def _share_of(comm: Communicator, common: Tensors) -> Iterator[Content]:
    """This rank's even part of what all ranks have."""
    parts = cut([extent_of(name, tensor.dtype, tensor.numel()) for name, tensor in common.items()], comm.size)
    for name, pieces in groupby(parts[comm.rank], lambda piece: piece.name):
        yield Content(list(pieces), common[name])


def _all_of(own: Tensors) -> Iterator[Content]:
    for name, tensor in own.items():
        extent = extent_of(name, tensor.dtype, tensor.numel())
        if extent.count:
            yield Content(pieces_of(extent, 0, extent.count), tensor)


def _pieces_of_parts(parts: Mapping[str, Part]) -> Iterator[Content]:
    """What this rank alone has of tensors that are held in parts."""
    for name, part in parts.items():
        for start, own in part.own:
            factor = extent_of(name, part.dtype).count
            first, stop = start * factor, (start + own.numel()) * factor
            if first < stop:
                yield Content(pieces_of(extent_of(name, part.dtype, part.shape.numel()), first, stop), own, first)


def _section(name: str) -> str:
    return name.partition("/")[0]


def _entries(tensors: Mapping[str, torch.Tensor | Part]) -> dict[str, TensorEntry]:
    return {name: TensorEntry(dtype_name(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}


def _compare(comm: Communicator, sections: dict[str, Any], tensors: TensorTable) -> set[str]:
    """The sections that are not the same on all ranks, but for the numbers in tensors."""
    described: dict[str, list[Any]] = {name: [section] for name, section in sections.items()}
    for name, entry in (_entries(tensors) | _entries(tensors.parts)).items():
        described[_section(name)].append([name, entry.dtype, entry.shape])
    rows = comm.exchange_objects(
        {name: hash_of(json.dumps(content).encode()) for name, content in described.items()},
        "save(): comparison of states",
    )
    differing = {name for name in sections for row in rows if row.get(name) != rows[0].get(name)}
    for name in REPLICATED:
        if name in differing:
            rank = next(rank for rank, row in enumerate(rows) if row.get(name) != rows[0].get(name))
            raise RankMismatchError(
                f"save(): the state of the {name} has other names, shapes, dtypes or numbers "
                f"on rank {rank} than on rank 0"
            )
    return differing


def _compare_tensors(comm: Communicator, tensors: Tensors, differing: set[str]) -> None:
    """Add to ``differing`` the names of tensors whose bits are not the same on all ranks."""
    if comm.size == 1 or not tensors:
        return
    words = np.array([fingerprint(tensor) for tensor in tensors.values()], dtype=np.int64).reshape(-1)
    rows = comm.exchange_words(words, "save(): comparison of tensors")
    equal = (rows == rows[0]).all(axis=0).reshape(-1, 2).all(axis=1)
    differing.update(name for name, same in zip(tensors, equal, strict=True) if not same)


def _make_temporary(comm: Communicator, target: str) -> tuple[str, Claim | None]:
    """The directory that all ranks write to, made by rank 0, which has the claim to ``target``."""
    temporary, claim, error = "", None, None
    try:
        if comm.rank == 0:
            try:
                make_directories(os.path.dirname(target))
                claim = Claim(target)
                temporary = make_temporary(target)
            except (OSError, CheckpointError) as caught:
                error = caught
        raise_together(comm, error, "save(): new directory")
        temporary = comm.exchange_objects(temporary, "save(): name of the directory")[0]
        if not os.path.isdir(temporary):
            error = CheckpointError(f"rank {comm.rank} does not see {temporary}; all ranks must share its file system")
        raise_together(comm, error, "save(): common directory")
    except BaseException:
        if claim is not None:
            claim.release()
        raise
    return temporary, claim
