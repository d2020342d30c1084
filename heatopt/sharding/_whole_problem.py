"""LBFGS, whose updates need inner products over all parameters, with its history divided among the ranks.

[Note: Whole problems]
torch's LBFGS lays all parameters side by side and computes with vectors over them: two for each update that it
remembers. Here torch's own code runs on every rank, with vectors of which a rank holds its part: see
:class:`~heatopt.sharding._vectors.SplitVector`. All ranks see the same losses, inner products and norms, so they take
the same branches and evaluate the closure equally often. A step changes this rank's pieces of the parameters; before
each evaluation of the closure, and at the end, all ranks receive all pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch

from heatopt.comm import Communicator
from heatopt.sharding._gather import Part
from heatopt.sharding._layout import Layout
from heatopt.sharding._masters import Masters
from heatopt.sharding._own_part import OwnPart, count_reals, each_vector, is_vector, spans
from heatopt.sharding._parameter_memory import ParameterMemory
from heatopt.sharding._sharded import ShardedStates
from heatopt.sharding._states import Wanted, copied, replace_entry
from heatopt.sharding._views import Views
from heatopt.sync import GradientShards

__all__ = ["WholeProblemStates", "sharded_states"]

_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")
_GATHERING = "gathering of a sharded LBFGS history"


def sharded_states(
    optimizer: torch.optim.Optimizer,
    memory: ParameterMemory,
    channel: Callable[[], Communicator],
    meet: Callable[[], Communicator],
    layout: Any = None,
    shards: GradientShards | None = None,
    hold_whole: Callable[[bool], None] | None = None,
    masters: Masters | None = None,
) -> ShardedStates:
    """The sharded states of any ``optimizer``; the arguments are those of :class:`ShardedStates`."""
    kind = WholeProblemStates if isinstance(optimizer, torch.optim.LBFGS) else ShardedStates
    return kind(optimizer, memory, channel, meet, layout, shards, hold_whole, masters)


class WholeProblemStates(ShardedStates):
    """Updates and holds this rank's part of LBFGS's vectors. See [Note: Whole problems].

    torch keeps the whole state as that of the first parameter. So does every rank here, with its part of the vectors.
    """

    @property
    def _cuts_nothing(self) -> bool:
        return False

    # Updates

    def _step(self, optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
        with torch.no_grad():
            # torch refuses what has no closure, or several groups.
            if self._keep_whole or closure is None or len(optimizer.param_groups) != 1:
                return self._member_update.torch_step(optimizer, *(() if closure is None else (closure,)))
            parameters = self._parameters()
            own = OwnPart(optimizer.param_groups, parameters)
            try:
                loss = self._member_update.torch_step(own, lambda: self._evaluate(closure, own, parameters))
            finally:
                if own.is_ready:
                    optimizer.state[parameters[0]].update(own.plain_state())
            own.share()
        return loss

    def _evaluate(self, closure: Callable[[], Any], own: OwnPart, parameters: list[torch.Tensor]) -> Any:
        own.share()
        loss = closure()
        with torch.no_grad():
            if not own.is_ready:  # not before: within an evaluation the ranks compare what each of them has loaded
                self._memory.begin(parameters)  # the ranks have evaluated: nobody reads
                views = self._prepare(parameters)
                own.take(views, self._channel(), self._optimizer.state.get(parameters[0], {}))
            own.refresh()
        return loss

    def _prepare(self, parameters: list[torch.Tensor]) -> Views:
        devices = sorted(set(map(str, map(_DEVICE, parameters))))
        if len(devices) > 1:
            raise ValueError(f"LBFGS needs all parameters on one device, got {', '.join(devices)}")
        if self._layout is not None and list(map(_DTYPE, parameters)) != list(self._layout.dtypes):
            self.gather()
        if self._layout is None:
            self._check_whole(parameters)
        return self._current_views(parameters, frozenset())

    # States

    def _check_whole(self, parameters: Sequence[torch.Tensor]) -> None:
        """Raise, on all ranks, unless the states that they are about to divide are equal and fit. Collective."""
        state = self._optimizer.state.get(parameters[0], {})
        vectors = _outline(state, lambda vector: tuple(vector.shape))
        self._channel().agree_on([*state, state.get("n_iter"), *vectors], "LBFGS.step() from a state")
        expected = (sum(map(count_reals, parameters)),)
        for name, shape in vectors:
            _require_shape(name, expected, shape)

    def _keep_own_part(self, parameters: Sequence[torch.Tensor]) -> None:
        state = self._optimizer.state
        if parameters[0] in state:
            state[parameters[0]].update(each_vector(state[parameters[0]], self._own_part))

    def _own_part(self, vector: Any, name: str) -> torch.Tensor:
        """This rank's part of a whole vector, with memory of its own."""
        assert self._layout is not None
        parameters = self._parameters()
        vector = torch.as_tensor(vector)
        _require_shape(name, (sum(map(count_reals, parameters)),), tuple(vector.shape))
        places = spans(parameters, self._layout.blocks, self._layout.rank)
        return torch.cat([vector[:0], *(vector[start:stop] for start, stop in places)])

    def _whole_states(self, indices: Iterable[int]) -> dict[torch.Tensor, dict[str, Any]]:
        parameters, state = self._parameters(), self._optimizer.state
        known = {parameters[index]: state[parameters[index]] for index in indices if parameters[index] in state}
        return {p: each_vector(copied(entries), self._gatherer(entries)) for p, entries in known.items()}

    def _gatherer(self, state: Mapping[str, Any]) -> Callable[[torch.Tensor, str], torch.Tensor]:
        """A function that makes a vector of ``state`` whole. Collective, as is each call of the function."""
        assert self._layout is not None
        comm, parameters = self._channel(), self._parameters()
        comm.agree_on(_outline(state, _DTYPE), _GATHERING)  # a rank that was interrupted alone may remember less
        places = [spans(parameters, self._layout.blocks, rank) for rank in range(comm.size)]
        lengths = [sum(stop - start for start, stop in found) for found in places]

        def gather(part: torch.Tensor, name: str) -> torch.Tensor:
            padded = torch.zeros(max(lengths), dtype=part.dtype, device="cpu")
            padded[: part.numel()] = part
            rows = comm.gather_rows(padded.view(torch.uint8), f"{_GATHERING}: {name}").view(part.dtype)
            whole = part.new_empty(sum(lengths))
            for row, found in zip(rows, places, strict=True):
                taken = 0
                for start, stop in found:
                    whole[start:stop] = row[taken : taken + stop - start]
                    taken += stop - start
            return whole

        return gather

    # Checkpoints: vectors in parts, numbers on every rank.

    def _states_in_parts(self) -> dict[torch.Tensor, dict[str, Any]]:
        assert self._layout is not None
        parameters, state = self._parameters(), self._optimizer.state
        shape = torch.Size([sum(map(count_reals, parameters))])
        places = spans(parameters, self._layout.blocks, self._layout.rank)
        lengths = [stop - start for start, stop in places]

        def outline(part: torch.Tensor, _: str) -> Part:
            runs = zip(places, torch.split(part, lengths), strict=True)
            return Part(shape, part.dtype, [(start, run) for (start, _), run in runs])

        return {p: each_vector(state[p], outline) if p is parameters[0] else state[p] for p in parameters if p in state}

    def _wanted_of(self, layout: Layout, parameters: Sequence[torch.Tensor]) -> Wanted:
        places = spans(parameters, layout.blocks, layout.rank)
        return lambda index, key, shape: places if index == 0 and is_vector(key) else [(0, shape.numel())]

    def _flatten_parts(self, parameters: Sequence[torch.Tensor]) -> None:
        pass  # a vector has one dimension in any case, and a number none

    def _set_own_part(self, index: int, parameter: torch.Tensor, name: str, value: Any) -> None:
        if index == 0 and self._layout is not None:
            value = each_vector({name: value}, self._own_part)[name]
        replace_entry(self._optimizer.state[parameter], name, value)


def _outline(state: Mapping[str, Any], describe: Callable[[torch.Tensor], Any]) -> list[tuple[str, Any]]:
    """Name and description of each vector in ``state``."""
    outline: list[tuple[str, Any]] = []
    each_vector(state, lambda vector, name: outline.append((name, describe(vector))))
    return outline


def _require_shape(name: str, expected: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"state {name!r} must have shape {expected}, as the parameters side by side have, got {shape}")
