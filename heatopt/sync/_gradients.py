"""Gradient synchronisation: hooks -> bucket full -> launch by index -> gradients final at the end of backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch

from heatopt.comm import Communicator
from heatopt.errors import HeatoptError
from heatopt.sync._backward import when_backward_ends
from heatopt.sync._coordinator import Coordinator, OwnedOptions, coordinator_of
from heatopt.sync._fingerprint import Fingerprint
from heatopt.sync._graphs import outside_graphs
from heatopt.sync._header import ALL, REPLAN, Call, Row
from heatopt.sync._hooks import GradientHooks
from heatopt.sync._local import Gradients
from heatopt.sync._plan import GradientPlan
from heatopt.sync._residuals import Residuals
from heatopt.sync._round import Round
from heatopt.sync._settings import SyncSettings
from heatopt.sync._shards import GradientShards
from heatopt.sync._tuning import DEFAULT, Choice, Tuner, candidates
from heatopt.sync._weights import Mean

__all__ = ["GradientSync"]


class _State(Enum):
    """Where a rank's gradients are."""

    DETACHED = "detached"  # made, or copied; attach() leads to IDLE, at the first collective call
    IDLE = "idle"  # no backward is running
    LOCAL_BACKWARD = "local backward"  # the first hook under no_sync() or accumulation leads here
    SYNC_BACKWARD = "synchronised backward"  # the first other hook leads here; nothing has been launched
    BROKEN = "broken"  # an exception took this rank out of a round that the others are in; nothing leads out
    ROUND = "round"  # ranks have agreed on this backward's round: at the first full bucket, or at the end


# Calls before which the groups' numbers must agree: those that lead to an update.
_WITH_OPTIONS = (Call.STEP, Call.CLOSURE)


