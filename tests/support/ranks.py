"""The ``ranks`` fixture: a test of several ranks is written once, and runs on threads or on processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import pytest

from tests.support.launch import LAUNCH
from tests.support.outcomes import BodyResult
from tests.support.rank_plugin import RankSession

if TYPE_CHECKING:
    from heatopt.comm import Communicator

T = TypeVar("T")

EVERY_SIZE = [1, 2, 3, 4]
# One, and several that divide no power of two; the launchers' sessions run the same tests on 1 to 4 ranks.
_THREADS = os.environ.get("HEATOPT_TEST_THREADS") or "1,3"
_THREAD_TIMEOUT = 20.0


class Ranks:
    """Runs the body of a test on each rank.

    Args:
        threads: Number of ranks, each a thread of this process; None for the ranks that the launcher started.
        request: The test.
    """

    def __init__(self, threads: int | None, request: pytest.FixtureRequest) -> None:
        self._threads = threads
        self._request = request

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._session().ranks.size if self._threads is None else self._threads

    def __call__(self, body: Callable[[Communicator], T], *, min_size: int = 1, shared_memory: bool = False) -> list[T]:
        """Run ``body(comm)`` on all ranks and return what it returned, by rank.

        What a rank raises is raised here, on every rank. Skips the test where there are fewer than ``min_size`` ranks.
        Processes share the memory of their node; threads do so if ``shared_memory`` says so.
        """
        __tracebackhide__ = True  # pytest shows the test and its body
        if self.size < min_size:
            pytest.skip(f"needs at least {min_size} ranks, here is {self.size}")
        if self._threads is None:
            return self._run_on_processes(body)
        from heatopt.comm import ThreadWorld

        return ThreadWorld(self._threads, timeout=_THREAD_TIMEOUT, shared_memory=shared_memory).run(body)

    def _run_on_processes(self, body: Callable[[Communicator], T]) -> list[T]:
        __tracebackhide__ = True
        import heatopt

        own = None
        try:
            result = BodyResult("passed", value=body(heatopt.world()))
        except (KeyboardInterrupt, pytest.exit.Exception):
            raise
        except BaseException as error:
            own = error
            result = BodyResult.failed(error)
        # By the session's own connection: heatopt's may be in disorder after an error.
        results = self._session().gather(self._request.node.nodeid, result)
        if own is not None:
            raise own
        for rank, other in enumerate(results):
            if other.kind != "passed":
                raise other.error(rank)
        return [other.value for other in results]

    def _session(self) -> RankSession:
        session = self._request.config.pluginmanager.get_plugin(RankSession.__name__)
        assert isinstance(session, RankSession)
        return session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of ``ranks`` on each number of threads that was asked for, or once under a launcher."""
    if "ranks" not in metafunc.fixturenames:
        return
    if LAUNCH.launched:
        metafunc.parametrize("ranks", [None], ids=["world"], indirect=True)
    else:
        sizes = EVERY_SIZE if metafunc.definition.get_closest_marker("every_size") else _thread_numbers()
        metafunc.parametrize("ranks", sizes, ids=[f"threads{size}" for size in sizes], indirect=True)


def _thread_numbers() -> list[int]:
    try:
        sizes = [int(size) for size in _THREADS.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise pytest.UsageError(f"HEATOPT_TEST_THREADS must be numbers of ranks such as 1,2,4, not {_THREADS!r}")
    return sizes


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Call it with a function of a communicator: see :class:`Ranks`."""
    return Ranks(request.param, request)
