"""The engine of all local-update methods: it carries out plans.

[Note: Local updates]
Between averages a rank trains alone. After each update a plan, which is a pure function of the update's number, tells
what is sent, merged or averaged; the engine does that, in the plan's order. All methods are such plans with a merge
rule and an optimizer of the anchor, the copy of the parameters that is equal on all ranks:

* What travels are values, or differences from the anchor where an outer optimizer or a wire dtype needs them.
* An average that is on its way owns its buffers; it is merged after the update for which it is due, however early it
  has arrived. So a checkpoint may wait for it, and the run goes on with the same bits.
* Whatever a rank begins together with others begins with a header (see [Note: Headers]): the number of the update and
  of the average, which parameters take part, the outer optimizer's options, the period that is to come, and how many
  samples are behind what the rank sends. To merge what was sent needs none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from heatopt.comm import Communicator
from heatopt.local._average import DelayedAverage, Kind, Parcel, kind_of
from heatopt.local._fragments import cut
from heatopt.local._means import average_buffers, average_moments, average_over, exchange_numbers
from heatopt.local._outer import Outer, OuterFactory
from heatopt.local._replicas import Replicas
from heatopt.local._samples import Samples, shares_of
from heatopt.local._schedule import Action, GroupMean, Merge, MomentMean, ReplicaMean, Send, SyncPlan
from heatopt.local._settings import LocalSettings
from heatopt.local._subject import PERIOD, Subject
from heatopt.sync import (
    Call,
    Coordinator,
    Fingerprint,
    Mean,
    OwnedOptions,
    Row,
    broadcast_tensors,
    coordinator_of,
    numeric_options,
    options_hash,
)

__all__ = ["LocalEngine"]


class LocalEngine:
    """Averages the parameters of one optimizer over replicas, as plans say.

    Args:
        comm: all ranks.
        subject: what is trained.
        settings: what the user chose.
        outer: makes the outer optimizer; None: plain averages.
        within: the ranks of this rank's replica; None: this rank alone.
        nested: the groups of ``GroupMean``, by level.
    """

    def __init__(
        self,
        comm: Communicator,
        subject: Subject,
        settings: LocalSettings,
        *,
        outer: OuterFactory | None = None,
        within: Communicator | None = None,
        nested: Sequence[Communicator] = (),
    ) -> None:
        self.number = -1
        self.plan_digest = 0
        self.updates = 0
        """Number of updates so far, skipped ones included."""
        self.settings = settings
        self._comm = comm
        self._subject = subject
        self._within = within
        self._nested = nested
        self._turns = 0  # averages begun so far
        self._apart = False  # the ranks of this replica have trained alone since they were equal
        self._samples = Samples(settings.fragments + 1)  # since each fragment was sent; last, since ranks were united
        self._sending = 0  # the fragment that a header is about
        self._shares: tuple[float, ...] | None = None  # of all ranks in averages, on average 1; None: equal ones
        self._sent_after = [0] * settings.fragments  # number of the update after which each fragment was sent last
        self.idle_since: int | None = None
        """Number of the last update before this rank ran out of batches; it only goes along with the others."""
        self.all_idle = False
        """True once no rank had batches any more at a meeting."""
        self._fragments = cut([p.numel() for p in subject.parameters()], settings.fragments)
        needs_anchor = outer is not None or settings.wire_dtype is not None
        self.outer = Outer(subject.groups, outer) if needs_anchor and comm.size > 1 else None
        """The anchor; None where plain averages of values need none."""
        self._flight: dict[int, deque[DelayedAverage]] = {}
        self._coordinator: Coordinator | None = None
        self._replicas: Replicas | None = None

    # What the coordinator asks

    def pending_mask(self) -> int:
        return 0  # gradients are not this member's

    @property
    def weight_word(self) -> float:
        """How much this rank counts in what it is about to send; see :class:`Samples`."""
        return self._samples.words[self._sending]

    def run_round(self, mask: int, mean: Mean) -> None:
        pass

    def replan(self) -> None:
        pass

    def fingerprint(self) -> Fingerprint:
        return self._subject.fingerprint(self.settings.printable(), self._outer_groups())

    def options(self) -> list[OwnedOptions]:
        groups = [OwnedOptions(f"outer group {n}", numeric_options(g)) for n, g in enumerate(self._outer_groups())]
        return [OwnedOptions("the local updates", numeric_options(self._progress())), *groups]

    def _outer_groups(self) -> list[dict[str, Any]]:
        return [] if self.outer is None or self.outer.optimizer is None else self.outer.optimizer.param_groups

    def _progress(self) -> dict[str, Any]:
        return {
            "number of updates": self.updates,
            "number of averages": self._turns,
            f"{PERIOD} of the groups": self._subject.periods(),
            "trained parameters": tuple(sorted(self._subject.trained)),
        }

    # Meetings

    def attach(self) -> None:
        """Meet the other ranks' engines, once. Collective."""
        if self._comm.size == 1 or self._coordinator is not None:
            return
        self._coordinator = coordinator_of(self._comm)
        self.plan_digest = self.fingerprint().digest()
        self._set_timeout()
        self._coordinator.construct(self, self._what(Call.CONSTRUCT))
        self._replicas = Replicas(self._coordinator.channel, self._within)

    def meet(self, call: Call, payload: float = 0.0) -> list[Row]:
        """Return what all ranks announced once all are in ``call``; nothing if there is nobody to ask. Collective.

        Raises:
            RankMismatchError: ranks are in other calls, or have made other numbers of updates.
        """
        self.attach()
        if self._coordinator is None:
            return []
        self._set_timeout()
        options = options_hash([self._progress(), *self._outer_groups()])
        return self._coordinator.meet(call, self, self._what(call), options, payload)

    def _set_timeout(self) -> None:
        assert self._coordinator is not None
        self._coordinator.channel.timeout = self.settings.timeout or self._comm.timeout

    def _what(self, call: Call) -> str:
        return f"{call} of {self.settings.method} after update {self.updates}"

    # Updates

    def before_update(self, plan: SyncPlan) -> None:
        """The parameters are about to change."""
        if self._comm.size == 1:
            return
        self.attach()
        self._subject.note_trained()
        self._apart |= plan.alone
        if self.outer is not None and not self.outer.anchored and not plan.exact:
            self.outer.capture(self._subject.parameters())  # equal on all ranks, as they are until ranks train alone

    def note_update(self, word: float) -> None:
        """An update has been made; see :meth:`Samples.note`."""
        self._samples.note(word)

    @torch.no_grad()
    def run(self, plan: SyncPlan) -> None:
        """Carry out what follows an update. Collective, unless there is nothing but merges of averages sent."""
        if not plan.actions or self._coordinator is None:
            return
        if plan.meets:
            self._sending = next((action.fragment for action in plan.actions if isinstance(action, Send)), 0)
            rows = self.meet(Call.MERGE, self._idleness(plan))
            payloads = [row.payload for row in rows]
            self.all_idle = all(payloads)
            if self.all_idle:
                return
            self._shares = shares_of([row.weight for row in rows], payloads)
        for action in plan.actions:
            self._act(action)

    def _idleness(self, plan: SyncPlan) -> float:
        """0: this rank trains; 0.5: it has no batches left, but has made one of these updates; 1: not even that."""
        return 0.0 if self.idle_since is None else 0.5 if self.updates - self.idle_since < plan.covers else 1.0

    def _act(self, action: Action) -> None:
        if isinstance(action, Send):
            self._send(action)
        elif isinstance(action, Merge):
            flight = self._flight.get(action.fragment)
            if flight and flight[0].parcel.due <= self.updates:  # synchronize() may have merged it already
                self._merge(flight.popleft())
            if self.settings.merge == "restart" and self.outer is not None:
                fragment = self._subject.among(self._fragments[action.fragment])  # some may be new since the sending
                self.outer.overwrite(fragment, self._subject.parameters())
        elif isinstance(action, GroupMean):
            average_over(self._nested[action.level], self._trained_parameters(), self.settings.chunk)
        elif isinstance(action, ReplicaMean):
            self._unite()
        elif isinstance(action, MomentMean):
            assert self._coordinator is not None
            average_moments(self._coordinator.channel, self._subject, action.order, self.settings.chunk)

    def _is_idle(self, fragment: int) -> float:
        """1: this rank has no batches left, and has made no update since the fragment was sent."""
        return float(self.idle_since is not None and self.idle_since <= self._sent_after[fragment])

    @torch.no_grad()
    def synchronize(self, call: Call = Call.SYNCHRONIZE, payload: float | None = None) -> list[Row]:
        """Merge what is on its way and average all parameters, so that all ranks are equal. Collective.

        Args:
            call: what the others must be in.
            payload: travels along, in another call.

        Returns:
            What all ranks announced with their call.
        """
        self._sending = 0
        rows = self.meet(call, self._is_idle(0) if payload is None else payload)
        if self._coordinator is None:
            return rows
        found = [[row.weight, row.payload if payload is None else 0.0] for row in rows]
        count = self.settings.fragments
        if count > 1:
            own = [number for n in range(count) for number in (self._samples.words[n], self._is_idle(n))]
            found = exchange_numbers(self._coordinator.channel, own, "what is behind each fragment")
        shares = [shares_of([f[2 * n] for f in found], [f[2 * n + 1] for f in found]) for n in range(count)]
        parameters, trained = self._subject.parameters(), sorted(self._subject.trained)
        restarted = self.outer if self.settings.merge == "restart" and self.outer and self.outer.anchored else None
        unsent = restarted.progress(trained, [parameters[index] for index in trained]) if restarted else ()
        for _, flight in sorted(self._flight.items()):
            while flight:
                self._merge(flight.popleft())
        if restarted:
            restarted.redo(trained, parameters, unsent)
        for fragment, self._shares in enumerate(shares):
            self._act(Send(fragment, full=True))
            self._act(Merge(fragment))
        return rows

    @property
    def replicas(self) -> int:
        """Number of replicas, as far as is known before the first update."""
        return 1 if self._replicas is None else self._replicas.count

    @property
    def averages(self) -> int:
        """Number of averages that have begun."""
        return self._turns

    def _send(self, action: Send) -> None:
        assert self._replicas is not None
        self._unite()  # a delegate speaks for its replica
        flight = self._flight.setdefault(action.fragment, deque())
        while flight and not (action.delay and self.settings.overlaps):
            self._merge(flight.popleft())  # it was sent by another plan, of other settings or another last batch
        indices = self._subject.among(self._fragments[action.fragment])
        kind = kind_of(action, self.settings, self.outer)
        parameters = self._subject.parameters()
        values = [parameters[index].detach() for index in indices]
        keeps = action.delay > 0 and self.settings.merge == "delta"
        parcel = Parcel(
            fragment=action.fragment,
            kind=kind,
            indices=indices,
            delay=action.delay,
            due=self.updates + action.delay,
            turn=self._turns,
            count=self._replicas.count,
            sent=tuple(value.clone() for value in values) if keeps else None,
        )
        self._turns += 1
        self._samples.take(action.fragment)
        self._sent_after[action.fragment] = self.updates
        if kind is Kind.DELTA:
            assert self.outer is not None
            values = self.outer.differences(indices, values, self.settings.wire_dtype, self.settings.error_feedback)
        weight = self._replicas.weight(self._shares)
        average = DelayedAverage.begin(parcel, values, self._replicas, self.settings.chunk, weight)
        flight.append(average)

    def _merge(self, average: DelayedAverage) -> None:
        parcel = average.parcel
        centers = average.wait()
        if self.outer is not None:
            if parcel.kind is Kind.DELTA:
                self.outer.move(parcel.indices, centers)
                centers = [self.outer.anchors[index] for index in parcel.indices]
            else:
                for index, center in zip(parcel.indices, centers, strict=True):
                    mean = center / parcel.count if parcel.kind is Kind.TOTAL else center
                    self.outer.anchors[index].copy_(mean)
        parameters = self._subject.parameters()
        for place, (index, center) in enumerate(zip(parcel.indices, centers, strict=True)):
            parameter = parameters[index]
            parameter.copy_(parcel.merged(place, center, parameter.detach(), self.settings.share))
        if parcel.fragment == self.settings.fragments - 1:
            assert self._coordinator is not None
            average_buffers(self._coordinator.channel, self._subject, self.settings.chunk)

    # Plain averages

    def _trained_parameters(self) -> list[torch.Tensor]:
        parameters = self._subject.parameters()
        return [parameters[index].detach() for index in sorted(self._subject.trained)]

    def _unite(self) -> None:
        """Make the ranks of this replica equal if they have trained alone. Collective in the replica."""
        word = self._samples.take(-1)
        if self._apart and self._within is not None:
            words = exchange_numbers(self._within, [word], "samples of each rank of the replica")
            shares = shares_of([found for (found,) in words], [0.0] * self._within.size)
            weight = None if shares is None else shares[self._within.rank]
            average_over(self._within, self._trained_parameters(), self.settings.chunk, weight)
        self._apart = False

    # Changes

    def extend(self, added: Sequence[torch.Tensor]) -> None:
        """``added`` are a new group, at the end. Collective."""
        first = len(self._subject.parameters()) - len(added)
        self.attach()
        self._fragments[-1] += range(first, first + len(added))
        if self.outer is not None:
            self.outer.add_group(self._subject.groups[-1])
        if self._coordinator is None:
            return
        self.plan_digest = self.fingerprint().digest()
        self.meet(Call.ADD_PARAM_GROUP)
        broadcast_tensors(self._coordinator.channel, added, 0, "the broadcast of added parameters")
        if self.outer is not None:
            for anchor, parameter in zip(self.outer.anchors[first:], added, strict=True):
                anchor.copy_(parameter.detach())

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on with the same bits, as plain objects and tensors.

        Waits for what is on its way. Collective where a replica has several ranks.
        """
        outer = {} if self.outer is None else self.outer.state_dict()
        return {
            "ranks": self._comm.size,
            "merge": self.settings.merge,
            "updates": self.updates,
            "averages": self._turns,
            "trained": sorted(self._subject.trained),
            "fragments": [list(indices) for indices in self._fragments],  # groups may have been added
            "apart": self._apart,
            "sent_after": list(self._sent_after),
            # In a checkpoint numbers that differ between ranks are tensors.
            "samples": torch.tensor(self._samples.words, dtype=torch.float64),
            "flight": [average.state_dict() for _, flight in sorted(self._flight.items()) for average in flight],
            **({"anchors": None, "outer": None, "residuals": {}} | outer),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state; None: begin anew from the parameters as they will be at the next update.

        At another number of ranks each rank keeps the parameters that it has been given, residuals are dropped, and all
        that is equal on all ranks (the anchor, the outer optimizer, averages on their way, counters) goes on.
        """
        for flight in self._flight.values():
            for average in flight:
                average.wait()  # its buffers are still in use
        self._flight = {}
        state = {"ranks": 0, "updates": 0, "averages": 0, "trained": [], **(state or {})}
        self.updates, self._turns = state["updates"], state["averages"]
        self._apart, self._sent_after = state.get("apart", False), [0] * self.settings.fragments
        self._subject.trained = set(state["trained"])
        if len(state.get("fragments", ())) == len(self._fragments):
            self._fragments = [list(indices) for indices in state["fragments"]]
            self._sent_after = list(state["sent_after"])
        self._samples = Samples(self.settings.fragments + 1)
        if state["ranks"] == self._comm.size and len(state.get("samples", ())) == len(self._samples.words):
            self._samples.words = state["samples"].tolist()
        parameters = self._subject.parameters()
        for saved in state.get("flight", ()) if self._comm.size > 1 else ():
            self._flight.setdefault(saved["fragment"], deque()).append(DelayedAverage.from_state(saved, parameters))
        if self.outer is not None:
            self.outer.load_state_dict(state, parameters, state["ranks"] == self._comm.size)