class GradientSync(Gradients):
    """Averages the gradients of one optimizer's parameters over the ranks of a communicator.

    Args:
        comm: the ranks.
        groups: returns the optimizer's param_groups.
        names: name of parameters by ``id``, for messages.
        settings: what the user chose.
        shards: what this rank keeps of the gradients, where they are sharded.
        residuals: what it has not sent of them, where they are compressed.
    """

    def __init__(
        self,
        comm: Communicator,
        groups: Callable[[], list[dict[str, Any]]],
        names: dict[int, str],
        settings: SyncSettings,
        shards: GradientShards,
        residuals: Residuals,
    ) -> None:
        self.number = -1
        self.plan_digest = 0
        self.loads = 0
        self._broken = ""
        self._comm = comm
        self._groups = groups
        self._settings = settings
        self._plan = GradientPlan(groups, names, settings, shards, residuals)
        self._coordinator: Coordinator | None = None
        self._state = _State.DETACHED
        self._no_sync_depth = 0
        self._backwards = 0  # completed since the last synchronised one
        self._waiting_for: list[set[int]] = []  # per bucket, the parameters whose hook has not fired
        self._next_launch = 0
        self._full = False  # the next bucket to launch has got all its gradients
        self._round: Round | None = None  # the open one, if it is this object's to run
        self.weights = self._plan.weights
        self._tuner = Tuner([Choice(settings.blocking is not False, settings.bucket_mb or DEFAULT.bucket_mb)])
        self._backward_alive: Callable[[], object | None] = _nothing
        self.quiet: Callable[[], object | None] = _nothing
        self._hooks = GradientHooks(self)
        self._hooks.extend(self._plan.parameters)

    # What the coordinator asks

    def fingerprint(self) -> Fingerprint:
        return self._plan.fingerprint()

    def options(self) -> list[OwnedOptions]:
        return self._plan.options(self.loads)

    def pending_mask(self) -> int:
        return self._plan.pending_mask()

    def compressed(self) -> dict[str, tuple[int, torch.Tensor]]:
        return self._plan.compressed()

    @property
    def _contributes(self) -> bool:
        """False while this rank serves others at the end of a join()."""
        return self._coordinator is None or not self._coordinator.serves

    def replan(self) -> None:
        self.plan_digest = self._plan.replan(self.channel())
        self._plan.mark_all_changed()
        # If a backward is running, its buckets are reduced at its end: hooks that have fired are not counted anew.
        self._full = False
        self._waiting_for = [{-1} for _ in self._plan.buckets]

    @property
    def weight_word(self) -> float:
        return self.weights.word

    def run_round(self, mask: int, mean: Mean) -> None:
        self._begin_round(mean)
        self._finish_round(mask)

    # Calls of the optimizer

    def attach(self) -> None:
        if self._state is not _State.DETACHED:
            return
        self._coordinator = coordinator_of(self._comm)
        self.plan_digest = self.fingerprint().digest()
        self.channel()
        self._coordinator.construct(self, self._what(Call.CONSTRUCT))
        self._state = _State.IDLE
        self._lay_out(self._settings.sparse)
        overlaps = self._comm.num_nodes > 1 or all(memory.shared for memory in self._plan.memories)
        size = self._plan.report()["bucket_bytes"]
        # Other buckets would be another partition of what is sharded.
        bucket_mb = self._settings.bucket_mb if self._plan.shards.whole else self._plan.bucket_mb
        self._tuner = Tuner(candidates(self._settings.blocking, bucket_mb, overlaps, size))

    def extend(self) -> None:
        self._plan.list_parameters()
        self.plan_digest = self.fingerprint().digest()
        self._meet(Call.ADD_PARAM_GROUP)
        self._hooks.extend(self._plan.parameters)
        self._lay_out(())

    @outside_graphs
    def settle(self, call: Call, payload: float = 0.0) -> list[Row]:
        self.attach()
        self._notice_interruption()
        self._plan.require_known()
        self._plan.forget_cleared()
        options = self._plan.options_hash(self.loads) if call in _WITH_OPTIONS else 0
        tuning = call is Call.STEP and not self._tuner.settled
        rows = self._meet(call, options, self._tuner.lap(self._comm.seconds()) if tuning else payload)
        if tuning:
            self._tune(rows)
        if call is not Call.STATE:
            self._backwards = 0
        return rows

    def meet_for_states(self) -> Communicator:
        """Return the channel once all ranks are in a call that needs the states of all of them. Collective."""
        self.settle(Call.STATE)
        return self.channel()

    def _tune(self, rows: list[Row]) -> None:
        """See [Note: Tuning]. A rank in join() does not see the others' rows, so such steps do not count."""
        if any(row.call != Call.STEP for row in rows):
            return
        changed = self._tuner.record(max(row.payload for row in rows))
        if changed and self._plan.bucket_mb != self._tuner.choice.bucket_mb:
            self._plan.bucket_mb = self._tuner.choice.bucket_mb
            self._lay_out(())

    def hold_whole(self, whole: bool) -> None:
        """Let each rank hold whole gradients from now on, or its part of them if they are sharded. Collective."""
        self._plan.shards.whole = whole
        self._lay_out(())

    def report(self) -> dict[str, Any]:
        return {**self._plan.report(), **self._tuner.report()}

    @contextmanager
    def join(self) -> Iterator[None]:
        self.attach()
        assert self._coordinator is not None
        with self._coordinator.join(self):
            yield

    def consume(self) -> None:
        self._plan.consume()

    def serve_joined(self) -> int:
        assert self._coordinator is not None
        self.weights.reset()
        self.channel()
        return self._coordinator.serve_joined(self, self._what(Call.JOIN))

    @outside_graphs
    def clear(self, set_to_none: bool) -> None:
        self._notice_interruption()
        self._plan.clear(set_to_none)

    @contextmanager
    def weight(self, samples: float) -> Iterator[None]:
        self._notice_interruption()
        with self._plan.weight(samples):
            yield

    def settle_by_hand(self, weight: float) -> None:
        self.weights.require_none()
        with self.weight(weight), self.weights.given_by_hand():
            if not any(row.mask & ALL for row in self.settle(Call.STEP)):
                raise ValueError(
                    "step(weight=n) has no effect: all gradients are averages already, since backward() synchronised "
                    "them; use `with optimizer.weight(n): loss.backward()`, and step()"
                )

    def _notice_interruption(self) -> None:
        if self._state is _State.BROKEN:
            self._comm.abort(f"HeatoptError: {self._broken}")  # whoever caught the error cannot go on all the same
        if self._state not in (_State.DETACHED, _State.IDLE) and self._backward_alive() is None:
            self._recover()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._no_sync_depth += 1
        try:
            yield
        finally:
            self._no_sync_depth -= 1

    def _begin_round(self, mean: Mean) -> None:
        self._next_launch = 0
        self._round = Round(
            self._plan,
            self._settings,
            self.channel(),
            blocking=self._tuner.choice.blocking,
            mean=mean,
            contributes=self._contributes,
        )

    def _finish_round(self, mask: int) -> None:
        """Reduce what of ``mask`` has not been launched, and wait for all of it."""
        if self._round is not None:
            current, self._round = self._round, None
            current.launch_rest(mask, self._next_launch)
            self._next_launch = len(self._plan.buckets)
            current.complete(mask)
            self._plan.note_reduction(current.mean.total if self._contributes else 0.0)  # a rank that serves has none

    # Backward

    def on_gradient(self, index: int, parameter: torch.Tensor) -> None:
        """A parameter's gradient has been accumulated. Called for each of them: every microsecond counts."""
        if self._state is _State.IDLE or self._backward_alive() is None:
            self._enter_backward()
        if self._full and self._launches_early():
            self._launch_full_buckets()
        if self._round is not None:
            self._round.progress()
        gradient = parameter.grad
        place = self._plan.places.get(index)
        if place is None or (gradient is not None and not self._plan.buckets[place[0]].fits(gradient)):
            self._plan.note_elsewhere(index)
            return
        number, position = place
        bucket = self._plan.buckets[number]
        local = self._state is _State.LOCAL_BACKWARD
        if number < self._next_launch and not local:
            bucket.changed = True  # too late: the bucket is on the wire
            return
        if gradient is not None:
            bucket.adopt(position, gradient)
        if local:
            bucket.changed = True
            return
        waiting = self._waiting_for[number]
        waiting.discard(index)
        if not waiting and number == self._next_launch:
            self._full = True
            # If the user's own hooks of this parameter run after this one, the next parameter's hook launches.
            if self._hooks.is_last(index, parameter) and self._launches_early():
                self._launch_full_buckets()

    def _enter_backward(self) -> None:
        self.attach()
        self._notice_interruption()
        if self._state is _State.IDLE:
            self._begin_backward()

    def _begin_backward(self) -> None:
        self._plan.note_backward()
        synchronised = self._no_sync_depth == 0 and self._backwards + 1 >= self._settings.accumulation_steps
        self._state = _State.SYNC_BACKWARD if synchronised else _State.LOCAL_BACKWARD
        self._next_launch = 0
        self._full = False
        self._backward_alive = when_backward_ends(_end_of_backward, weakref.ref(self))
        # With one bucket for all nothing can be launched before the end, where it is seen what has come.
        quiet = synchronised and self._plan.has_one_bucket()
        self.quiet = self._backward_alive if quiet else _nothing
        if quiet:
            self._waiting_for = [{-1}]
        elif synchronised:
            self._waiting_for = self._plan.expected()

    def _launches_early(self) -> bool:
        # With several optimizers on these ranks hooks may interleave differently on each of them, so reductions wait
        # for the end of backward, where they run in the order of the optimizers' numbers.
        assert self._coordinator is not None
        return not self._plan.unplanned and self._coordinator.live_members == 1

    def _launch_full_buckets(self) -> None:
        self._full = False
        if self._state is _State.SYNC_BACKWARD:
            self._open_round(ALL)
        if self._round is None:
            return
        while self._next_launch < len(self._waiting_for) and not self._waiting_for[self._next_launch]:
            self._next_launch += 1
            self._round.launch(self._next_launch - 1)

    def _open_round(self, mask: int) -> None:
        """Agree on a round, which is then this object's to run, unless it had to be run with others' at once."""
        assert self._coordinator is not None
        self.channel()
        mask |= self._plan.kept_mask()
        what = f"backward() of {self._settings.algorithm} ({self._plan.describe(self._next_launch)})"
        mean = self._coordinator.announce_backward(self, mask, what)
        self._state = _State.ROUND
        if mean is not None:
            self._begin_round(mean)
        else:
            self._next_launch = len(self._plan.buckets)  # whatever arrives from here on is new

    def end_backward(self) -> None:
        """The backward pass is over: complete the round, and run another one for what came too late for it."""
        try:
            if self._state is _State.LOCAL_BACKWARD:
                self._backwards += 1
                return
            with self.channel().in_step("the end of backward()"):
                if self._state is _State.SYNC_BACKWARD:
                    self._open_round(ALL | (REPLAN if self._plan.unplanned else 0))
                self._finish_round(ALL)
                while late := self._plan.changed_mask():
                    self._open_round(late)
                    self._finish_round(late)
            self._backwards = 0
        finally:
            self._state = _State.IDLE
            self.quiet = _nothing

    def _recover(self) -> None:
        """The last backward was interrupted by an exception: go on if no other rank has seen it."""
        if self._state is _State.ROUND:
            self._state = _State.BROKEN
            place = self._plan.describe(self._next_launch)
            self._broken = (
                f"rank {self._comm.rank}: an exception interrupted backward at {place}, after a reduction with the "
                "other ranks had begun, so this rank cannot skip it alone; let the exception end the job"
            )
            raise HeatoptError(self._broken)
        self._state = _State.IDLE
        self._plan.mark_all_changed()

    # Small parts

    def _lay_out(self, sparse: tuple[int, ...]) -> None:
        self.plan_digest = self._plan.lay_out(self.channel(), self._plan.trainable(), sparse)

    def _meet(self, call: Call, options: int = 0, payload: float = 0.0) -> list[Row]:
        assert self._coordinator is not None
        self.channel()
        return self._coordinator.meet(call, self, self._what(call), options, payload)

    def _what(self, call: Call) -> str:
        return f"{call} of {self._settings.algorithm} ({self._plan.describe(0)})"

    def channel(self) -> Communicator:
        """The coordinator's channel, with this optimizer's time-out."""
        assert self._coordinator is not None
        channel = self._coordinator.channel
        channel.timeout = self._settings.timeout or self._comm.timeout
        return channel


def _nothing() -> None:
    """No backward is running."""


def _end_of_backward(reference: weakref.ref[GradientSync]) -> None:
    sync = reference()
    if sync is not None:
        sync.end_backward()
