"""The tools of the tests of several ranks, on the ranks themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.launch import LAUNCH
from tests.support.rank_plugin import RankSession
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


@pytest.fixture
def rank_session(request: pytest.FixtureRequest) -> RankSession:
    session = request.config.pluginmanager.get_plugin(RankSession.__name__)
    assert isinstance(session, RankSession)
    return session


def test_body_runs_once_on_each_rank(ranks: Ranks) -> None:
    def body(comm: Communicator) -> tuple[int, int]:
        return comm.rank, comm.size

    assert ranks(body) == [(rank, ranks.size) for rank in range(ranks.size)]


def test_error_of_one_rank_reaches_the_test(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        raise LookupError("on every rank")

    with pytest.raises(LookupError, match="on every rank"):
        ranks(body)


def test_too_few_ranks_skip(ranks: Ranks) -> None:
    with pytest.raises(pytest.skip.Exception, match="needs at least 99 ranks"):
        ranks(lambda comm: None, min_size=99)


@pytest.mark.launched
def test_world_is_the_launchers(ranks: Ranks) -> None:
    def body(comm: Communicator) -> int:
        assert comm.rank == LAUNCH.rank
        return comm.size

    assert set(ranks(body)) == {LAUNCH.size}


@pytest.mark.launched
def test_exchange_gives_every_rank_the_same_list(rank_session: RankSession) -> None:
    exchange = rank_session.ranks
    for turn in range(3):
        value = (turn, exchange.rank, "x" * 100_000 * turn)  # small and large messages
        assert exchange.allgather(value) == [(turn, rank, value[2]) for rank in range(exchange.size)]
