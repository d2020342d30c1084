"""The parameters of an optimizer, once for all ranks of a node.

[Note: Shared parameters]
With ``parameters_per_node="shared"`` the data of all parameters lie in memory that the ranks of a node have in common:
each rank writes the pieces that it owns, and all read them where they are. Nothing travels within a node; between nodes
each piece reaches a node once, and one of its ranks writes it.

Two meetings keep readers and writers apart:

* :meth:`NodeParameters.begin`, before an update: all ranks are in it, so none is in a forward or backward pass, in a
  closure, or in a hook of a step, which may read parameters.
* :meth:`NodeParameters.finish`, after it: all pieces of all nodes are there, so whoever goes on reads those of one
  step.

Between the two no rank runs a user's code. A step of LBFGS has several such pairs: each evaluation of the closure lies
between the end of one and the beginning of the next. A rank that does not come is waited for as everywhere else.

The first meeting compares, too, what users have done since the last update:

* Parameters that were given other data (``p.data = other``, ``model.double()``) move back, with rank 0's values, if
  that was done to the same ones on all ranks; otherwise the ranks differ, which is an error.
* A write in place, which torch's version counters show, is an error: all ranks of the node have seen it, each at
  another moment, and ranks that all multiply by 2 have multiplied by 2^n.
* :meth:`NodeParameters.apart` is the way to write: each rank gets memory of its own, which it shares again afterwards.
  The same serves ``join()``, in which some ranks make updates without the others.

When the optimizer has gone each rank has memory of its own again, because whoever updates the parameters from then on
does so on each rank. Until then the memory lives as long as a tensor lies in it; it has no name that could stay behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch

from heatopt.buckets import find_overlaps
from heatopt.comm import Communicator, SharedBlock
from heatopt.errors import HeatoptError, RankMismatchError
from heatopt.sharding._node_views import NodeViews
from heatopt.sharding._parameter_memory import ParameterMemory
from heatopt.sharding._partition import Block
from heatopt.sharding._views import Views
from heatopt.sync import broadcast_tensors

__all__ = ["NodeParameters"]

_SETTING = "parameters_per_node='shared'"
_MOVING = "the move of parameters into the memory of the node"
_BEGINNING = "the meeting before an update of shared parameters"
_FINISHING = "the meeting after an update of shared parameters"
# Parameters begin at multiples of so many bytes, as torch's own: kernels may round by where a tensor begins.
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Place:
    """Where a parameter has been put."""

    parameter: weakref.ref[torch.Tensor]
    pointer: int
    strides: tuple[int, ...]
    block: SharedBlock
    """Keeps the memory, so that nothing else can come to lie at this address."""


class NodeParameters(ParameterMemory):
    """Has the parameters of one optimizer in memory of the node; see [Note: Shared parameters].

    Args:
        channel: returns the communicator.
        names: name of parameters by ``id``, for messages.
    """

    is_shared = True

    def __init__(self, channel: Callable[[], Communicator], names: Mapping[int, str]) -> None:
        super().__init__(channel)
        self._names = names
        self._places: dict[int, _Place] = {}  # by id of the parameter
        self._depth = 0  # of contexts in which the parameters are apart
        # Of all parameters as the last update, or move, has left them:
        self._pointers: list[int] = []
        self._strides: list[tuple[int, ...]] = []
        self._versions: list[int] = []
        weakref.finalize(self, _give_back, self._places).atexit = False

    # Memory

    def hold(
        self, parameters: Sequence[torch.Tensor], others: Iterable[torch.Tensor] = (), *, equal: bool = False
    ) -> None:
        if self._depth:
            return
        comm = self._channel()
        moving = [index for index, parameter in enumerate(parameters) if self._is_elsewhere(parameter)]
        kinds = [(index, parameters[index].dtype, tuple(parameters[index].shape)) for index in moving]
        answers = comm.exchange_objects((self._problem(parameters, moving, others), kinds), _MOVING)
        problem = next((problem for problem, _ in answers if problem), None)
        if problem is not None:
            raise ValueError(f"{_SETTING} {problem}")
        self._require_alike(parameters, [kinds for _, kinds in answers])
        moved = [parameters[index] for index in moving]
        if not equal:
            broadcast_tensors(comm, moved, 0, _MOVING)
        self._move(moved)
        self._note(parameters)

    def _is_elsewhere(self, parameter: torch.Tensor) -> bool:
        if parameter.numel() == 0:
            return False
        place = self._places.get(id(parameter))
        return (
            place is None
            or place.parameter() is not parameter
            or (parameter.data_ptr(), parameter.stride()) != (place.pointer, place.strides)
        )

    def _problem(
        self, parameters: Sequence[torch.Tensor], moving: Sequence[int], others: Iterable[torch.Tensor]
    ) -> str | None:
        """Why they cannot be moved."""
        for index in moving:
            parameter, name = parameters[index], self._name(parameters, index)
            if parameter.device.type != "cpu":
                return (
                    f"is for parameters on the CPU, but parameter {name!r} is on {parameter.device}; use "
                    "parameters_per_node='own'"
                )
            if parameter.is_shared():  # type: ignore[no-untyped-call]
                return (
                    f"moves parameters, but parameter {name!r} is in memory that other processes may see "
                    "(share_memory()); give it memory of its own first (p.data = p.data.clone())"
                )
        known = set(map(id, parameters))
        all_tensors = [*parameters, *(tensor for tensor in others if id(tensor) not in known)]
        shared = sorted(find_overlaps(all_tensors)) if moving else []
        if shared:
            names = [
                repr(self._name(parameters, i)) if i < len(parameters) else "a tensor of the model that it does not own"
                for i in shared[:8]
            ]
            return (
                f"moves parameters, but these share memory, which would tear them apart: {', '.join(names)}; make them "
                "one parameter (decoder.weight = encoder.weight), listed once, or use parameters_per_node='own'"
            )
        return None

    def _require_alike(self, parameters: Sequence[torch.Tensor], kinds: Sequence[Sequence[object]]) -> None:
        other = next((rank for rank, found in enumerate(kinds) if found != kinds[0]), None)
        if other is not None:
            index: int = next(i for i in range(len(parameters)) if _only(kinds[0], i) != _only(kinds[other], i))
            raise RankMismatchError(
                f"parameter {self._name(parameters, index)!r} was given other data on rank 0 or rank {other}, and not "
                "alike on both; assign to p.data, or convert the model, on all ranks alike"
            )

    def _move(self, parameters: Sequence[torch.Tensor]) -> None:
        comm = self._channel()
        if not parameters:
            return
        sizes = [-(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT for parameter in parameters]
        block = comm.allocate_once(sum(sizes))
        if block is None:
            raise ValueError(
                f"{_SETTING} needs memory that the ranks of a node share, and there is none: too little is free, the "
                "system has no memfd_create, ranks are in different containers, or HEATOPT_SHARED_MEMORY=0; use "
                "parameters_per_node='own'"
            )
        places = [
            _place_like(parameter, block, offset)
            for parameter, offset in zip(parameters, accumulate(sizes, initial=0), strict=False)
        ]
        if comm.node_rank == 0:
            for place, parameter in zip(places, parameters, strict=True):
                place.copy_(parameter.detach())
        comm.exchange_words(np.zeros(1, dtype=np.int64), _MOVING)  # the values are there
        for place, parameter in zip(places, parameters, strict=True):
            parameter.data = place
            self._places[id(parameter)] = _Place(weakref.ref(parameter), place.data_ptr(), place.stride(), block)

    @contextmanager
    def apart(self) -> Iterator[None]:
        _give_back(self._places)
        self._pointers, self._versions = [], []
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    # Updates

    def begin(self, parameters: Sequence[torch.Tensor], may_move: bool = True) -> None:
        """Return once this rank may write its pieces. Collective.

        Args:
            parameters: all of the optimizer's.
            may_move: False if views of them are in use.

        Raises:
            HeatoptError: on all ranks: parameters were written into, or are apart.
            RankMismatchError: they were given other data on some ranks only.
        """
        words = np.array([not self._are_here(parameters), 1 + self._first_written(parameters), self._depth])
        table = self._channel().exchange_words(words.astype(np.int64), _BEGINNING)
        if not table.any():
            return
        if table[:, 2].any():
            raise HeatoptError(
                f"step() while rank {table[:, 2].argmax()} is inside of own_parameters(), where its parameters are not "
                "those of the other ranks; leave the context on all ranks first"
            )
        if table[:, 1].any():
            self._refuse_write(parameters, table[:, 1])
        if not may_move:
            raise HeatoptError(
                f"a parameter was given other data within a step, by the closure, on rank {table[:, 0].argmax()}; do "
                "so between steps, on all ranks"
            )
        self.hold(parameters)

    def _are_here(self, parameters: Sequence[torch.Tensor]) -> bool:
        pointers, strides = map(torch.Tensor.data_ptr, parameters), map(torch.Tensor.stride, parameters)
        return list(pointers) == self._pointers and list(strides) == self._strides

    def _first_written(self, parameters: Sequence[torch.Tensor]) -> int:
        """Index of the first that was written into since the last update, and not moved then; -1 if there is none."""
        if [parameter._version for parameter in parameters] == self._versions:
            return -1
        versions = zip(parameters, self._versions, strict=False)
        found = (i for i, (p, known) in enumerate(versions) if p._version != known and not self._is_elsewhere(p))
        return next(found, -1)

    def _refuse_write(self, parameters: Sequence[torch.Tensor], written: npt.NDArray[np.int64]) -> NoReturn:
        rank = int(written.astype(bool).argmax())
        raise HeatoptError(
            f"rank {rank} has written into parameter {self._name(parameters, int(written[rank]) - 1)!r} since the last "
            f"step; with {_SETTING} the ranks of a node have it once: each of them sees the write, and `p.mul_(2)` "
            "by all of its n ranks multiplies by 2^n. Write inside `with optimizer.own_parameters():`, which also "
            "accepts what is there now (load_state_dict of the model and broadcast_parameters are such writes; "
            "heatopt.load(path, model=model, optimizer=optimizer) does it by itself)"
        )

    def finish(
        self,
        parameters: Sequence[torch.Tensor],
        parts: Sequence[Sequence[Sequence[torch.Tensor]]] = (),
        failed: bool = False,
    ) -> bool:
        """Return once all ranks have written their pieces, and those of other nodes are there. Collective.

        Args:
            parameters: all of the optimizer's.
            parts: with several nodes: what each rank has written, by block and rank.
            failed: this rank could not make its part of the update.

        Returns:
            Whether any rank has failed.
        """
        comm = self._channel()
        any_failed = bool(comm.exchange_words(np.array([failed], dtype=np.int64), _FINISHING).any())
        for number, block in enumerate(parts):
            comm.spread_to_nodes(block, f"sharing of updated parameters, block {number}")
        # What others have written, autograd must know too: a graph that has saved the former values is void.
        torch.autograd.graph.increment_version(parameters)
        self._note(parameters)
        return any_failed

    def write(self, parameters: Sequence[torch.Tensor], parameter: torch.Tensor, value: torch.Tensor) -> None:
        if self._depth == 0:
            self.begin(parameters)
        if self._depth > 0 or self._channel().node_rank == 0:
            with torch.no_grad():
                parameter.copy_(value)
        if self._depth == 0:
            self.finish(parameters)

    def views(self, blocks: Sequence[Block], parameters: Sequence[torch.Tensor], former: Views | None) -> Views:
        comm = self._channel()
        return NodeViews(self, blocks, comm.rank, parameters, comm.size if comm.num_nodes > 1 else 0)

    def _note(self, parameters: Sequence[torch.Tensor]) -> None:
        """This is how an update, or a move, leaves the parameters."""
        self._pointers = list(map(torch.Tensor.data_ptr, parameters))
        self._strides = list(map(torch.Tensor.stride, parameters))
        self._versions = [parameter._version for parameter in parameters]

    def _name(self, parameters: Sequence[torch.Tensor], index: int) -> str | int:
        return self._names.get(id(parameters[index]), index)


def _only(kinds: Sequence[object], index: int) -> list[object]:
    return [kind for kind in kinds if isinstance(kind, tuple) and kind[0] == index]


def _place_like(parameter: torch.Tensor, block: SharedBlock, offset: int) -> torch.Tensor:
    """Memory for ``parameter``, with its strides if it covers its memory."""
    flat = block.tensor(parameter.dtype, parameter.numel(), offset)
    return flat.as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride())


def _give_back(places: dict[int, _Place]) -> None:
    """Give each parameter that is still in its place memory of its own."""
    for place in places.values():
        parameter = place.parameter()
        if parameter is not None and parameter.data_ptr() == place.pointer:
            parameter.data = parameter.data.clone()
    places.clear()
