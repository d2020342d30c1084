"""What an asynchronous collective returns, and how its steps are driven.

[Note: Collectives are generators]
A collective is written once, as a generator: it starts an operation on the wire, yields the request, and goes on
when the request has completed. Blocking use runs the generator to its end; asynchronous use wraps it in a
:class:`Work`. A generator's local variables hold the buffers, so they live exactly as long as the operation.

[Note: Order of stages]
All ranks must start the operations of one lane in the same order, however far each has come with its works. What a work
starts at its launch is in program order. Before anything later it asks for its turn, by yielding a :class:`Stage`: it
gets it once all works that were launched before have reached that stage, or have completed, so the operations of a
stage are started in the order of the launches, whoever polls and however often.

A rank blocks for nothing but the oldest of its works. So the oldest work that any rank has not completed is one that
all those ranks look after, and goes on; a rank that blocked for a younger one might wait for somebody who waits for
its own part in the older one. A blocking call first completes the works before it. All communicators of a world share
one queue, so a rank that waits for a work alone finds the other ranks' later stages, wherever they block.

[Note: Pump]
MPI moves nothing between nodes unless it is called. While works that need it are in flight a thread polls the queue, so
that they go on beside a long operation that calls no hook. Whoever touches the queue holds its lock, so MPI sees one
thread at a time; every other call of a communicator first completes the works, which ends the thread.

[Note: Works in the background]
To complete a work at the next call of any communicator is too early for one that is to travel while training goes on,
with collectives of its own. Such works are launched on a communicator that has a queue of its own, a *branch*: calls of
other communicators leave it alone, so its works are completed by ``wait()``. Nobody hangs for that:

* a pump drives each branch on each rank, so a rank that waits finds the others' later stages, wherever these block;
* what it calls belongs to the branch alone (duplicated MPI communicators, process groups), so several threads are in
  MPI or gloo at a time, but never two on one communicator, and no order between branches is needed;
* a launch exchanges nothing, so it waits for nobody; that ranks launch the same in the same order is the caller's duty;
* a program that ends completes its branches first: other ranks may wait for the later stages.

Where MPI was started without support for that, background works are in the world's queue as all others.
"""

from __future__ import annotations

import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

__all__ = ["COMPLETED", "Completed", "Handle", "Request", "Stage", "Steps", "Work", "WorkQueue"]

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


class Stage(Request):
    """A work's turn to start what follows. A work's stages ascend; see [Note: Order of stages]."""

    EXCHANGE: Stage
    """On lane 0, after the launch."""
    GATHER: Stage
    """On lane 1."""
    FINISH: Stage
    """The last meeting of a node."""

    def __init__(self, number: int) -> None:
        self.number = number

    def done(self) -> bool:
        return True  # a collective that runs alone has nobody to wait for

    def wait(self) -> None:
        return None


Stage.EXCHANGE, Stage.GATHER, Stage.FINISH = Stage(1), Stage(2), Stage(3)

Steps = Generator[Request, None, T]
Waiting = Callable[[], AbstractContextManager[None]]

_PUMP_SECONDS = 0.5e-3


class Handle(ABC, Generic[T]):
    """Stands for a launched collective; owns every buffer of it until :meth:`wait` returns."""

    @abstractmethod
    def done(self) -> bool:
        """Make progress without blocking; True once the result is there."""

    @abstractmethod
    def wait(self) -> T:
        """Block until the collective has completed and return its result.

        Raises:
            CollectiveTimeoutError: other ranks did not come in time (or the job is ended with that message).
            RankFailedError: another rank failed or left.
        """


class Work(Handle[T]):
    """Handle of a collective that is driven stage by stage."""

    def __init__(self, steps: Steps[T], waiting: Waiting, queue: WorkQueue) -> None:
        self._steps: Steps[T] | None = steps
        self._waiting = waiting
        self._queue = queue
        self._request: Request = COMPLETED
        self._stage = 0  # reached
        self._result: T | None = None
        self._error: BaseException | None = None
        self._failure: Exception | None = None  # of the current request

    def done(self) -> bool:
        self._queue.poll()
        return self._steps is None

    def wait(self) -> T:
        self._queue.complete(self)
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _await_request(self) -> None:
        """Block for the current request; one that has failed has no result, whatever it says later."""
        if self._failure is not None:
            raise self._failure
        try:
            self._request.wait()
        except Exception as error:
            self._failure = error
            raise

    def _is_ready(self, reached: int) -> bool:
        """True if :meth:`_advance` would not block, where works from before have come to stage ``reached``."""
        if isinstance(self._request, Stage):
            return self._request.number <= reached
        return self._failure is None and self._request.done()

    def _advance(self) -> None:
        """Go on after the current request, which has completed, up to the next one."""
        assert self._steps is not None
        if isinstance(self._request, Stage):
            self._stage = self._request.number
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
        # Of all queues of a world. A queue with works in flight lives by its pump, whoever else lets go of it.
        self._branches: weakref.WeakSet[WorkQueue] = weakref.WeakSet()
        self.needs_calls = False
        """True if works stand still unless they are polled; see [Note: Pump]."""

    def branch(self) -> WorkQueue:
        """A queue whose works this one leaves alone until the end; see [Note: Works in the background]."""
        queue = WorkQueue()
        queue.needs_calls = True
        queue._branches = self._branches
        self._branches.add(queue)
        return queue

    def finish_branches(self) -> None:
        """Complete the works of all branches of the world."""
        for queue in list(self._branches):
            queue.drain()

    def launch(self, steps: Steps[T], waiting: Waiting, pumped: bool = True) -> Work[T]:
        """Start the first stage and return the handle.

        Args:
            steps: the collective.
            waiting: the context of each wait for it.
            pumped: False where it needs no calls of its own, or its owner waits for it before anything else.
        """
        with self._lock:
            work = Work(steps, waiting, self)
            work._advance()
            if work._steps is not None:
                self._works.append(work)
                if self.needs_calls and pumped and self._pump is None:
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
            if not isinstance(request, Stage):
                with waiting():
                    request.wait()

    def poll(self) -> None:
        """Advance what can be advanced without blocking."""
        with self._lock:
            reached = Stage.FINISH.number  # by all works that were launched before
            for work in self._works:
                while work._steps is not None and work._is_ready(reached):
                    work._advance()
                if work._steps is not None:
                    reached = min(reached, work._stage)
            while self._works and self._works[0]._steps is None:
                self._works.popleft()

    def complete(self, last: Work[Any]) -> None:
        """Block until ``last`` has completed, and so every work that was launched before."""
        with self._lock:
            self.poll()
            while last._steps is not None:
                oldest = self._works[0]
                with oldest._waiting():
                    oldest._await_request()
                oldest._advance()
                self.poll()

    def drain(self) -> None:
        """Complete every work."""
        with self._lock:
            if self._works:
                self.complete(self._works[-1])

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
