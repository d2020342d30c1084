"""Posts in a store, and the rank in whose process the store lives: it leaves last, but does not wait for the dead."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

import pytest
import torch.distributed as dist

from heatopt.comm._process import Process
from heatopt.comm._store import StoreBulletin, StoreHost, hosts_store
from heatopt.comm._watchdog import Phase, Snapshot

SILENCE = 0.3


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def say(store: dist.Store, rank: int, phase: Phase, world: str = "world") -> None:
    StoreBulletin(store, world, rank).post(Snapshot(rank, phase, "somewhere"))


def host(
    store: dist.Store, size: int = 2, neighbours: Mapping[int, Process] | None = None, timeout: float = math.inf
) -> StoreHost:
    """That of rank 0, which has left."""
    say(store, 0, Phase.LEFT)
    return StoreHost(store, "world", size, neighbours or {}, timeout=timeout, silence=SILENCE)


@pytest.fixture
def child() -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child
    child.kill()
    child.communicate()


def test_ranks_that_have_left_or_closed(store: dist.Store) -> None:
    say(store, 1, Phase.CLOSED)
    say(store, 2, Phase.LEFT)
    host(store, 3, {1: Process(os.getpid())}).outlast()


def test_killed_neighbour(store: dist.Store, child: subprocess.Popen[bytes]) -> None:
    """Long before its silence would tell."""
    keeper = StoreHost(store, "world", 2, {1: Process(child.pid)}, timeout=math.inf)
    child.kill()
    keeper.outlast()


def test_slow_neighbour_has_the_whole_time(store: dist.Store, child: subprocess.Popen[bytes]) -> None:
    """It may be stopped, or be in a library that lets no other thread run: it need not give signs."""
    keeper = threading.Thread(target=host(store, 2, {1: Process(child.pid)}).outlast, daemon=True)
    keeper.start()
    keeper.join(4 * SILENCE)
    assert keeper.is_alive()
    say(store, 1, Phase.LEFT)
    keeper.join(10.0)
    assert not keeper.is_alive()


def test_nobody_is_waited_for_without_end(store: dist.Store) -> None:
    host(store, 2, {1: Process(os.getpid())}, timeout=0.1).outlast()


def test_silent_rank_elsewhere(store: dist.Store) -> None:
    host(store).outlast()


def test_slow_rank_elsewhere_gives_signs(store: dist.Store) -> None:
    keeper = threading.Thread(target=host(store, 3).outlast, daemon=True)
    slow = StoreBulletin(store, "world", 2)  # rank 1 is dead
    keeper.start()
    deadline = time.monotonic() + 4 * SILENCE
    while time.monotonic() < deadline:
        slow.poll()  # as its watchdog does
        time.sleep(SILENCE / 30)
    assert keeper.is_alive()
    slow.post(Snapshot(2, Phase.LEFT, "somewhere"))
    keeper.join(10.0)
    assert not keeper.is_alive()


def test_no_signs_as_long_as_the_host_is_there(store: dist.Store) -> None:
    bulletin = StoreBulletin(store, "world", 1)
    bulletin.poll()
    assert bulletin.signs(1) == 0
    say(store, 0, Phase.LEFT)
    bulletin.poll()
    assert bulletin.signs(1) == 1


def test_store_that_has_gone(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bulletin: StoreBulletin) -> None:
        raise RuntimeError("connection reset")

    keeper = host(store)
    monkeypatch.setattr(StoreBulletin, "poll", fail)
    keeper.outlast()


def test_posts_of_others_once_each(store: dist.Store) -> None:
    bulletin = StoreBulletin(store, "world", 1)
    for rank in (0, 1, 2):
        say(store, rank, Phase.RUNNING)
    say(store, 0, Phase.CLOSED, "a world before")
    assert [post.rank for post in bulletin.poll()] == [0, 2]
    assert bulletin.poll() == []
    assert bulletin.parted == set()


def test_post_that_is_not_there_yet(store: dist.Store) -> None:
    """Its rank has taken a number and nothing more; it may have been killed."""
    bulletin = StoreBulletin(store, "world", 0)
    late = dist.PrefixStore("heatopt/bulletin/world", store)
    number = late.add("posts", 1)
    say(store, 2, Phase.RUNNING)
    assert [post.rank for post in bulletin.poll()] == [2]
    late.set(f"post/{number}", late.get("post/2"))
    assert [post.rank for post in bulletin.poll()] == [2]
    assert bulletin.poll() == []


@pytest.mark.parametrize(("rank", "agent", "hosts"), [(0, "", True), (0, "True", False), (1, "", False)])
def test_who_hosts_the_store(rank: int, agent: str, hosts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    assert hosts_store(rank) is hosts
