"""Loading: everything is read and compared first, on all ranks, and only then put in place."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from heatopt._log import logger
from heatopt.checkpoint._agreement import raise_together
from heatopt.checkpoint._contents import check_objects, check_path, choose_communicator, states_of
from heatopt.checkpoint._files import MANIFEST, find, read_text
from heatopt.checkpoint._fit import check_fit
from heatopt.checkpoint._manifest import Manifest, parse
from heatopt.checkpoint._random import reseed, restore_generators
from heatopt.checkpoint._reader import Reader
from heatopt.checkpoint._restore import restore_model, restore_optimizer
from heatopt.checkpoint._writing import finish_pending
from heatopt.comm import Communicator
from heatopt.errors import CheckpointError
from heatopt.sharding import RESIDUALS, Wanted
from heatopt.sync import Call, meet_for

__all__ = ["load"]

_SMALL = ("scheduler", "scaler", "sampler")
# Beside the sections, if the optimizer's has no more than this rank's part: which parameters have a state at all.
_ORDER = "order of states"


def load(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    sampler: Any = None,
    comm: Communicator | None = None,
) -> Any:
    """Load what :func:`heatopt.save` has written, at this or any other number of ranks. Collective.

    Every tensor is restored bit for bit, with its dtype. At the number of ranks that saved, each rank's random
    generators are restored too; at another number they are seeded, differently on each rank, from the states saved,
    and the log says so. What the checkpoint has beyond the given objects is left alone.

    Args:
        path: the directory; a copy of it under another name will do.
        model: a module with the same names, shapes and dtypes.
        optimizer: an optimizer of the same algorithm for parameters of the same shapes, wrapped or not.
        scheduler: of the same class as the one saved; likewise:
        scaler: a ``GradScaler``.
        sampler: a :class:`ResumableSampler`, say.
        comm: the ranks; default: the optimizer's, or else :func:`heatopt.world`.

    Returns:
        The ``extra`` of ``save``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``path`` is empty; or ``optimizer``, of local updates, cannot go on from what was under way, which
            is known when the model has been loaded.
        NoCheckpointError: on all ranks: there is no checkpoint. A kind of CheckpointError.
        CheckpointError: on all ranks: a file is missing, damaged, truncated, foreign or of a newer version, or what it
            has does not fit. The message names it. Nothing has been loaded then.
        RankMismatchError: on all ranks, if they load different things, or some are in another call of an optimizer.
    """
    chosen = choose_communicator(comm, optimizer)
    finish_pending(chosen)
    meet_for(chosen, Call.LOAD)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "sampler": sampler}
    target = _check(chosen, path, objects)
    given = {name: thing for name, thing in objects.items() if thing is not None}
    directory, manifest = _read_manifest(chosen, target)
    states = states_of(optimizer)
    wanted = None if states is None else states.wanted_elements()
    contents = _together(chosen, lambda: _read(chosen, directory, manifest, given, wanted))
    _put_in_place(chosen, given, contents)
    _together(chosen, lambda: _restore_random(chosen, directory, manifest, contents["random"]))
    return contents["extra"]


def _check(comm: Communicator, path: object, objects: Mapping[str, object]) -> str:
    """Compare the arguments of all ranks and return the absolute path."""

    def check() -> str:
        check_objects(objects)
        return check_path(path)

    target: str = _together(comm, check)
    comm.agree_on([os.path.basename(target), [name for name, thing in objects.items() if thing is not None]], "load()")
    return target


def _together(comm: Communicator, function: Callable[[], Any]) -> Any:
    """What ``function`` returns; its error is raised on all ranks."""
    result, error = None, None
    try:
        result = function()
    except Exception as caught:
        error = caught
    raise_together(comm, error, "load()")
    return result


def _read_manifest(comm: Communicator, target: str) -> tuple[str, Manifest]:
    """Rank 0 finds it and reads it for all."""

    def read() -> tuple[str, str] | None:
        if comm.rank != 0:
            return None
        directory = find(target)
        path = os.path.join(directory, MANIFEST)
        try:
            return directory, read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    found = comm.exchange_objects(_together(comm, read), "load(): the manifest")[0]
    directory, text = found
    return directory, _together(comm, lambda: parse(text, os.path.join(directory, MANIFEST)))


def _read(
    comm: Communicator, directory: str, manifest: Manifest, given: Mapping[str, Any], wanted: Wanted | None
) -> dict[str, Any]:
    """Everything that this rank needs, checked; of the optimizer's states what is ``wanted``."""
    same = manifest.ranks == comm.size
    reader = Reader(directory, manifest, comm.rank if same else 0)
    reader.check_files()
    check_fit(directory, manifest, reader, given)
    if not same:
        _check_differences(directory, manifest, comm, given)
        for rank in range(comm.rank, manifest.ranks, comm.size):
            reader.of_rank(rank).read("random")  # nobody needs it, but damage is to be noticed
    if wanted is None:
        contents = {name: reader.read(name) for name in (*given, "extra", "random")}
    else:
        contents = {name: reader.read(name) for name in (*given, "extra", "random") if name != "optimizer"}
        contents["optimizer"], contents[_ORDER] = reader.read_optimizer(wanted)
    if not same and RESIDUALS in contents.get("optimizer", {}):
        contents["optimizer"][RESIDUALS] = _mean_residuals(reader, manifest.ranks)
    return contents


