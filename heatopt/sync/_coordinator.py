"""How ranks agree on what happens next, before they do it.

[Note: Headers]
Everything collective that an optimizer does begins with one exchange of a few integers between all ranks: which call a
rank is in, for which optimizer, which buckets it wants reduced, and digests of what must agree. All ranks see all rows,
so all draw the same conclusion:

* A rank is in backward and wants a reduction: all ranks take part in it with the gradients that they have, whatever
  call they are in, and those that were in another call announce that again. So a rank whose loss touched no parameter,
  or that called backward less often, serves the others from inside its ``step()``.
* All ranks are in the same call: it goes ahead, after a reduction of what any rank has not reduced yet.
* Ranks are in different calls, or have different plans: every rank raises :class:`RankMismatchError` at once.
* A rank is in a call that serves no other, such as saving a checkpoint: all are, or every rank raises that error.
* A rank is in ``join()``: it has no more data, takes part with zeros, and does not count in the divisor.
* Ranks have weighted their gradients by their numbers of samples: the header has these (see [Note: Weights]).

A reduction replaces each gradient by its mean over ranks. The mean of equal numbers is that number (exactly for 2 and 4
ranks, else to the last bit), hence a bucket may be reduced again whenever any rank has a new contribution. Headers and
reductions share one channel and one total order.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np

from heatopt.comm import Communicator
from heatopt.errors import HeatoptError, RankMismatchError
from heatopt.sync._fingerprint import Fingerprint, NumericOptions, first_difference
from heatopt.sync._header import ALL, REPLAN, TOGETHER, Call, Row, describe, whereabouts
from heatopt.sync._weights import NO_WEIGHT, Mean, mean_of

__all__ = ["Coordinator", "Member", "OwnedOptions", "coordinator_of", "meet_for"]


class OwnedOptions(NamedTuple):
    """Numbers that must agree before an update, and whose they are."""

    owner: str
    options: NumericOptions


class Member(Protocol):
    """One optimizer's gradients, as the coordinator sees them."""

    number: int
    plan_digest: int
    """Digest of :meth:`fingerprint` when the plan was made."""

    def pending_mask(self) -> int:
        """What this rank has that no round has reduced."""

    @property
    def weight_word(self) -> float:
        """How much this rank's gradients count; see :attr:`SampleWeights.word`."""

    def run_round(self, mask: int, mean: Mean) -> None:
        """Average what ``mask`` names."""

    def replan(self) -> None:
        """Make a new plan together with the other ranks."""

    def fingerprint(self) -> Fingerprint: ...

    def options(self) -> list[OwnedOptions]: ...


