"""The watchdog: what it says of ranks that are late, have left or wait for each other, and when it keeps quiet."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from heatopt.comm import SingleCommunicator
from heatopt.comm._watchdog import Bulletin, Phase, Snapshot, Watchdog

TICK = 0.01
# Long enough for many looks of the watchdog, short enough for many tests.
QUIET = 25 * TICK


class Board:
    """Where the ranks of one test post; each rank reads through a bulletin of its own."""

    def __init__(self) -> None:
        self.posts: list[Snapshot] = []
        self._lock = threading.Lock()

    def add(self, snapshot: Snapshot) -> None:
        with self._lock:
            self.posts.append(snapshot)

    def after(self, number: int) -> list[Snapshot]:
        with self._lock:
            return self.posts[number:]


class BoardBulletin(Bulletin):
    def __init__(self, board: Board, rank: int) -> None:
        self.closed = False
        self.broken = False
        self._board = board
        self._rank = rank
        self._read = 0

    def post(self, snapshot: Snapshot) -> None:
        if self.broken:
            raise OSError("the network is gone")
        self._board.add(snapshot)

    def poll(self) -> list[Snapshot]:
        if self.broken:
            raise OSError("the network is gone")
        news = self._board.after(self._read)
        self._read += len(news)
        return [snapshot for snapshot in news if snapshot.rank != self._rank]

    def close(self) -> None:
        self.closed = True


class Rank:
    """A watchdog whose job does not end: the messages are kept."""

    def __init__(self, board: Board, rank: int, size: int) -> None:
        self.messages: list[str] = []
        self.bulletin = BoardBulletin(board, rank)
        self.dog = Watchdog(rank, size, self.bulletin, self.messages.append, tick=TICK)
        self.dog.watch(self)

    def wait_in(
        self, channel: str, sequence: int, what: str, members: tuple[int, ...] = (0, 1, 2), timeout: float = 600.0
    ) -> None:
        self.dog.enter(channel, sequence)
        self.dog.begin(channel, sequence, what, members, timeout)

    def message(self, seconds: float = 10.0) -> str:
        """The first message; fails if none comes."""
        wait_until(lambda: bool(self.messages), seconds)
        return self.messages[0]

    def assert_quiet(self) -> None:
        time.sleep(QUIET)
        assert self.messages == []


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(TICK / 2)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def start(board: Board) -> Iterator[Callable[[int], Rank]]:
    started: list[Rank] = []

    def start_rank(rank: int) -> Rank:
        started.append(Rank(board, rank, 3))
        return started[-1]

    yield start_rank
    for one in started:
        one.dog.end()
        one.bulletin.broken = False
        one.dog.leave()


@pytest.fixture
def rank0(start: Callable[[int], Rank]) -> Rank:
    return start(0)


def waiting(
    rank: int, channel: str, sequence: int, place: str, members: tuple[int, ...] = (0, 1, 2), **entered: int
) -> Snapshot:
    return Snapshot(rank, Phase.WAITING, place, channel, sequence, members, {channel: sequence} | entered)


def running(rank: int, place: str, **entered: int) -> Snapshot:
    return Snapshot(rank, Phase.RUNNING, place, entered=entered)


def left(rank: int, **entered: int) -> Snapshot:
    return Snapshot(rank, Phase.LEFT, "its program has ended", entered=entered)


def closed(rank: int, **entered: int) -> Snapshot:
    return Snapshot(rank, Phase.CLOSED, "its communicators are closed", entered=entered)


# The clock


def test_timeout_names_the_late_ranks_and_where_they_are(rank0: Rank, board: Board) -> None:
    rank0.wait_in("world", 3, "step() of SGD (bucket 0: weight)", timeout=0.2)
    board.add(waiting(1, "world", 3, "step() of SGD"))
    board.add(running(2, "train.py:7 in load_batch", world=2))
    message = rank0.message()
    assert message.startswith("CollectiveTimeoutError: rank 0 waited 0.2 s in step() of SGD (bucket 0: weight)")
    assert "late: rank 2 (at train.py:7 in load_batch);" in message
    assert "rank 1" not in message
    assert "HEATOPT_TIMEOUT" in message


def test_timeout_names_ranks_that_have_said_nothing(rank0: Rank) -> None:
    rank0.wait_in("world", 1, "barrier()", timeout=0.1)
    assert "late: rank 1, rank 2;" in rank0.message()


def test_timeout_names_members_of_the_group_alone(rank0: Rank, board: Board) -> None:
    rank0.wait_in("half", 1, "allreduce", members=(0, 2), timeout=0.2)
    board.add(running(1, "elsewhere.py:1 in main"))
    board.add(waiting(2, "other", 5, "all_gather", members=(1, 2)))
    assert "late: rank 2 (in all_gather);" in rank0.message()


def test_timeout_of_an_operation_that_all_have_entered(rank0: Rank, board: Board) -> None:
    for rank in (1, 2):
        board.add(waiting(rank, "world", 1, "barrier()"))
    rank0.wait_in("world", 1, "barrier()", timeout=0.2)
    assert "late: no rank" in rank0.message()


def test_each_wait_has_the_whole_time(rank0: Rank) -> None:
    for number in range(1, 11):
        rank0.wait_in("world", number, "barrier()", timeout=0.8)
        time.sleep(0.1)
        rank0.dog.end()
    assert rank0.messages == []


def test_no_time_passes_between_waits(rank0: Rank) -> None:
    rank0.wait_in("world", 1, "barrier()", timeout=0.1)
    rank0.dog.end()
    rank0.assert_quiet()


def test_infinite_timeout(rank0: Rank) -> None:
    rank0.wait_in("world", 1, "barrier()", timeout=math.inf)
    rank0.assert_quiet()


def test_clock_runs_on_when_the_bulletin_is_broken(rank0: Rank) -> None:
    rank0.bulletin.broken = True
    rank0.wait_in("world", 1, "barrier()", timeout=0.1)
    assert "CollectiveTimeoutError" in rank0.message()


# Ranks that have left


def test_left_rank_is_named_long_before_the_timeout(rank0: Rank, board: Board) -> None:
    rank0.wait_in("world", 4, "step() of Adam")
    board.add(left(2, world=3))
    message = rank0.message()
    assert message.startswith("RankFailedError: rank 2 left the program while rank 0 waited for it in step() of Adam")
    assert "join()" in message


def test_rank_that_left_before_the_wait_began(rank0: Rank, board: Board) -> None:
    board.add(left(1, world=3))
    rank0.assert_quiet()
    rank0.wait_in("world", 4, "barrier()")
    assert "rank 1 left the program" in rank0.message()


def test_rank_that_never_used_the_channel_and_left(rank0: Rank, board: Board) -> None:
    rank0.wait_in("world.1.0", 1, "backward()")
    board.add(left(1, world=9))
    assert "rank 1 left the program" in rank0.message()


def test_rank_may_leave_after_it_has_entered_all(rank0: Rank, board: Board) -> None:
    # It has done its part; this rank is about to get the result, or waits for a third one.
    rank0.wait_in("world", 4, "barrier()")
    board.add(left(1, world=4))
    board.add(left(2, world=5))
    rank0.assert_quiet()


def test_rank_that_left_without_completing_its_part(rank0: Rank, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heatopt.comm._watchdog._GRACE_AFTER_LEAVE", 0.1)
    rank0.wait_in("world", 4, "allreduce")
    board.add(left(1, world=4))  # launched it, never waited for it
    assert "rank 1 left the program" in rank0.message()


def test_rank_outside_of_the_group_may_leave(rank0: Rank, board: Board) -> None:
    rank0.wait_in("pair", 4, "barrier()", members=(0, 1))
    board.add(left(2))
    rank0.assert_quiet()


def test_ranks_may_leave_while_this_one_waits_for_nobody(rank0: Rank, board: Board) -> None:
    board.add(left(1, world=1))
    board.add(left(2, world=1))
    rank0.assert_quiet()


def test_rank_that_closed_before_the_wait_began(rank0: Rank, board: Board) -> None:
    board.add(closed(1, world=3))
    rank0.wait_in("world", 4, "barrier()")
    assert rank0.message().startswith("RankFailedError: rank 1 closed its communicators while rank 0 waited for it")


def test_rank_may_close_after_it_has_entered_all(rank0: Rank, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heatopt.comm._watchdog._GRACE_AFTER_LEAVE", 0.1)
    rank0.wait_in("world", 4, "barrier()")  # for a third one: who closes has completed its part
    board.add(closed(1, world=4))
    rank0.assert_quiet()


@pytest.mark.parametrize(("post", "deed"), [(left, "left the program"), (closed, "closed its communicators")])
def test_news_of_a_rank_that_left(rank0: Rank, board: Board, post: Callable[[int], Snapshot], deed: str) -> None:
    board.add(post(2))
    assert rank0.dog.wait_for_news(5.0) == f"{deed}: rank 2"


def test_no_news(rank0: Rank, board: Board) -> None:
    board.add(running(1, "train.py:7 in main"))
    assert "killed or lost its network" in rank0.dog.wait_for_news(5 * TICK)


# Ranks that wait for each other


def test_ranks_that_wait_for_each_other(rank0: Rank, board: Board) -> None:
    rank0.wait_in("world", 7, "allreduce sum")
    board.add(waiting(1, "world.1.0", 3, "step() of SGD", world=6))
    message = rank0.message()
    assert message.startswith("RankMismatchError: rank 0 waits in allreduce sum while rank 1 waits in step() of SGD")


def test_waiting_in_the_same_operation(rank0: Rank, board: Board) -> None:
    rank0.wait_in("world", 7, "allreduce sum")
    board.add(waiting(1, "world", 7, "allreduce sum"))
    rank0.assert_quiet()


def test_other_waits_in_a_later_operation(rank0: Rank, board: Board) -> None:
    # It has passed the one that this rank is about to leave.
    rank0.wait_in("world", 7, "allreduce sum")
    board.add(waiting(1, "world", 8, "barrier()"))
    rank0.assert_quiet()


def test_other_waits_with_ranks_that_do_not_need_this_one(rank0: Rank, board: Board) -> None:
    rank0.wait_in("world", 7, "allreduce sum")
    board.add(waiting(1, "pair", 3, "allreduce in the pair", members=(1, 2), world=6))
    rank0.assert_quiet()


def test_other_waits_for_what_this_rank_has_started(rank0: Rank, board: Board) -> None:
    rank0.dog.enter("twin", 3)  # launched; the other will have it when all are there
    rank0.wait_in("world", 7, "allreduce sum")
    board.add(waiting(1, "twin", 3, "allreduce in the twin", world=6))
    rank0.assert_quiet()


def test_old_post_about_a_wait_that_has_ended(rank0: Rank, board: Board) -> None:
    board.add(waiting(1, "twin", 3, "allreduce in the twin", world=6))
    rank0.wait_in("twin", 3, "allreduce in the twin")
    rank0.dog.end()
    # The other one computes now, and says nothing.
    rank0.wait_in("world", 7, "allreduce sum")
    rank0.assert_quiet()


# Several watchdogs that talk to each other


def test_two_ranks_in_different_operations(start: Callable[[int], Rank]) -> None:
    first, second = start(0), start(1)
    first.wait_in("world", 1, "allreduce sum", members=(0, 1), timeout=2.0)
    second.wait_in("world.1.0", 1, "step() of SGD", members=(0, 1), timeout=2.0)
    wait_until(lambda: bool(first.messages or second.messages))
    message = (first.messages + second.messages)[0]
    assert message.startswith("RankMismatchError")
    assert "allreduce sum" in message
    assert "step() of SGD" in message


def test_late_rank_tells_where_it_is(start: Callable[[int], Rank]) -> None:
    first, _late = start(0), start(1)
    first.wait_in("world", 1, "barrier()", members=(0, 1), timeout=0.4)
    message = first.message()  # this is where the main thread is, which stands for the late rank's
    assert "late: rank 1 (at " in message
    assert " in wait_until" in message


def test_rank_that_leaves_tells_the_others(start: Callable[[int], Rank], board: Board) -> None:
    first, second = start(0), start(1)
    second.dog.enter("world", 1)
    first.wait_in("world", 2, "barrier()", members=(0, 1))
    second.dog.leave()
    assert second.bulletin.closed
    assert board.posts[-1].phase is Phase.LEFT
    assert "rank 1 left the program" in first.message()


def test_all_leave_in_any_order(start: Callable[[int], Rank]) -> None:
    ranks = [start(rank) for rank in range(3)]
    for number in range(1, 4):
        for one in ranks:
            one.wait_in("world", number, "barrier()")
            one.dog.end()
    for one in ranks[::-1]:
        one.dog.leave()
    time.sleep(QUIET)
    assert [one.messages for one in ranks] == [[], [], []]


def test_healthy_ranks_post_nothing(start: Callable[[int], Rank], board: Board) -> None:
    ranks = [start(rank) for rank in range(3)]
    deadline = time.monotonic() + QUIET
    number = 0
    while time.monotonic() < deadline:
        number += 1
        for one in ranks:
            one.wait_in("world", number, "allreduce sum")
        time.sleep(2 * TICK)
        for one in ranks:
            one.dog.end()
    assert board.posts == []


def test_no_message_after_leaving(start: Callable[[int], Rank]) -> None:
    one = start(0)
    one.wait_in("world", 1, "barrier()", timeout=0.1)
    one.dog.leave()
    one.messages.clear()
    one.assert_quiet()


# The end of the watch


class User:
    """Stands for a communicator."""


def test_ends_with_the_last_user(start: Callable[[int], Rank], board: Board) -> None:
    one = start(0)
    child, grandchild = User(), User()
    one.dog.watch(child)
    one.dog.watch(grandchild)
    for user in (one, one, child):  # the parent first, and twice
        one.dog.release(user)
    time.sleep(QUIET)
    assert one.dog._thread.is_alive()
    assert board.posts == []
    one.dog.release(grandchild)
    assert not one.dog._thread.is_alive()
    one.dog.release(grandchild)
    one.dog.leave()
    assert [post.phase for post in board.posts] == [Phase.CLOSED]
    assert one.bulletin.closed


def test_interrupted_user_is_watched_until_the_program_ends(start: Callable[[int], Rank], board: Board) -> None:
    one, comm = start(0), SingleCommunicator()
    comm._watchdog = one.dog
    one.dog.watch(comm)
    one.dog.release(one)
    with pytest.raises(KeyboardInterrupt), comm.in_step("allreduce"):
        raise KeyboardInterrupt
    comm.close()
    assert one.dog._thread.is_alive()
    one.dog.leave()
    assert [post.phase for post in board.posts] == [Phase.LEFT]


def test_ends_when_the_last_user_is_garbage(board: Board) -> None:
    one, child = Rank(board, 0, 3), User()
    dog, bulletin = one.dog, one.bulletin
    dog.watch(child)
    child.itself = child  # type: ignore[attr-defined]  # for the collector to find
    del one
    gc.collect()
    time.sleep(QUIET)
    assert dog._thread.is_alive()
    del child
    gc.collect()
    wait_until(lambda: not dog._thread.is_alive())
    assert bulletin.closed
    dog.leave()
    assert [post.phase for post in board.posts] == [Phase.CLOSED]


def test_a_finalizer_in_the_watching_thread_closes(board: Board) -> None:
    """A collector runs in any thread."""
    one = Rank(board, 0, 3)
    one.bulletin.poll = lambda: one.dog.release(one) or []  # type: ignore[method-assign, func-returns-value]
    wait_until(lambda: not one.dog._thread.is_alive())
    assert [post.phase for post in board.posts] == [Phase.CLOSED]


def test_broken_bulletin_at_the_end(rank0: Rank) -> None:
    rank0.bulletin.broken = True
    rank0.dog.release(rank0)
    assert not rank0.dog._thread.is_alive()