def _mean_residuals(reader: Reader, ranks: int) -> dict[str, torch.Tensor]:
    """Their mean over the ranks that saved: with it on every rank, the averages lack what they lacked."""
    mean: dict[str, torch.Tensor] = reader.of_rank(0).read_entry("optimizer", RESIDUALS)
    for rank in range(1, ranks):
        for name, residual in reader.of_rank(rank).read_entry("optimizer", RESIDUALS).items():
            mean[name] += residual
    return {name: total / ranks for name, total in mean.items()}


def _check_differences(directory: str, manifest: Manifest, comm: Communicator, given: Mapping[str, Any]) -> None:
    """At another number of ranks all take what rank 0 has saved, where ranks have saved different things."""
    names = [name.partition(":")[2] for name in manifest.tensors if name.startswith("rank")]
    own = sorted({name.partition("/")[0] for name in names if not name.startswith(f"optimizer/{RESIDUALS}/")})
    different = {name for name in (*manifest.rank_sections[0], *own) if name in (*given, "extra")}
    if "sampler" in different:
        raise CheckpointError(
            f"{directory}: the samplers of the ranks were at different places, so that they go on only with "
            f"{manifest.ranks} ranks, not with {comm.size}"
        )
    for name in sorted(different):
        logger.warning(
            "%s: %s was not equal on the %d ranks that saved it; all ranks now load that of rank 0",
            *(directory, name, manifest.ranks),
        )


def _restore_random(comm: Communicator, directory: str, manifest: Manifest, states: dict[str, Any]) -> None:
    """Restore this rank's random generators, or seed them if these are of another number of ranks."""
    try:
        if manifest.ranks == comm.size:
            restore_generators(states)
            return
        seed = reseed(states, comm.rank, comm.size)
    except Exception as error:
        raise CheckpointError(
            f"{directory}: the random generators refuse the state that was saved: {type(error).__name__}: {error}"
        ) from error
    logger.info(
        "%s was saved by %d ranks and is loaded by %d: rank %d seeds its random generators with %d",
        *(directory, manifest.ranks, comm.size, comm.rank, seed),
    )


def _put_in_place(comm: Communicator, given: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
    """Small objects first: they may refuse their state, and are then given back the one that they had."""
    before: dict[str, Any] = {}

    def put_small() -> None:
        for name in _SMALL:
            if name in given:
                before[name] = copy.deepcopy(given[name].state_dict())
                try:
                    given[name].load_state_dict(contents[name])
                except Exception as error:
                    raise CheckpointError(f"the {name} refuses the state that was saved: {error}") from error

    try:
        _together(comm, put_small)
    except Exception:
        for name, state in before.items():
            try:
                given[name].load_state_dict(state)
            except Exception as error:
                logger.warning("the %s cannot be given back the state that it had: %s", name, error)
        raise

    def put_large() -> None:
        if "model" in given:
            restore_model(given["model"], contents["model"])
        if "optimizer" in given:
            restore_optimizer(given["optimizer"], contents["optimizer"])
            states = states_of(given["optimizer"])
            if states is not None and _ORDER in contents:
                states.hold_parts(contents[_ORDER])

    # Where the ranks of a node have the parameters in common, all are about to write them.
    own_parameters = getattr(given.get("optimizer"), "own_parameters", nullcontext)
    with own_parameters():
        _together(comm, put_large)