class Coordinator:
    """All optimizers of one communicator: their numbers, their channel, their agreements."""

    def __init__(self, comm: Communicator) -> None:
        self.channel = comm.duplicate("the construction of the first optimizer")
        comm.when_closed(self.channel.close)
        self._members: dict[int, weakref.ref[Member]] = {}
        self._next_number = 0
        self._constructing: Member | None = None  # has no number before all ranks have agreed
        self._joins: list[int] = []  # numbers of the members whose join() is open, outermost first
        self._trained_last = True  # False once this rank has served others within the outermost join()
        self.serves = False
        """True while this rank, at the end of a join(), has no data of its own for any member."""

    @property
    def live_members(self) -> int:
        """Number of optimizers that exist."""
        return sum(reference() is not None for reference in self._members.values())

    def construct(self, member: Member, what: str) -> None:
        """Agree that all ranks construct the same optimizer now, and number it."""
        self._constructing = member
        member.number = self._next_number
        try:
            self.meet(Call.CONSTRUCT, member, what)
        finally:
            self._constructing = None
        self._next_number += 1
        self._members = {n: reference for n, reference in self._members.items() if reference() is not None}
        self._members[member.number] = weakref.ref(member)

    def announce_backward(self, member: Member, mask: int, what: str) -> Mean | None:
        """Tell that this rank's backward wants ``mask`` reduced.

        Returns:
            The mean to form, if the caller is to run the round by itself; None if rounds of several members were asked
            for, in which case all of them have been run here, in the order of their numbers.
        """
        row = Row(Call.BACKWARD, member.number, mask, member.plan_digest, 0, 0.0, member.weight_word)
        with self.channel.in_step(what):
            return self._serve(self._exchange(row, what), member)

    def meet(self, call: Call, member: Member, what: str, options: int = 0, payload: float = 0.0) -> list[Row]:
        """Return the rows of all ranks once all of them are in the same call, with all gradients reduced.

        Raises:
            RankMismatchError: ranks are in different calls, or have different plans or options.
        """
        with self.channel.in_step(what):
            while True:
                mask = member.pending_mask()
                row = Row(call, member.number, mask, member.plan_digest, options, payload, member.weight_word)
                rows = self._exchange(row, what)
                if any(r.call == Call.BACKWARD for r in rows):
                    self._serve(rows, None)
                    continue
                self._settle(rows, member)
                return rows

    def meet_together(self, call: Call, what: str) -> None:
        """Return once all ranks are in ``call``, which belongs to no optimizer. Gradients stay as they are.

        Raises:
            RankMismatchError: some are in another call.
        """
        self._exchange(Row(call, -1, 0, 0, 0, 0.0), what)

    @contextmanager
    def join(self, member: Member) -> Iterator[None]:
        """The context of one join(); they may be nested, one for each member."""
        if not self._joins:
            self._trained_last = True
        self._joins.append(member.number)
        try:
            yield
        finally:
            self._joins.pop()

    def serve_joined(self, member: Member, what: str) -> int:
        """Take part in the other ranks' rounds, without data, until all ranks are in join().

        Returns:
            The lowest of the ranks that trained last.
        """
        self.serves = True
        try:
            with self.channel.in_step(what):
                return self._serve_until_all_join(member, what)
        finally:
            self.serves = False

    def _serve_until_all_join(self, member: Member, what: str) -> int:
        while True:
            rows = self._exchange(Row(Call.JOIN, member.number, 0, member.plan_digest, 0, 0.0), what)
            active = [r for r in rows if r.call != Call.JOIN]
            if not active:
                self._require_one_member(rows)
                table = self.channel.exchange_words(np.array([self._trained_last], dtype=np.int64), what)
                return int(table[:, 0].argmax())
            self._trained_last = False
            if any(r.call == Call.BACKWARD for r in rows):
                self._serve(rows, None)
            else:
                self._require_joined(active[0])
                self._settle(rows, self._member(active[0].member))

    def _require_joined(self, row: Row) -> None:
        """An update that this rank misses must be of an optimizer that it receives at the end of join()."""
        if row.call in (Call.STEP, Call.CLOSURE) and row.member not in self._joins:
            raise RankMismatchError(
                f"rank {self.channel.rank} is at the end of join() while others are in {describe(row)}, whose join() "
                "is not open here: enter the join() of every optimizer that the loop steps"
            )

    def _settle(self, rows: list[Row], member: Member) -> None:
        """All ranks are in a call that wants final gradients: check that it is one call, reduce what is left."""
        self._require_same_call(rows)
        self._require_same_options(rows, member)
        mask = 0
        for r in rows:
            mask |= r.mask
        if mask & ALL == 0:
            return  # new memory alone can wait for a reduction that needs it
        if mask & REPLAN:
            member.replan()
        member.run_round(mask, self._mean(rows, member))

    def _exchange(self, row: Row, what: str) -> list[Row]:
        words = row.words()
        table = self.channel.exchange_words(words, what)
        if (table == words).all():
            return [row] * self.channel.size
        rows = list(map(Row.of, table.tolist()))
        if any(r.call in TOGETHER for r in rows):
            raise RankMismatchError(f"{whereabouts(rows)}; every rank must make the same calls in the same order")
        return rows

    def _mean(self, rows: list[Row], member: Member) -> Mean:
        """The mean that a round of ``member`` is to form, of the ranks that are not in join()."""
        weights: list[float | None] = [None if r.call == Call.JOIN else NO_WEIGHT for r in rows]
        for rank, r in enumerate(rows):
            if r.member == member.number and r.call != Call.JOIN:
                weights[rank] = r.weight
        given = any(weight is not None and weight >= 0 for weight in weights)
        if given and any(r.member != member.number and r.call != Call.JOIN for r in rows):
            # Some ranks' headers are of other optimizers, and do not tell.
            mine = np.array([member.weight_word], dtype=np.float64).view(np.int64)
            table = self.channel.exchange_words(mine, "exchange of gradients' weights").view(np.float64)
            weights = [None if r.call == Call.JOIN else float(table[rank, 0]) for rank, r in enumerate(rows)]
        return mean_of(weights)

    def _serve(self, rows: list[Row], own: Member | None) -> Mean | None:
        """Run the rounds that ranks in backward ask for. See announce_backward for the result."""
        masks: dict[int, int] = {}
        for r in rows:
            if r.call == Call.BACKWARD:
                masks[r.member] = masks.get(r.member, 0) | r.mask
        for number in masks:
            self._require_same_plan(rows, number)
        for number in sorted(masks):
            if any(r.mask & REPLAN for r in rows if r.member == number):
                self._member(number).replan()
        if own is not None and list(masks) == [own.number]:
            return self._mean(rows, own)
        for number, mask in sorted(masks.items()):
            member = self._member(number)
            member.run_round(mask, self._mean(rows, member))
        return None

    def _member(self, number: int) -> Member:
        reference = self._members.get(number)
        member = reference() if reference is not None else None
        if member is None:
            raise HeatoptError(
                f"rank {self.channel.rank} has deleted optimizer number {number}, which another rank still uses; "
                "delete optimizers on all ranks or on none"
            )
        return member

    def _require_same_call(self, rows: list[Row]) -> None:
        """All ranks that are not in join() must be in the same call of the same optimizer."""
        self._require_one_member(rows)
        first_rank, first = next((rank, r) for rank, r in enumerate(rows) if r.call != Call.JOIN)
        joined = next((rank for rank, r in enumerate(rows) if r.call == Call.JOIN), None)
        if joined is not None and first.call in (Call.CONSTRUCT, Call.ADD_PARAM_GROUP):
            raise RankMismatchError(
                f"rank {first_rank} is in {describe(first)} while rank {joined} is at the end of join(); "
                "do this outside of join()"
            )
        self._require_same_plan(rows, first.member)

    @staticmethod
    def _require_one_member(rows: list[Row]) -> None:
        """All active ranks must be in one call of one member; if none is active, all must join the same member."""
        active = [(rank, r) for rank, r in enumerate(rows) if r.call != Call.JOIN] or list(enumerate(rows))
        first_rank, first = active[0]
        for rank, r in active:
            if (r.call, r.member) != (first.call, first.member):
                raise RankMismatchError(
                    f"rank {first_rank} is in {describe(first)}, rank {rank} is in {describe(r)}; "
                    "every rank must make the same optimizer calls in the same order"
                )

    def _require_same_plan(self, rows: list[Row], number: int) -> None:
        digests = {r.plan for r in rows if r.member == number}
        if len(digests) <= 1:
            return
        reference = self._members.get(number)
        member = reference() if reference is not None else self._constructing
        prints = self.channel.exchange_objects(member.fingerprint() if member is not None else None)
        known = [found for found in prints if found is not None]
        raise RankMismatchError(f"ranks have different optimizers: {first_difference(known)} ({whereabouts(rows)})")

    def _require_same_options(self, rows: list[Row], member: Member) -> None:
        active = [rank for rank, r in enumerate(rows) if r.call != Call.JOIN]
        if len({rows[rank].options for rank in active}) <= 1:
            return
        tables = self.channel.exchange_objects(member.options())
        first = active[0]
        for rank in active:
            for mine, found in zip(tables[first], tables[rank], strict=False):
                ours, theirs = dict(mine.options), dict(found.options)
                for key in sorted({*ours, *theirs}):
                    if ours.get(key) != theirs.get(key):
                        raise RankMismatchError(
                            f"{key!r} of {mine.owner}: rank {first} has {ours.get(key, 'none')}, rank {rank} has "
                            f"{theirs.get(key, 'none')}; schedule, load and change it alike on all ranks (average a "
                            "metric that decides with heatopt.reduce_metric first)"
                        )
        raise RankMismatchError("the ranks' parameter groups have different options")


_registry: weakref.WeakKeyDictionary[Communicator, Coordinator] = weakref.WeakKeyDictionary()
_registry_lock = threading.Lock()


def coordinator_of(comm: Communicator) -> Coordinator:
    """Return the coordinator of all optimizers that were given ``comm``. Collective at the first call."""
    known = _known(comm)
    if known is None:
        known = Coordinator(comm)
        with _registry_lock:
            _registry[comm] = known
    return known


def meet_for(comm: Communicator, call: Call) -> None:
    """Return once all ranks are in ``call``, as far as optimizers tell, if there has been one on ``comm``. Collective.

    Raises:
        RankMismatchError: on all ranks, if some are in another call, of whatever optimizer.
    """
    known = _known(comm)
    if known is not None:
        known.meet_together(call, str(call))


def _known(comm: Communicator) -> Coordinator | None:
    with _registry_lock:
        return _registry.get(comm)
