"""The wrapper that all local-update methods share."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from heatopt.comm import world
from heatopt.errors import HeatoptError
from heatopt.local import LocalEngine, LocalSettings, OuterFactory, Subject, SyncPlan, check_state, made_by
from heatopt.optim._arguments import parameter_names, route_around_fused_sgd
from heatopt.optim._clip import clip_gradients
from heatopt.optim._copy import optimizer_contents, optimizer_from_contents
from heatopt.optim._data_parallel import DataParallelOptimizer
from heatopt.optim._local_steps import LocalSteps, Place
from heatopt.optim._ownership import claim, refuse_owned, release
from heatopt.sharding import States, WholeStates
from heatopt.sync import (
    GradientShards,
    LocalGradients,
    broadcast_state,
    outside_graphs,
    start_equal,
)

__all__ = ["LocalOptimizer", "Place"]

STATE_KEY = "local"
"""Where a state dict has what the method itself must remember."""


class LocalOptimizer(LocalSteps):
    """Base of the local-update methods. Not made by users.

    Between averages each replica (a rank, or the ranks of a group) trains alone; what is averaged when is a plan. The
    wrapper is a :class:`torch.optim.Optimizer`; ``param_groups``, ``state`` and ``defaults`` are the wrapped
    optimizer's own objects. With one process it does nothing beside.
    """

    def _assemble(
        self,
        torch_optimizer: torch.optim.Optimizer,
        place: Place,
        settings: LocalSettings,
        outer: OuterFactory | None,
    ) -> None:
        self._wrap(torch_optimizer, place.comm)
        self._place = place
        self._settings = settings
        route_around_fused_sgd(torch_optimizer, torch_optimizer.param_groups)
        self._subject = Subject(torch_optimizer, parameter_names(place.model), place.model)
        self._engine = LocalEngine(
            place.comm, self._subject, settings, outer=outer, within=place.within, nested=place.nested
        )
        without_parameters: list[dict[str, Any]] = [{"params": []} for _ in self.param_groups]
        self._outer_alone = made_by(outer, without_parameters) if place.comm.size == 1 else None
        if self._outer_alone is not None:
            self._outer_alone._opt_called = True  # type: ignore[attr-defined]  # or a scheduler warns
        self._stepper = torch_optimizer
        self._stepper_is_exact = False
        self._own_gradients = LocalGradients(lambda: torch_optimizer.param_groups)
        self._gradients = self._own_gradients

    def _construct(
        self,
        torch_optimizer: torch.optim.Optimizer,
        place: Place,
        settings: LocalSettings,
        outer: OuterFactory | None = None,
    ) -> None:
        """What the constructors of the methods end with. Collective."""
        refuse_owned([p for group in torch_optimizer.param_groups for p in group["params"]], parameter_names(None))
        self._assemble(torch_optimizer, place, settings, outer)
        self._set_options()
        claim(self._parameters(), self)
        self._engine.attach()
        start_equal(place.comm, torch_optimizer, place.model)
        self._choose_stepper()

    def _present_states(self) -> States:
        if isinstance(self._stepper, DataParallelOptimizer):
            return self._stepper._present_states()
        return WholeStates(self.torch_optimizer)

    # What a method adds

    def _plan(self) -> SyncPlan:
        """The plan of the next update."""
        raise NotImplementedError

    def _set_options(self) -> None:
        """Give the groups the options of the method."""

    # Training

    @property
    def stepper(self) -> torch.optim.Optimizer:
        """Who makes the next update: the wrapped optimizer, or one that averages gradients within a group."""
        return self._stepper

    @property
    def outer(self) -> torch.optim.Optimizer | None:
        """The outer optimizer; its options may be scheduled, alike on all ranks. None where there is none.

        With one process it has no parameters: what schedules it runs, and nothing comes of it.
        """
        return self._outer_alone if self._engine.outer is None else self._engine.outer.optimizer

    def _update(self, *arguments: Any, **keywords: Any) -> Any:
        if self._comm.size == 1:
            self._engine.updates += 1
            return self._step_weighted(*arguments, **keywords)
        plan = self._prepare()
        result = self._step_weighted(*arguments, **keywords)
        if not plan.exact:
            self._engine.note_update(self._samples_used())
        self._after_update(plan)
        return result

    @outside_graphs
    def skip_update(self) -> None:
        """Count an update that is left out because gradients overflowed. ``heatopt.GradScaler`` calls it.

        Averages stay in step with the other ranks, which may not have had an overflow.
        """
        self._after_update(self._prepare())

    @outside_graphs
    def _prepare(self) -> SyncPlan:
        """What to do before an update, and its plan."""
        plan = self._plan()
        self._engine.before_update(plan)
        return plan

    @outside_graphs
    def _after_update(self, plan: SyncPlan) -> None:
        self._engine.updates += 1
        self._engine.run(plan)
        self._choose_stepper()

    def _choose_stepper(self) -> None:
        """Who makes the next update: the optimizer itself, or one that averages gradients within a group."""
        if self._comm.size == 1:
            return
        plan = self._plan()
        exact = plan.exact
        group = self._comm if exact else None if plan.alone else self._place.within
        wants_group = group is not None and group.size > 1
        has_group = isinstance(self._stepper, DataParallelOptimizer)
        if wants_group == has_group and (not has_group or exact == self._stepper_is_exact):
            return
        if has_group and self._settings.shard != "none":
            # The pieces are those of the old group: each rank gets all of them before they are cut anew.
            self.torch_optimizer.load_state_dict(self._stepper.state_dict())
        self._gradients = self._own_gradients
        self._stepper = self.torch_optimizer  # the old one dies here, and with it its hooks and buckets
        self._stepper_is_exact = exact
        if wants_group:
            release(self._parameters(), self)
            assert group is not None
            if not has_group:  # ranks that have trained alone have states of their own
                broadcast_state(group, self.torch_optimizer, 0)
            # Its construction would give all ranks the first one's buffers, which are averaged when a plan says so.
            buffers = [(buffer, buffer.clone()) for buffer in self._subject.buffers()]
            self._stepper = DataParallelOptimizer(
                self.torch_optimizer,
                model=self._place.model,
                comm=group,
                shard=self._settings.shard,
                timeout=self._settings.timeout,
            )
            self._gradients = self._stepper._gradients
            for buffer, own in buffers:
                buffer.copy_(own)
        else:
            claim(self._parameters(), self)

    @outside_graphs
    def synchronize(self) -> None:
        """Merge what is on its way, then average all parameters and floating buffers over all ranks. Collective.

        All ranks are equal afterwards. Call it at the end of training, and to evaluate in between.
        """
        self._engine.synchronize()

    @contextmanager
    def join(self) -> Iterator[None]:
        """Context for a loop over batches of which ranks have unequal numbers. Collective at its end.

        A rank that leaves the context goes along with the others' averages until all have left: it takes what they
        merge, and counts for nothing in what they send, so means of parameters are over the ranks that have made an
        update in the period. Moments and buffers are averaged over all ranks. At the end what is on its way is merged,
        and all ranks get the mean over those that have made an update since the last average (if none has: over all),
        of each fragment.

        Objects that are not the optimizer's (a scheduler's own counter, a GradScaler) are left alone; an outer
        optimizer's options, ``sync_every``, and the learning rate with :class:`SlowMo` must stay equal on all ranks.

        Raises:
            ValueError: replicas of several ranks, nested groups, or a warm-up that has not ended.
        """
        self._refuse_join()
        yield
        if self._comm.size == 1:
            return
        engine = self._engine
        engine.all_idle, engine.idle_since = False, engine.updates
        try:
            while not engine.all_idle:
                self.skip_update()
            engine.synchronize()
        finally:
            engine.idle_since = None

    def _refuse_join(self) -> None:
        reasons = {
            "replicas of several ranks, which average gradients at each update": self._settings.within != "rank",
            "nested groups": bool(self._place.nested),
            "updates of the warm-up, whose gradients all ranks average": self._plan().exact,
        }
        for reason, found in reasons.items():
            if found:
                raise ValueError(
                    f"{type(self).__name__}.join() cannot be used with {reason}; make the numbers of batches equal "
                    "there, with the sampler's drop_last=True, say"
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the wrapped optimizer does. Local."""
        self._own_gradients.clear(set_to_none)
        self._stepper.zero_grad(set_to_none=set_to_none)

    def no_sync(self) -> AbstractContextManager[None]:
        """Context in which ``backward()`` leaves gradients local where a group would average them."""
        return self._stepper.no_sync() if isinstance(self._stepper, DataParallelOptimizer) else nullcontext()

    @outside_graphs
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scale the gradients so that their joint norm is at most ``max_norm``. Collective in the replica.

        Returns:
            The norm before the scaling: of this replica, in exact phases of all ranks.
        """
        if isinstance(self._stepper, DataParallelOptimizer):
            return self._stepper.clip_grad_norm_(max_norm, norm_type, error_if_nonfinite)
        whole = GradientShards()
        return clip_gradients(self._parameters(), whole, float(max_norm), float(norm_type), error_if_nonfinite)

    def set_model(self, model: torch.nn.Module) -> None:
        """Name the module whose floating buffers are averaged. Do so on all ranks, with the same module."""
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._place.model = self._subject.model = model
        self._subject.names = parameter_names(model)

    def report(self) -> dict[str, Any]:
        """What this run does, for logs. Local."""
        return {
            "method": self._settings.method,
            "algorithm": self._settings.algorithm,
            "ranks": self._comm.size,
            "nodes": self._comm.num_nodes,
            "replicas": self._engine.replicas,
            "updates": self._engine.updates,
            "averages": self._engine.averages,
        }

    @outside_graphs
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters and broadcast rank 0's values of them. Collective.

        Raises:
            ValueError: one of them belongs to another wrapper; and what torch raises.
            RankMismatchError: on all ranks, if they add different groups.
        """
        count = len(self._parameters())
        self._stepper.add_param_group(param_group)
        added = self._parameters()[count:]
        if self._stepper is self.torch_optimizer:
            refuse_owned(added, self._subject.names, self)
            claim(added, self)
        if self._outer_alone is not None:
            self._outer_alone.add_param_group({"params": []})
        self._engine.extend(added)

    # State

    def _collect_state(self) -> dict[str, Any]:
        return {**self._stepper.state_dict(), STATE_KEY: {**self._engine.state_dict(), **self._more()}}

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        own = state_dict.get(STATE_KEY)
        if self._comm.size > 1:
            check_state(own, self._settings, self._engine.outer is not None)
        self._stepper.load_state_dict({key: value for key, value in state_dict.items() if key != STATE_KEY})
        self._engine.load_state_dict(own)
        self._take_more(own or {})
        self._choose_stepper()

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        if self._place.nested or self._settings.within != "rank":
            raise TypeError(
                f"a {type(self).__name__} with groups of ranks cannot be pickled, because communicators belong to "
                "their process; save its state_dict()"
            )
        return self._contents()

    def _contents(self) -> dict[str, Any]:
        kind, attributes = optimizer_contents(self.torch_optimizer)
        sharded = self._settings.shard != "none" and isinstance(self._stepper, DataParallelOptimizer)
        return {
            "torch_optimizer": (kind, {**attributes, "state": {}} if sharded else attributes),
            "state_dict": self._stepper.state_dict() if sharded else None,
            "names": [self._subject.names.get(id(parameter)) for parameter in self._parameters()],
            "settings": self._settings,
            "outer": self._engine.outer,
            "outer alone": self._outer_alone,
            "engine": self._engine.state_dict(),
            "more": self._more(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(state, Place(world(), None))

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalOptimizer:
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        place = self._place
        model = None if place.model is None else memo.get(id(place.model))
        contents = copy.deepcopy(self._contents(), memo)
        duplicate._restore(contents, Place(place.comm, model, place.within, place.nested))
        return duplicate

    def _restore(self, state: dict[str, Any], place: Place) -> None:
        """Become the copy that ``state`` describes. Collective in phases in which a group averages gradients.

        Raises:
            HeatoptError: one process has made the copy of a method with an outer optimizer, and now there are several.
        """
        if place.comm.size > 1 and state["outer"] is None and state["outer alone"] is not None:
            raise HeatoptError(
                f"this copy of {type(self).__name__} comes from a single process, which had no anchors for its outer "
                f"optimizer, and here are {place.comm.size}: make a new optimizer, and load its state_dict()"
            )
        optimizer = optimizer_from_contents(*state["torch_optimizer"])
        if state["state_dict"] is not None:
            optimizer.state = defaultdict(dict)
            optimizer.load_state_dict(state["state_dict"])
        self._assemble(optimizer, place, state["settings"], None)
        named = zip(self._parameters(), state["names"], strict=True)
        self._subject.names = {id(parameter): name for parameter, name in named if name is not None}
        self._engine.outer = state["outer"] if place.comm.size > 1 else None
        self._outer_alone = state["outer alone"]
        self._engine.load_state_dict(state["engine"])
        self._take_more(state["more"])
        claim(self._parameters(), self)
        self._choose_stepper()

    def _more(self) -> dict[str, Any]:
        """What a method remembers beside the engine."""
        return {}

    def _take_more(self, more: dict[str, Any]) -> None:
        """The inverse of :meth:`_more`."""
