"""Each rank keeps the optimizer state of its pieces of the parameters, and updates those.

[Note: Sharded updates]
The wrapped optimizer itself updates this rank's pieces, in the place of the parameters: see [Note: Updates of members].
Afterwards the owners' pieces travel to all ranks.

While there is no partition, each rank has the whole states: before the first update, after ``load_state_dict``, while
groups are added and inside ``join()``. The next update makes one, and drops what other ranks own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, compress
from operator import attrgetter, itemgetter, or_
from typing import Any, NoReturn
from zlib import crc32

import torch

from heatopt._log import logger
from heatopt.comm import Communicator
from heatopt.errors import RankFailedError, RankMismatchError
from heatopt.sharding._declaration import NUMBERS, Manner, keeps_state, manner_of
from heatopt.sharding._division import shard_specs
from heatopt.sharding._gather import Ownership, cut_state, flatten_state, gather_states, is_part, outline_states
from heatopt.sharding._inner_step import HookedStep
from heatopt.sharding._layout import Layout
from heatopt.sharding._masters import Masters
from heatopt.sharding._member_update import MemberUpdate
from heatopt.sharding._members import are_there
from heatopt.sharding._parameter_memory import ParameterMemory
from heatopt.sharding._partition import plan_shards
from heatopt.sharding._states import Carried, States, Wanted, as_state, copied, replace_entry
from heatopt.sharding._views import CONCLUDING, Views
from heatopt.sync import GradientShards, outside_graphs

__all__ = ["ShardedStates"]

_GRADIENT, _LAYOUT, _DTYPE = attrgetter("grad"), attrgetter("layout"), attrgetter("dtype")


class ShardedStates(States):
    """Updates and holds this rank's share of ``optimizer``'s states. See [Note: Sharded updates].

    Args:
        optimizer: the wrapped one.
        memory: where its parameters live.
        channel: returns the communicator.
        meet: the same, once all ranks are in a call that needs the states of all of them.
        layout: that of an optimizer of which this one is a copy.
        shards: the part of the gradients that this rank keeps, where those are sharded too.
        hold_whole: changes whether gradients are whole on all ranks.
        masters: of narrow parameters, if they have any.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        memory: ParameterMemory,
        channel: Callable[[], Communicator],
        meet: Callable[[], Communicator],
        layout: Layout | None = None,
        shards: GradientShards | None = None,
        hold_whole: Callable[[bool], None] | None = None,
        masters: Masters | None = None,
    ) -> None:
        super().__init__(optimizer)
        self._shards = shards or GradientShards()
        self._hold_whole = hold_whole
        self._memory = memory
        self._channel = channel
        self._meet = meet
        self._manner = manner_of(optimizer)
        if self._manner is Manner.UNKNOWN:
            logger.warning("%s is not torch's own: sharded by whole tensors", type(optimizer).__name__)
        self._masters = masters
        self._member_update = MemberUpdate(optimizer, masters)
        self._hooked_step = HookedStep(optimizer, self._step, "shard")
        self._layout = layout
        self._owned = Ownership({}, frozenset()) if layout is None else layout.ownership()
        self._views: Views | None = None
        parameters = self._parameters()
        # The order of the states in a state dict:
        self._first_used = list(optimizer.state) if layout is None else [parameters[i] for i in layout.order]
        self._had_gradient: list[bool] = []
        self._keep_whole = False

    # Updates

    @outside_graphs
    def step(self, *arguments: Any, **keywords: Any) -> Any:
        """Do what ``optimizer.step`` does, its hooks included. Collective."""
        return self._hooked_step(*arguments, **keywords)

    def _step(self, optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss, arguments = self._member_update.evaluate(closure)
        with torch.no_grad():
            if self._keep_whole:
                self._member_update.update_whole(arguments)
                return loss
            parameters = self._parameters()
            self._memory.begin(parameters)
            views = self._prepare(parameters)
            error = None
            try:
                self._update_members(views, arguments)
            except Exception as caught:
                error = caught
            # After an error too: whatever has become of the parameters, all ranks have the same.
            if views.conclude(self._channel(), error is not None):
                _raise_on_all_ranks(self._channel(), error)
        return loss

    def _update_members(self, views: Views, arguments: tuple[Any, ...]) -> None:
        views.refresh()
        self._member_update.update(views.own, self._shards.kept(), arguments)
        if not self._optimizer.state and self._keeps_state():
            self._mark_in_use([p for p, has in zip(self._parameters(), self._had_gradient, strict=True) if has])

    def _keeps_state(self) -> bool:
        """Whether parameters that are updated have a state afterwards."""
        masters = self._masters
        return keeps_state(self._optimizer) or (masters is not None and any(map(masters.has_one, self._parameters())))

    def _mark_in_use(self, used: Sequence[torch.Tensor]) -> None:
        """Let the state of a rank that owns none of the parameters ``used`` not be empty, as it is on no other rank.

        Where it is empty, torch's distributed checkpoints make an update, for which all ranks have to meet.
        """
        own = {p for index, p in enumerate(self._parameters()) if index in self._owned.pieces}
        if used and own.isdisjoint(used):  # whoever owns one and has no state needs none
            # Never read but by copies, where torch looks for an algorithm's numbers.
            self._optimizer.state[used[0]] = {name: torch.zeros(()) for name in NUMBERS}

    def _parameters(self) -> list[torch.Tensor]:
        return list(chain.from_iterable(map(itemgetter("params"), self._optimizer.param_groups)))

    def _prepare(self, parameters: list[torch.Tensor]) -> Views:
        """Make a partition, and views of its pieces, if there are none or they do not fit any more."""
        gradients = list(map(_GRADIENT, parameters))
        has_gradient, kept = are_there(gradients), self._shards.present()
        if kept:
            has_gradient = list(map(or_, has_gradient, map(kept.__contains__, range(len(gradients)))))
        if has_gradient != self._had_gradient:
            self._had_gradient = has_gradient
            known = set(self._first_used)
            self._first_used += [p for p, has in zip(parameters, has_gradient, strict=True) if has and p not in known]
        sparse = _sparse(gradients)
        layout = self._layout
        if layout is not None and not (
            sparse <= layout.whole.union(range(len(parameters)) if self._cuts_nothing else ())
            and list(map(_DTYPE, parameters)) == list(layout.dtypes)
            and (self._shards.pieces is layout.decided or self._shards.pieces == layout.decided)
        ):
            sparse |= layout.whole
            self.gather()
        return self._current_views(parameters, frozenset(sparse))

    def _current_views(self, parameters: list[torch.Tensor], whole: frozenset[int]) -> Views:
        if self._layout is None:
            self._divide(parameters, whole)
        assert self._layout is not None
        if self._views is None or not self._views.are_current(parameters):
            self._views = self._memory.views(self._layout.blocks, parameters, self._views)
        return self._views

    @property
    def _cuts_nothing(self) -> bool:
        return self._manner is not Manner.ELEMENTWISE

    def _plan(self, parameters: Sequence[torch.Tensor], whole: frozenset[int]) -> Layout:
        """A partition; the parameters ``whole`` are not cut."""
        comm = self._channel()
        decided = self._shards.pieces
        specs = shard_specs(self._optimizer, not self._cuts_nothing, whole)
        blocks = tuple(plan_shards(specs, comm.size, decided=decided))
        return Layout(blocks, comm.rank, comm.size, tuple(map(_DTYPE, parameters)), whole, decided)

    def _use(self, layout: Layout) -> None:
        self._forget_layout()
        self._layout, self._owned = layout, layout.ownership()

    def _divide(self, parameters: Sequence[torch.Tensor], whole: frozenset[int]) -> None:
        """Make a partition, and drop what other ranks own."""
        self._use(self._plan(parameters, whole))
        state = self._optimizer.state
        self._first_used = [*state, *(p for p in self._first_used if p not in state)]
        self._keep_own_part(parameters)

    def _keep_own_part(self, parameters: Sequence[torch.Tensor]) -> None:
        state = self._optimizer.state
        for index, parameter in enumerate(parameters):
            if parameter not in state:
                continue
            if index not in self._owned.pieces:
                del state[parameter]
            elif index in self._owned.cut:
                cut_state(state[parameter], parameter.shape, self._owned.pieces[index])

    # States

    def gather(self, root: int | None = None) -> None:
        if self._keep_whole:  # by all ranks, of which some may be at the end of join() already
            return
        whole = self._ask_who_is_whole()
        root_has_all = root is not None and whole[root] is not None
        if not root_has_all:
            _require_equal(whole)
        if self._layout is not None:
            state: dict[torch.Tensor, dict[str, Any]] = {}  # if root has all, this rank is about to receive it
            if not root_has_all:
                state = self._whole_states(range(len(self._parameters())))
            for key in [key for key in self._optimizer.state if isinstance(key, torch.Tensor)]:
                del self._optimizer.state[key]
            self._optimizer.state.update(state)
        self._forget_layout()

    def _forget_layout(self) -> None:
        self._layout = self._views = None
        self._owned = Ownership({}, frozenset())

    def _ask_who_is_whole(self) -> list[int | None]:
        """None for each rank that holds its part; for one that has loaded all, say, a number for names. Collective."""
        state = self._optimizer.state
        names = [(index, *state[p]) for index, p in enumerate(self._parameters()) if state.get(p)]
        found = crc32(repr(names).encode()) if self._layout is None else None
        return self._meet().exchange_objects(found, "a look at the optimizer states of all ranks")

    def _all_are_whole(self) -> bool:
        whole = self._ask_who_is_whole()
        _require_equal(whole)
        return whole[0] is not None

    def _whole_states(self, indices: Iterable[int]) -> dict[torch.Tensor, dict[str, Any]]:
        """Whole states by parameter."""
        state = self._optimizer.state
        return self._in_order(gather_states(self._channel(), self._parameters(), state, self._owned, indices))

    def _in_order(self, found: dict[int, dict[str, Any]]) -> dict[torch.Tensor, dict[str, Any]]:
        """States by parameter, in the order in which the parameters had their first update."""
        parameters = self._parameters()
        by_parameter = {parameters[index]: state for index, state in found.items()}
        order = {p: by_parameter[p] for p in self._first_used if p in by_parameter}
        return order | by_parameter

    def state_dict(self) -> dict[str, Any]:
        if self._keep_whole or self._all_are_whole():
            return self._optimizer.state_dict()
        return self._state_dict_of(self._whole_states(range(len(self._parameters()))))

    def state_dict_in_parts(self) -> dict[str, Any]:
        if self._keep_whole or self._all_are_whole():
            return self._optimizer.state_dict()
        return self._state_dict_of(self._states_in_parts())

    def _states_in_parts(self) -> dict[torch.Tensor, dict[str, Any]]:
        """States by parameter, with a ``Part`` for each tensor."""
        return self._in_order(outline_states(self._channel(), self._parameters(), self._optimizer.state, self._owned))

    def _state_dict_of(self, states: dict[torch.Tensor, dict[str, Any]]) -> dict[str, Any]:
        """What the optimizer returns if these are the states of its parameters."""
        optimizer = self._optimizer
        whole: Any = defaultdict(dict, states)
        state = optimizer.state
        whole.update((key, value) for key, value in state.items() if not isinstance(key, torch.Tensor))
        optimizer.state = whole
        try:
            return optimizer.state_dict()
        finally:
            optimizer.state = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)
        self._forget_layout()
        self._first_used, self._had_gradient = [], []

    def wanted_elements(self) -> Wanted | None:
        if self._keep_whole:
            return None
        self._meet()  # a copy may not have met the others yet, without whom there is no plan
        parameters = self._parameters()
        return self._wanted_of(self._plan(parameters, frozenset()), parameters)

    def _wanted_of(self, layout: Layout, parameters: Sequence[torch.Tensor]) -> Wanted:
        """What this rank takes where states are divided by ``layout``."""
        owned = layout.ownership()
        return lambda index, key, shape: owned.elements(index, key, shape, parameters[index])

    def hold_parts(self, order: Sequence[int]) -> None:
        parameters, state = self._parameters(), self._optimizer.state
        self._use(self._plan(parameters, frozenset()))
        self._first_used, self._had_gradient = [parameters[index] for index in order], []
        self._flatten_parts(parameters)
        if not state:
            self._mark_in_use(self._first_used)

    def _flatten_parts(self, parameters: Sequence[torch.Tensor]) -> None:
        """A part that is the whole has come in the shape of the whole."""
        for index in self._owned.cut.intersection(self._owned.pieces):
            flatten_state(self._optimizer.state.get(parameters[index], {}), parameters[index].shape)

    def get(self, parameter: torch.Tensor) -> dict[str, Any]:
        index = self.require(parameter)
        if self._keep_whole or self._all_are_whole():
            return copied(self._optimizer.state.get(parameter, {}))
        return self._whole_states([index]).get(parameter, {})

    def set(self, parameter: torch.Tensor, name: str, value: Any) -> None:
        index = self.require(parameter)
        if self._keep_whole:
            self._set_own_part(index, parameter, name, value)
            return
        self._all_are_whole()
        error = None
        try:
            self._set_own_part(index, parameter, name, value)
        except (TypeError, ValueError) as found:
            error = (type(found), str(found))
        kind, text = next(filter(None, self._channel().exchange_objects(error, "set_states()")), (None, ""))
        if kind is not None:
            raise kind(text)
        if not any(parameter is known for known in self._first_used):
            self._first_used.append(parameter)

    def _set_own_part(self, index: int, parameter: torch.Tensor, name: str, value: Any) -> None:
        state = self._optimizer.state
        if self._layout is not None and index not in self._owned.pieces:
            return
        entry = {name: value}
        if index in self._owned.cut:
            piece, present = self._owned.pieces[index], state[parameter].get(name)
            if is_part(name, present, piece):
                entry[name] = as_state(name, value, parameter.shape)
            cut_state(entry, parameter.shape, piece)
        replace_entry(state[parameter], name, entry[name])

    def write(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        self._memory.write(self._parameters(), parameter, value)

    @contextmanager
    def kept_whole(self) -> Iterator[None]:
        if self._keep_whole:
            yield
            return
        self.gather()
        self._change_gradients(whole=True)
        self._keep_whole = True
        try:
            with self._memory.apart():  # ranks make updates of all of it, and not all ranks do
                yield
        finally:
            self._keep_whole = False
        self._change_gradients(whole=False)
        self._memory.hold(self._parameters(), equal=True)

    def _change_gradients(self, whole: bool) -> None:
        if self._hold_whole is not None:
            self._hold_whole(whole)

    def carried(self) -> Carried:
        if self._layout is None:
            return Carried()
        index_of = {p: index for index, p in enumerate(self._parameters())}
        order = tuple(index_of[p] for p in self._first_used if p in index_of)
        return Carried(replace(self._layout, order=order))


def _raise_on_all_ranks(comm: Communicator, error: Exception | None) -> NoReturn:
    """Raise ``error`` where there is one, and on the other ranks one that tells of it. Collective."""
    causes = comm.exchange_objects(None if error is None else f"{type(error).__name__}: {error}", CONCLUDING)
    if error is not None:
        raise error
    rank, cause = next((rank, cause) for rank, cause in enumerate(causes) if cause is not None)
    raise RankFailedError(
        f"rank {rank} has failed in its part of the update: {cause}; the other ranks have updated theirs, and all have "
        "the same parameters: mend the cause, and load a checkpoint or go on from here"
    )


def _require_equal(whole: list[int | None]) -> None:
    for rank, found in enumerate(whole):
        if found == whole[0]:
            continue
        what = f"rank 0 and rank {rank} have loaded states of different parameters, or with different names"
        if found is None or whole[0] is None:
            loaded, other = (rank, 0) if whole[0] is None else (0, rank)
            what = f"rank {loaded} has loaded a state dict, rank {other} has not"
        raise RankMismatchError(
            f"{what}; load it on all ranks, or call broadcast_optimizer_state with a rank that has all"
        )


def _sparse(gradients: Sequence[torch.Tensor | None]) -> set[int]:
    if set(map(_LAYOUT, compress(gradients, are_there(gradients)))) <= {torch.strided}:
        return set()
    return {i for i, g in enumerate(gradients) if g is not None and g.layout is not torch.strided}
