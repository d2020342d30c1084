"""What an asynchronous collective returns, and how its steps are driven.

[Note: Collectives are generators]
A collective is written once, as a generator: it starts an operation on the wire, yields the request, and goes on
when the request has completed. Blocking use runs the generator to its end; asynchronous use wraps it in a
:class:`Work`. A generator's local variables hold the buffers, so they live exactly as long as the operation.

[Note: Order of stages]
All ranks must start the operations of one lane in the same order. First stages run on lane 0, at launch, in program
order. Later stages run on lane 1 and are started strictly in the order of the launches: a work never passes an earlier
one, whoever polls it and however often, and a blocking call first completes the works before it. All communicators of a
world share one queue, so a rank that waits for a work alone finds the other ranks' later stages, wherever they block.

[Note: Pump]
MPI moves nothing between nodes unless it is called. While works are in flight a thread polls the queue, so that they go
on beside a long operation that calls no hook. Whoever touches the queue holds its lock, so MPI sees one thread at a
time; every other call of a communicator first completes the works, which ends the thread.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

__all__ = ["COMPLETED", "Completed", "Request", "Steps", "Work", "WorkQueue"]

T = TypeVar("T")


class Request(ABC):
    """One operation on the wire. It holds its buffers until it has completed."""

    @abstractmethod
    def done(self) -> bool:
        """Make progress; True once the operation has completed."""

    @abstractmethod
    def wait(self) -> None:
        """Block until the operation has completed."""


class Completed(Request):
    """An operation that has completed before it returned."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


COMPLETED = Completed()

Steps = Generator[Request, None, T]
Waiting = Callable[[], AbstractContextManager[None]]

_PUMP_SECONDS = 0.5e-3


class Work(Generic[T]):
    """Handle of a launched collective; owns every buffer of it until :meth:`wait` returns."""

    def __init__(self, steps: Steps[T], waiting: Waiting, queue: WorkQueue) -> None:
        self._steps: Steps[T] | None = steps
        self._waiting = waiting
        self._queue = queue
        self._request: Request = COMPLETED
        self._result: T | None = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Make progress without blocking; True once the result is there."""
        self._queue.poll()
        return self._steps is None

    def wait(self) -> T:
        """Block until the collective has completed and return its result.

        Raises:
            CollectiveTimeoutError: other ranks did not come in time (or the job is ended with that message).
            RankFailedError: another rank failed or left.
        """
        while self._steps is not None:
            self._queue.advance_through(self)
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _advance(self) -> None:
        """Go on after the current request, which has completed, up to the next one."""
        assert self._steps is not None
        try:
            self._request = next(self._steps)
        except StopIteration as stop:
            self._steps, self._request, self._result = None, COMPLETED, stop.value
        except BaseException as error:
            self._steps, self._request, self._error = None, COMPLETED, error
            raise


class WorkQueue:
    """The works of a world's communicators that have not completed, in launch order."""

    def __init__(self) -> None:
        self._works: deque[Work[Any]] = deque()
        self._lock = threading.RLock()
        self._pump: threading.Thread | None = None  # alive as long as works are in flight
        self.needs_calls = False
        """True if works stand still unless they are polled; see [Note: Pump]."""

    def launch(self, steps: Steps[T], waiting: Waiting) -> Work[T]:
        """Start the first stage and return the handle.

        Args:
            steps: the collective.
            waiting: the context of each wait for it.
        """
        with self._lock:
            work = Work(steps, waiting, self)
            work._advance()
            if work._steps is not None:
                self._works.append(work)
                if self.needs_calls and self._pump is None:
                    self._pump = threading.Thread(target=self._poll_until_empty, name="heatopt-pump", daemon=True)
                    self._pump.start()
        return work

    def run(self, steps: Steps[T], waiting: Waiting) -> T:
        """Run a collective to its end."""
        while True:
            try:
                request = next(steps)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            with waiting():
                request.wait()

    def poll(self) -> None:
        """Advance what can be advanced without blocking, never past an earlier work."""
        with self._lock:
            for work in self._works:
                while work._steps is not None and work._request.done():
                    work._advance()
                if work._steps is not None:
                    break
            self._discard_completed()

    def advance_through(self, last: Work[Any]) -> None:
        """Advance each work up to and including ``last`` by one stage, in launch order, blocking."""
        with self._lock:
            for work in list(self._works):
                if work._steps is not None:
                    with work._waiting():
                        work._request.wait()
                    work._advance()
                if work is last:
                    break
            self._discard_completed()

    def drain(self) -> None:
        """Complete every work."""
        while True:
            with self._lock:
                if not self._works:
                    return
                self.advance_through(self._works[-1])

    def _poll_until_empty(self) -> None:
        try:
            while True:
                time.sleep(_PUMP_SECONDS)
                with self._lock:
                    if not self._works:
                        self._pump = None
                        return
                    self.poll()
        except BaseException:
            # Whoever waits for the work meets the same error, and says so.
            with self._lock:
                self._pump = None

    def _discard_completed(self) -> None:
        while self._works and self._works[0]._steps is None:
            self._works.popleft()
