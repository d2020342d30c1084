"""Watches over a rank's waits, so that nothing ever hangs without a name.

[Note: Watchdog]
While the main thread waits inside a collective (and cannot run Python), a daemon thread looks at the clock and at a
bulletin on which ranks post what they do. It ends the job when

* the wait has lasted for its time-out: the late ranks are those that have not posted the same wait;
* a rank has left the program without having entered the operation that this rank waits in;
* two ranks wait for each other in different operations, which can never end.

Ranks post only when a wait has lasted for a while, when somebody else waits for them, and when they leave, so a healthy
run exchanges nothing. The thread uses a channel of its own and never touches the main thread's.

[Note: End of the watch]
All communicators that descend from one world share its watchdog, which knows them weakly: they are its users. The watch
ends with the last of them. When that is closed, ``release()`` ends the thread before it returns. When that is garbage,
no code of ours runs where it was collected (that may be any line, in any thread, with any lock held): the thread finds
itself without users at its next look. So nothing that lives as long as the thread, or until the program ends, may refer
to a communicator. Either way the last post says CLOSED, and LEFT where the program ends first.

CLOSED is a promise: this rank has completed its part of all that it has entered, so others may wait on for a third one.
A communicator that was interrupted cannot give it, and is kept; nor can one whose close() fails, which is not released,
and which the works that it could not complete keep. Their ranks say LEFT, when their programs end.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from heatopt._log import logger

__all__ = ["Bulletin", "Phase", "Snapshot", "Watchdog"]

# What a rank has sent before it left arrives within these seconds.
_GRACE_AFTER_LEAVE = 5.0


class Phase(Enum):
    """What a rank does, as far as the others need to know."""

    RUNNING = "running"  # in the user's code
    WAITING = "waiting"  # inside a collective
    CLOSED = "closed"  # its program goes on without communicators
    LEFT = "left"  # its program has ended

    @property
    def is_last(self) -> bool:
        """True if no other phase follows."""
        return self in _LAST_WORDS


# What a rank has done, as others and as the rank itself say it.
_LAST_WORDS = {
    Phase.CLOSED: ("closed its communicators", "its communicators are closed"),
    Phase.LEFT: ("left the program", "its program has ended"),
}


@dataclass(frozen=True)
class Snapshot:
    """What one rank posted on the bulletin."""

    rank: int
    phase: Phase
    place: str
    """Where the rank is: the collective that it waits in, or the line of user code that it runs."""
    channel: str = ""
    sequence: int = 0
    members: tuple[int, ...] = ()
    """Ranks that take part in the operation that the rank waits in."""
    entered: dict[str, int] = field(default_factory=dict)
    """Number of operations that the rank has entered, for each channel."""


@dataclass(frozen=True)
class _Wait:
    channel: str
    sequence: int
    what: str
    members: tuple[int, ...]
    since: float
    timeout: float


class Bulletin(ABC):
    """Where ranks post what they do. Used by the watchdog's thread, and by the main thread after that has ended."""

    @abstractmethod
    def post(self, snapshot: Snapshot) -> None:
        """Show ``snapshot`` to all other ranks; never waits for them."""

    @abstractmethod
    def poll(self) -> list[Snapshot]:
        """What other ranks posted since the last call."""

    @abstractmethod
    def close(self) -> None:
        """The last call: deliver what was posted, as far as possible within a second, and let go of what was opened."""


class _NoBulletin(Bulletin):
    """After a bulletin has failed, its peers being gone, say: the clock is still watched."""

    def post(self, snapshot: Snapshot) -> None:
        pass

    def poll(self) -> list[Snapshot]:
        return []

    def close(self) -> None:
        pass


