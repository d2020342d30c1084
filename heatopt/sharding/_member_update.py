"""torch's own update of other tensors than the parameters: of pieces of them, of their masters.

[Note: Updates of members]
For the duration of an update the optimizer's groups list the members' tensors in the place of the parameters, and its
state is keyed by them. An entry of the user's ``state`` is the same dictionary as that of the member. So every
algorithm computes what it computes alone, in any form that torch has for it.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from heatopt.errors import HeatoptError
from heatopt.sharding._declaration import Manner, manner_of
from heatopt.sharding._inner_step import HookedStep
from heatopt.sharding._masters import Masters
from heatopt.sharding._members import Members, PieceMembers, whole_members
from heatopt.sync import outside_graphs

__all__ = ["MemberStepper", "MemberUpdate"]

_NOT_OPTIONS = ("params", "param_names")


class MemberUpdate:
    """Updates members by ``optimizer``; see [Note: Updates of members].

    Args:
        optimizer: the wrapped one.
        masters: has the update change wider copies of narrow parameters; None if there are none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Masters | None) -> None:
        self._optimizer = optimizer
        self._masters = masters
        is_torchs = manner_of(optimizer) is not Manner.UNKNOWN
        self.torch_step: Callable[..., Any] = _unhooked(type(optimizer).step, keep_decorators=not is_torchs)
        """The class's own step, without hooks, as a function of an optimizer and the arguments."""
        self._takes_closure = not is_torchs

    def evaluate(self, closure: Callable[[], Any] | None) -> tuple[Any, tuple[Any, ...]]:
        """Call the closure, once, and return the loss, and the arguments of the update that is to follow."""
        if closure is None:
            return None, ()
        with torch.enable_grad():
            loss = closure()
        return loss, (_once(loss),) if self._takes_closure else ()

    def update_whole(self, arguments: tuple[Any, ...]) -> None:
        """Update all parameters, as a rank that has all states does."""
        if self._masters is None:
            self.torch_step(self._optimizer, *arguments)
        else:
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            self.update(PieceMembers(whole_members(parameters)), {}, arguments)

    def update(self, members: PieceMembers, kept: Mapping[int, torch.Tensor], arguments: tuple[Any, ...]) -> None:
        """Update ``members``.

        Args:
            members: those of this rank.
            kept: their parts of the gradients by parameter index, where those are not the parameters'.
            arguments: of torch's step.
        """
        optimizer = self._optimizer
        groups, state = optimizer.param_groups, optimizer.state
        changed: Members = members
        if self._masters is not None:
            changed = self._masters.take_places(members, kept, state)
        own_groups = [
            {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
            | {"params": changed.tensors(group["params"])}
            for group in groups
        ]
        own_state: Any = defaultdict(dict, changed.states(state))
        changed.take_gradients(kept)
        optimizer.param_groups, optimizer.state = own_groups, own_state
        try:
            self.torch_step(optimizer, *arguments)
        finally:
            optimizer.param_groups, optimizer.state = groups, state
            changed.give_back(own_state, state)
            changed.finish(state)
        for group, own in zip(groups, own_groups, strict=True):
            group.update((key, value) for key, value in own.items() if key != "params")


class MemberStepper:
    """Its ``step`` does what ``optimizer.step`` does, with masters, on a rank that has all states.

    Args:
        optimizer: the wrapped one.
        masters: of its narrow parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Masters) -> None:
        self._update = MemberUpdate(optimizer, masters)
        self._hooked_step = HookedStep(optimizer, self._step, "master_dtype")

    @outside_graphs
    def step(self, *arguments: Any, **keywords: Any) -> Any:
        """The same as ``optimizer.step``, its hooks included."""
        return self._hooked_step(*arguments, **keywords)

    def _step(self, optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss, arguments = self._update.evaluate(closure)
        with torch.no_grad():
            self._update.update_whole(arguments)
        return loss


def _unhooked(step: Callable[..., Any], keep_decorators: bool) -> Callable[..., Any]:
    """``step`` without what torch wraps around it; its other decorators, of which torch's switch gradients off."""
    stop = (lambda found: not getattr(found, "hooked", False)) if keep_decorators else None
    unhooked: Callable[..., Any] = inspect.unwrap(step, stop=stop)
    return unhooked


def _once(loss: Any) -> Callable[[], Any]:
    """A closure that returns ``loss``, and can do so once: other parameters than at first would be another loss."""
    losses = [loss]

    def closure() -> Any:
        if not losses:
            raise HeatoptError(
                "an update that is sharded, or of master weights, cannot evaluate its closure more often than once; "
                "use shard='none' and no master_dtype"
            )
        return losses.pop()

    return closure
