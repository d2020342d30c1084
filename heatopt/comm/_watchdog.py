"""Watches over a rank's waits, so that nothing ever hangs without a name.

[Note: Watchdog]
While the main thread waits inside a collective (and cannot run Python), a daemon thread looks at the clock and at a
bulletin on which ranks post what they do. It ends the job when

* the wait has lasted for its time-out: the late ranks are those that have not posted the same wait;
* a rank has left the program without having entered the operation that this rank waits in;
* two ranks wait for each other in different operations, which can never end.

Ranks post only when a wait has lasted for a while, when somebody else waits for them, and when they leave, so a healthy
run exchanges nothing. The thread uses a channel of its own and never touches the main thread's.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
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
    LEFT = "left"  # its program has ended


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
        """The last call: deliver what was posted, as far as possible within a second."""


class _NoBulletin(Bulletin):
    """After a bulletin has failed, its peers being gone, say: the clock is still watched."""

    def post(self, snapshot: Snapshot) -> None:
        pass

    def poll(self) -> list[Snapshot]:
        return []

    def close(self) -> None:
        pass


class Watchdog:
    """Watches one process; shared by all communicators that descend from the same world."""

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
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heatopt-watchdog", daemon=True)
        self._thread.start()

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
            gone = sorted(other.rank for other in self._others.values() if other.phase is Phase.LEFT)
            if gone:
                return f"left the program: rank {', '.join(map(str, gone))}"
            time.sleep(self._tick / 4)
        return "no rank has said that it left: one was killed or lost its network"

    def leave(self) -> None:
        """This rank's program ends. Stops the thread and tells the others."""
        self._stopped.set()
        self._thread.join(timeout=5.0)
        try:
            self._bulletin.post(Snapshot(self._rank, Phase.LEFT, "its program has ended", entered=dict(self._entered)))
            self._bulletin.close()
        except Exception as error:  # nobody is left to tell
            logger.debug("the bulletin failed at the end: %s", error)

    # Watchdog thread

    def _watch(self) -> None:
        while not self._stopped.wait(self._tick):
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
            behind = other.entered.get(wait.channel, 0) < wait.sequence
            if other.phase is Phase.LEFT and (behind or self._waits_on_after_leave(wait, other.rank)):
                self._fail(
                    wait,
                    f"RankFailedError: rank {other.rank} left the program while rank {self._rank} waited for it in "
                    f"{wait.what}; every rank must make the same collective calls (uneven data: use join())",
                )
            elif behind and self._keeps_waiting(other):
                self._fail(
                    wait,
                    f"RankMismatchError: rank {self._rank} waits in {wait.what} while rank {other.rank} waits in "
                    f"{other.place}; every rank must make the same collective calls in the same order",
                )

    def _waits_on_after_leave(self, wait: _Wait, rank: int) -> bool:
        """True if a rank that started the operation has left without completing its part of it."""
        return time.monotonic() - max(self._left_at[rank], wait.since) > _GRACE_AFTER_LEAVE

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
