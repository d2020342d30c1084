"""Ranks as threads of one process: the whole package in milliseconds, without a launcher, for tests."""

from __future__ import annotations

import math
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

from heatopt.comm._communicator import Communicator, Words
from heatopt.comm._topology import Topology
from heatopt.comm._work import Request
from heatopt.errors import CollectiveTimeoutError, RankFailedError, RankMismatchError

__all__ = ["Event", "Passed", "ThreadCommunicator", "ThreadWorld"]

T = TypeVar("T")


class Event(NamedTuple):
    """One operation that one rank started; ``ThreadWorld.events`` lists them in the order of the starts."""

    rank: int
    kind: str
    """"all_to_all", "all_to_all_parts", "all_gather", "broadcast", "words" or "objects"."""
    channel: str
    bytes: int
    """Size of what the rank passed in; 0 for objects."""


@dataclass
class _Deposit:
    kind: str
    nbytes: int
    value: Any


class Passed(NamedTuple):
    """What a rank passes to an operation."""

    kind: str
    nbytes: int
    detail: tuple[int, ...]
    """The lengths of the parts, or the root."""


class ThreadWorld:
    """Runs a function on ``size`` threads, each of which is a rank.

    Args:
        size: number of ranks.
        timeout: seconds after which a waiting rank raises :class:`~heatopt.errors.CollectiveTimeoutError`.
        ranks_per_node: grouping into virtual nodes, at least 1; default: ``HEATOPT_RANKS_PER_NODE``, or all on one.
        shared_memory: reduce buckets in memory that the ranks of a node share, as processes do; such operations are not
            among the events.

    Example:
        >>> ThreadWorld(2).run(lambda comm: comm.allreduce(torch.tensor(comm.rank + 1)).item())
        [3, 3]
    """

    def __init__(
        self, size: int, timeout: float = 30.0, *, ranks_per_node: int | None = None, shared_memory: bool = False
    ) -> None:
        _check_count("size", size)
        self.size = size
        self.timeout = timeout
        self.shared_memory = shared_memory
        self.events: list[Event] = []
        self._topology = _virtual_nodes(size, ranks_per_node)
        self._changed = threading.Condition()
        self._deposits: dict[tuple[str, int], dict[int, _Deposit]] = {}
        self._takers: dict[tuple[str, int], int] = {}  # how many ranks have taken the deposits, which then go
        self._gone: dict[int, str] = {}

    def run(self, function: Callable[..., T], *arguments: object) -> list[T]:
        """Return ``[function(comm of rank 0, *arguments), ...]``.

        Raises:
            BaseException: what the first failing rank raised; the other ranks are released first.
        """
        results: list[Any] = [None] * self.size
        failures: list[tuple[int, BaseException]] = []

        def body(rank: int) -> None:
            reason = "has finished"
            comm = self._enter(rank)
            try:
                results[rank] = function(comm, *arguments)
                comm._queue.finish_branches()  # as at the end of a process
            except BaseException as error:
                failures.append((rank, error))
                reason = f"failed with {type(error).__name__}: {error}"
            self._leave(rank, reason)

        self._open()
        threads = [
            threading.Thread(target=body, args=(rank,), name=f"rank{rank}", daemon=True) for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            # The first failure is the cause; what the released ranks raise afterwards follows from it.
            raise failures[0][1]
        return results

    def _open(self) -> None:
        """A run begins."""
        self._deposits.clear()
        self._takers.clear()
        self._gone.clear()

    def _enter(self, rank: int) -> ThreadCommunicator:
        """A rank begins, in its thread."""
        return ThreadCommunicator(self, "world", tuple(range(self.size)), rank, self._topology)

    def _leave(self, rank: int, reason: str) -> None:
        """A rank has ended."""
        with self._changed:
            self._gone[rank] = reason
            self._changed.notify_all()

    def _deposit(self, key: tuple[str, int], rank: int, deposit: _Deposit, event: Event) -> None:
        with self._changed:
            self._deposits.setdefault(key, {})[rank] = deposit
            self.events.append(event)
            self._changed.notify_all()

    def _is_decided(self, key: tuple[str, int], members: tuple[int, ...]) -> bool:
        """True if nobody is waited for any more: all have deposited, or one that has not is gone."""
        with self._changed:
            missing = [member for member in members if member not in self._deposits.get(key, ())]
            return not missing or any(member in self._gone for member in missing)

    def _collect(self, key: tuple[str, int], members: tuple[int, ...], timeout: float, rank: int) -> list[Any]:
        """Wait until every member has deposited and return the values in member order."""
        deadline = time.monotonic() + min(timeout, threading.TIMEOUT_MAX / 2)
        with self._changed:
            while True:
                there = self._deposits.get(key, {})
                missing = [member for member in members if member not in there]
                if not missing:
                    break
                gone = [member for member in missing if member in self._gone]
                if gone:
                    raise RankFailedError(f"rank {rank} waits for rank {gone[0]}, which {self._gone[gone[0]]}")
                if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    what = there[rank].kind
                    raise CollectiveTimeoutError(f"rank {rank} waited {timeout:g} s in {what}; late: ranks {missing}")
            deposits = [there[member] for member in members]
            self._takers[key] = self._takers.get(key, 0) + 1
            if self._takers[key] == len(members):
                del self._takers[key], self._deposits[key]
        first = deposits[0]
        for member, deposit in zip(members, deposits, strict=True):
            if (deposit.kind, deposit.nbytes) != (first.kind, first.nbytes):
                raise RankMismatchError(
                    f"rank {members[0]} calls {first.kind} of {first.nbytes} bytes, "
                    f"rank {member} calls {deposit.kind} of {deposit.nbytes} bytes"
                )
        return [deposit.value for deposit in deposits]


def _check_count(name: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {count!r}")


def _virtual_nodes(size: int, ranks_per_node: int | None) -> Topology:
    if ranks_per_node is None:
        return Topology.detect([0] * size)
    _check_count("ranks_per_node", ranks_per_node)
    return Topology.from_keys([rank // ranks_per_node for rank in range(size)])  # what a program asks for goes first


class _ThreadRequest(Request):
    def __init__(self, comm: ThreadCommunicator, key: tuple[str, int], receive: Callable[[list[Any]], None]) -> None:
        self._comm = comm
        self._key = key
        self._receive: Callable[[list[Any]], None] | None = receive

    def done(self) -> bool:
        if self._receive is not None and self._comm._world._is_decided(self._key, self._comm._members):
            self.wait()
        return self._receive is None

    def wait(self) -> None:
        if self._receive is not None:
            comm = self._comm
            # An error leaves it as it is: whoever asks again meets the same error.
            values = comm._collect(self._key)
            receive, self._receive = self._receive, None
            receive(values)


class ThreadCommunicator(Communicator):
    """One thread's communicator; made by :class:`ThreadWorld`."""

    can_use_threads = True

    def __init__(self, world: ThreadWorld, name: str, members: tuple[int, ...], rank: int, topology: Topology) -> None:
        super().__init__(rank, topology, world.timeout, name=name, members=members)
        self._world = world
        self.can_share_memory = world.shared_memory
        self.is_gone = self._has_left
        self._deadline, self._what = math.inf, ""  # of the current wait
        self._started: dict[str, int] = {}

    def _begin_wait(self, what: str, number: int) -> None:
        # No watchdog looks at threads: whoever waits in shared memory meets its deadline in _has_left().
        self._deadline, self._what = time.monotonic() + self.timeout, what

    def _has_left(self, rank: int) -> bool:
        if time.monotonic() >= self._deadline:
            raise CollectiveTimeoutError(
                f"rank {self._members[self.rank]} waited {self.timeout:g} s in {self._what}; late: rank "
                f"{self._members[rank]}"
            )
        return self._members[rank] in self._world._gone

    def abort(self, message: str, code: int = 1) -> NoReturn:
        raise RankFailedError(message)

    def _start(
        self,
        kind: str,
        channel: str,
        nbytes: int,
        value: Any,
        receive: Callable[[list[Any]], None],
        detail: Sequence[int] = (),
    ) -> Request:
        """Begin an operation; ``detail``: the lengths of the parts, or the root."""
        channel = f"{self._name}/{channel}"
        number = self._started.get(channel, 0)
        self._started[channel] = number + 1
        rank = self._members[self.rank]
        self._world._deposit((channel, number), rank, _Deposit(kind, nbytes, value), Event(rank, kind, channel, nbytes))
        passed = Passed(kind, len(value) if kind == "objects" else nbytes, tuple(detail))
        return self._request((channel, number), passed, receive)

    def _request(self, key: tuple[str, int], passed: Passed, receive: Callable[[list[Any]], None]) -> Request:
        """What the rank waits for, once it has deposited its part."""
        return _ThreadRequest(self, key, receive)

    def _collect(self, key: tuple[str, int]) -> list[Any]:
        return self._world._collect(key, self._members, self.timeout, self._members[self.rank])

    def _all_to_all(self, send: torch.Tensor, receive: torch.Tensor, lane: int, blocking: bool) -> Request:
        def take(values: list[torch.Tensor]) -> None:
            receive.view(self.size, -1).copy_(torch.stack([value.view(self.size, -1)[self.rank] for value in values]))

        return self._start("all_to_all", f"lane{lane}", send.nbytes, send.clone(), take)

    def _all_to_all_parts(
        self, send: torch.Tensor, receive: torch.Tensor, lengths: Sequence[int], blocking: bool
    ) -> Request:
        first = sum(lengths[: self.rank])
        end = first + lengths[self.rank]

        def take(values: list[torch.Tensor]) -> None:
            receive.view(self.size, -1).copy_(torch.stack([value.view(-1)[first:end] for value in values]))

        return self._start("all_to_all_parts", "lane0", send.nbytes, send.clone(), take, lengths)

    def _all_gather(self, send: torch.Tensor, receive: torch.Tensor, lane: int, blocking: bool) -> Request:
        def take(values: list[torch.Tensor]) -> None:
            receive.view(self.size, -1).copy_(torch.stack([value.view(-1) for value in values]))

        return self._start("all_gather", f"lane{lane}", send.nbytes, send.clone(), take)

    def _broadcast(self, flat: torch.Tensor, root: int, blocking: bool) -> Request:
        def take(values: list[torch.Tensor]) -> None:
            flat.copy_(values[root])

        return self._start("broadcast", "lane0", flat.nbytes, flat.clone(), take, (root,))

    def _exchange_words(self, words: Words) -> Words:
        received = words.repeat(self.size).reshape(words.size, self.size).T.copy()

        def take(values: list[Words]) -> None:
            received[:] = values

        self._start("words", "lane0", words.nbytes, words.copy(), take).wait()
        return received

    def _exchange_objects(self, obj: T) -> list[T]:
        received: list[Any] = []
        self._start("objects", "lane0", 0, pickle.dumps(obj), received.extend).wait()
        return [pickle.loads(data) for data in received]

    def _open_group(
        self, color: int, rank: int, *, name: str, topology: Topology, members: tuple[int, ...]
    ) -> Communicator:
        return ThreadCommunicator(self._world, name, members, rank, topology)