class Watchdog:
    """Watches one process; shared by all communicators that descend from the same world.

    Args:
        rank: this process's number in the world.
        size: number of ranks.
        bulletin: the watchdog's own.
        end_job: ends the job on all ranks with a message; refers to no communicator, see [Note: End of the watch].
        tick: seconds between looks.
    """

    def __init__(self, rank: int, size: int, bulletin: Bulletin, end_job: Callable[[str], None], tick: float = 0.25):
        self._rank = rank
        self._size = size
        self._bulletin = bulletin
        self._end_job = end_job
        self._tick = tick
        self._entered: dict[str, int] = {}
        self._wait: _Wait | None = None
        self._posted: _Wait | None = None
        self._answered: set[tuple[str, int]] = set()
        self._others: dict[int, Snapshot] = {}
        self._left_at: dict[int, float] = {}
        self._main_thread = threading.main_thread().ident
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._kept: list[object] = []
        # Held while the thread is to go on. A plain lock: an event's own code could be interrupted by a finalizer that
        # closes a communicator, and so sets the event, in the thread that holds the event's lock.
        self._going = threading.Lock()
        self._going.acquire()
        self._stopped = False
        self._has_parted = False
        self._thread = threading.Thread(target=self._watch, name="heatopt-watchdog", daemon=True)

    def watch(self, user: object) -> None:
        """Watch until ``user`` has been released or collected; the first one starts the thread."""
        self._users.add(user)
        if self._thread.ident is None:
            self._thread.start()

    def keep(self, user: object) -> None:
        """Watch until the program ends: ``user`` has left an operation that others go on with."""
        self._kept.append(user)

    def release(self, user: object) -> None:
        """``user`` has been closed: with the last one the thread ends, and the others are told. May be repeated."""
        if user not in self._kept:
            self._users.discard(user)
        if not self._users:
            self._stop(Phase.CLOSED)

    # Main thread: a few attribute writes per collective, no lock.

    def enter(self, channel: str, sequence: int) -> None:
        """The main thread starts the ``sequence``-th operation of ``channel``."""
        self._entered[channel] = sequence

    def begin(self, channel: str, sequence: int, what: str, members: tuple[int, ...], timeout: float) -> None:
        """The main thread is about to wait in an operation that it has started."""
        self._wait = _Wait(channel, sequence, what, members, time.monotonic(), timeout)

    def end(self) -> None:
        """The wait is over."""
        self._wait = None

    def place(self) -> str:
        """The collective that the main thread is in."""
        wait = self._wait
        return "a collective" if wait is None else wait.what

    def wait_for_news(self, seconds: float) -> str:
        """Give others time to post why they stopped, and return it; for a main thread whose operation has failed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for phase, (deed, _) in _LAST_WORDS.items():
                gone = sorted(other.rank for other in self._others.values() if other.phase is phase)
                if gone:
                    return f"{deed}: rank {', '.join(map(str, gone))}"
            time.sleep(self._tick / 4)
        return "no rank has said that it left: one was killed or lost its network"

    def leave(self) -> None:
        """This rank's program ends. Stops the thread and tells the others, unless that has been done."""
        self._stop(Phase.LEFT)

    def _stop(self, phase: Phase) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._going.release()
        if threading.current_thread() is not self._thread:  # whose collector may have run a finalizer that closes
            self._thread.join(timeout=5.0)
        self._part(phase)

    def _part(self, phase: Phase) -> None:
        """The last post: by the watchdog's thread, or by another one after that has ended."""
        if self._has_parted:
            return
        self._has_parted = True
        try:
            self._bulletin.post(Snapshot(self._rank, phase, _LAST_WORDS[phase][1], entered=dict(self._entered)))
            self._bulletin.close()
        except Exception as error:  # nobody is left to tell
            logger.debug("the bulletin failed at the end: %s", error)

    # Watchdog thread

    def _watch(self) -> None:
        while not self._going.acquire(timeout=self._tick):
            if not self._users:
                self._part(Phase.CLOSED)
                return
            try:
                self._look()
            except Exception as error:
                logger.debug("the bulletin failed: %s", error)
                self._bulletin = _NoBulletin()

    def _look(self) -> None:
        for snapshot in self._bulletin.poll():
            self._others[snapshot.rank] = snapshot
            if snapshot.phase is Phase.LEFT:
                self._left_at[snapshot.rank] = time.monotonic()
        self._answer()
        wait = self._wait
        if wait is None:
            self._posted = None
            return
        elapsed = time.monotonic() - wait.since
        if elapsed > min(1.0, wait.timeout / 4) and self._posted is not wait:
            self._posted = wait
            self._post(Phase.WAITING, wait.what, wait)
        if elapsed > 4 * self._tick:
            self._check_others(wait)
        self._check_clock()

    def _answer(self) -> None:
        """Tell where this rank is, if somebody waits for it in an operation that it has not entered."""
        for other in self._others.values():
            key = (other.channel, other.sequence)
            if self._wait is None and self._keeps_waiting(other) and key not in self._answered:
                self._answered.add(key)
                self._post(Phase.RUNNING, self._main_thread_place())

    def _keeps_waiting(self, other: Snapshot) -> bool:
        """True if ``other`` waits in an operation that needs this rank and that this rank has not entered."""
        needed = other.phase is Phase.WAITING and self._rank in other.members
        return needed and self._entered.get(other.channel, 0) < other.sequence

    def _post(self, phase: Phase, place: str, wait: _Wait | None = None) -> None:
        entered = dict(self._entered)
        if wait is None:
            snapshot = Snapshot(self._rank, phase, place, entered=entered)
        else:
            snapshot = Snapshot(self._rank, phase, place, wait.channel, wait.sequence, wait.members, entered)
        self._bulletin.post(snapshot)

    def _check_others(self, wait: _Wait) -> None:
        for other in self._others.values():
            if other.rank not in wait.members:
                continue
            deed = _LAST_WORDS[other.phase][0] if other.phase.is_last else ""
            behind = other.entered.get(wait.channel, 0) < wait.sequence
            if deed and (behind or self._waits_on_after_leave(wait, other)):
                self._fail(
                    wait,
                    f"RankFailedError: rank {other.rank} {deed} while rank {self._rank} waited for it in "
                    f"{wait.what}; every rank must make the same collective calls (uneven data: use join())",
                )
            elif behind and self._keeps_waiting(other):
                self._fail(
                    wait,
                    f"RankMismatchError: rank {self._rank} waits in {wait.what} while rank {other.rank} waits in "
                    f"{other.place}; every rank must make the same collective calls in the same order",
                )

    def _waits_on_after_leave(self, wait: _Wait, other: Snapshot) -> bool:
        """True if a rank that started the operation has left without completing its part, as who closes does."""
        if other.phase is not Phase.LEFT:
            return False
        return time.monotonic() - max(self._left_at[other.rank], wait.since) > _GRACE_AFTER_LEAVE

    def _check_clock(self) -> None:
        wait = self._wait
        if wait is not None and time.monotonic() - wait.since > wait.timeout:
            self._fail(
                wait,
                f"CollectiveTimeoutError: rank {self._rank} waited {wait.timeout:g} s in {wait.what}; "
                f"late: {self._describe_late(wait)}; raise timeout= or HEATOPT_TIMEOUT if that is not too long",
            )

    def _describe_late(self, wait: _Wait) -> str:
        late = []
        for rank in wait.members:
            other = self._others.get(rank)
            if rank == self._rank or (other and other.entered.get(wait.channel, 0) >= wait.sequence):
                continue
            place = f" ({'in' if other.phase is Phase.WAITING else 'at'} {other.place})" if other else ""
            late.append(f"rank {rank}{place}")
        return ", ".join(late) or "no rank (the operation itself does not end)"

    def _fail(self, wait: _Wait, message: str) -> None:
        if self._wait is wait:  # else the wait has ended in the meantime
            self._end_job(message)

    def _main_thread_place(self) -> str:
        frame = sys._current_frames().get(self._main_thread or -1)
        if frame is None:
            return "an unknown place"
        summary = traceback.extract_stack(frame)[-1]
        return f"{summary.filename}:{summary.lineno} in {summary.name}"
