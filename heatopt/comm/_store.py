"""Posts in a key-value store of torch.distributed, and who keeps that store.

[Note: Host of a store]
Without torchrun's agent the store lives in the process of rank 0, so this one must end last. At its exit it waits until
each other rank has said that it has left or closed its communicators. One that was killed cannot: on the same machine
its process is looked at; elsewhere a rank that is there gives signs, by its watchdog's thread, as soon as rank 0 has
left, and a rank that gives none for a minute is not waited for. A rank that is there, but slow, has the whole time-out.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from heatopt._log import logger
from heatopt.comm._process import Process
from heatopt.comm._watchdog import Bulletin, Snapshot

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["StoreBulletin", "StoreHost", "hosts_store"]

dist: Any = torch.distributed  # which does not export its C++ classes to type checkers

_LOOK_SECONDS = 0.05
# Also a rank that is alive gives no sign while a library holds the interpreter's lock.
_SILENCE_SECONDS = 60.0


def hosts_store(rank: int) -> bool:
    """True if the store lives as long as this process."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


class StoreBulletin(Bulletin):
    """A log of posts in a key-value store.

    Args:
        store: let go at the end.
        world: name of the communicator, as keys of several worlds must not meet.
        rank: this process's number.
    """

    def __init__(self, store: Store, world: str, rank: int) -> None:
        self._store: Any = dist.PrefixStore(f"heatopt/bulletin/{world}", store)
        self._rank = rank
        self._counted = 0
        self._unread: list[int] = []
        self.parted: set[int] = set()
        """Ranks that do not need the store any more."""

    def post(self, snapshot: Snapshot) -> None:
        number = self._store.add("posts", 1)
        self._store.set(f"post/{number}", pickle.dumps(snapshot))

    def poll(self) -> list[Snapshot]:
        count = self._store.add("posts", 0)
        self._unread.extend(range(self._counted + 1, count + 1))
        self._counted = count
        # To get what is not there would block: a rank may be about to set it, or may have been killed before it did.
        there = [number for number in self._unread if self._store.check([f"post/{number}"])]
        self._unread = [number for number in self._unread if number not in there]
        posts = [pickle.loads(self._store.get(f"post/{number}")) for number in there]
        self.parted.update(post.rank for post in posts if post.phase.is_last)
        if 0 in self.parted:
            self._store.add(f"signs/{self._rank}", 1)  # see [Note: Host of a store]
        return [post for post in posts if post.rank != self._rank]

    def signs(self, rank: int) -> int:
        """How often ``rank`` has shown that it is there."""
        return int(self._store.add(f"signs/{rank}", 0))

    def close(self) -> None:
        del self._store  # and with it a connection


class StoreHost:
    """Keeps the store in this process, rank 0, until no other rank needs it.

    Args:
        store: the one that lives here.
        world: as for the bulletins.
        size: number of ranks.
        neighbours: processes of the ranks that this one can look at.
        timeout: seconds that it waits for ranks that are there.
        silence: seconds without a sign of a rank elsewhere.
    """

    def __init__(
        self,
        store: Store,
        world: str,
        size: int,
        neighbours: Mapping[int, Process],
        *,
        timeout: float,
        silence: float = _SILENCE_SECONDS,
    ) -> None:
        self._store = store
        self._world = world
        self._neighbours = neighbours
        self._timeout = timeout
        self._silence = silence
        self._others = set(range(1, size))
        self._signs: dict[int, tuple[int, float]] = {}  # the last number of each rank, and since when

    def outlast(self) -> None:
        """Wait for the other ranks; rank 0's last post has been made."""
        bulletin = StoreBulletin(self._store, self._world, 0)
        deadline = time.monotonic() + self._timeout
        try:
            while time.monotonic() < deadline:
                bulletin.poll()
                self._others -= bulletin.parted
                self._others -= {rank for rank in self._others if self._is_gone(rank, bulletin)}
                if not self._others:
                    return
                time.sleep(_LOOK_SECONDS)
        except Exception as error:  # the store has gone before
            logger.debug("the store failed at the end: %s", error)

    def _is_gone(self, rank: int, bulletin: StoreBulletin) -> bool:
        if rank in self._neighbours:
            return self._neighbours[rank].has_ended()
        signs, now = bulletin.signs(rank), time.monotonic()
        if rank not in self._signs or self._signs[rank][0] != signs:
            self._signs[rank] = signs, now
        return now - self._signs[rank][1] > self._silence
