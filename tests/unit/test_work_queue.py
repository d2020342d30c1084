"""Works go on by themselves where that is asked for, and an error meets whoever waits."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from heatopt.comm._work import Request, Steps, WorkQueue


class Polls(Request):
    """Completed at the n-th question, or at once by waiting."""

    def __init__(self, needed: int, error: Exception | None = None) -> None:
        self.left = needed
        self.error = error
        self.threads: set[str] = set()

    def done(self) -> bool:
        self.threads.add(threading.current_thread().name)
        self.left -= 1
        if self.left <= 0 and self.error is not None:
            raise self.error
        return self.left <= 0

    def wait(self) -> None:
        if self.error is not None:
            raise self.error
        self.left = 0


def steps(*requests: Polls) -> Steps[str]:
    yield from requests
    return "result"


def pump_of(queue: WorkQueue) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t is queue._pump]


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_thread_goes_on_with_works_and_ends_with_them() -> None:
    queue = WorkQueue()
    queue.needs_calls = True
    requests = [Polls(3), Polls(5), Polls(2)]
    works = [queue.launch(steps(requests[0], requests[1]), contextlib.nullcontext)]
    works.append(queue.launch(steps(requests[2]), contextlib.nullcontext))
    wait_until(lambda: all(work._steps is None for work in works))
    assert [work.wait() for work in works] == ["result", "result"]
    assert all(request.threads == {"heatopt-pump"} for request in requests)
    wait_until(lambda: queue._pump is None)
    again = queue.launch(steps(Polls(2)), contextlib.nullcontext)
    wait_until(lambda: again._steps is None)


@pytest.mark.parametrize(("needs_calls", "pumped"), [(False, True), (True, False)])
def test_no_thread_where_works_go_on_by_themselves(needs_calls: bool, pumped: bool) -> None:
    queue = WorkQueue()
    queue.needs_calls = needs_calls
    work = queue.launch(steps(Polls(2)), contextlib.nullcontext, pumped)
    assert pump_of(queue) == []
    assert not work.done()
    assert work.done()


def test_an_error_in_the_thread_meets_whoever_waits() -> None:
    queue = WorkQueue()
    queue.needs_calls = True
    work = queue.launch(steps(Polls(3, OSError("the network is gone"))), contextlib.nullcontext)
    wait_until(lambda: queue._pump is None)
    with pytest.raises(OSError, match="the network is gone"):
        work.wait()
