"""A clock for each rank, and whose turn it is.

[Note: Virtual time]
One rank runs at a time, and goes on until it has to wait: for an operation, or for its own clock where it asks whether
an operation has been completed. When nobody can run, what comes next in virtual time happens, and wakes who waited for
it. A rank that runs is never behind what has happened, so nothing can begin in the past. Ties are broken by the names
of operations and the numbers of ranks, never by threads: each run of a program takes the same course.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable, Sequence

from heatopt.comm._virtual_network import Links, Load, Transfer, VirtualNetwork

__all__ = ["VirtualTime"]

_Key = tuple[str, int]


class _Seat:
    """What the course of time knows of one rank."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.clock = 0.0
        self.turn = threading.Semaphore(0)
        self.awaited: Sequence[Transfer] = ()
        self.waits = 0  # how often it has; a deadline of an earlier wait has no meaning
        self.is_waiting = False


class VirtualTime:
    """The course of one simulation.

    Args:
        network: what operations meet.
        size: number of ranks.
    """

    def __init__(self, network: VirtualNetwork, size: int) -> None:
        self.finished: list[Transfer] = []
        """All operations, in the order of their ends."""
        self.stalled = False
        """True once nothing can happen any more although ranks wait."""
        self._links = Links(network)
        self._seats = [_Seat(number) for number in range(size)]
        self._transfers: dict[_Key, Transfer] = {}  # that wait for ranks
        self._ready = [(0.0, number) for number in range(size)]
        self._beginnings: list[tuple[float, _Key, Transfer]] = []
        self._deadlines: list[tuple[float, int, int]] = []  # time, rank, number of its wait

    def clock(self, rank: int) -> float:
        """Seconds since the start, for this rank."""
        return self._seats[rank].clock

    # Turns

    def open(self) -> None:
        """Give the first turn. Each rank takes its own with :meth:`enter`."""
        self._pass_on()

    def enter(self, rank: int) -> None:
        """Wait for the first turn."""
        self._seats[rank].turn.acquire()

    def leave(self, rank: int) -> None:
        """This rank has ended: who waits for it alone is woken."""
        for seat in self._seats:
            if seat.is_waiting and any(rank in transfer.missing for transfer in seat.awaited):
                self._wake(seat, seat.clock)
        self._pass_on()

    def pause(self, rank: int, transfers: Sequence[Transfer], deadline: float) -> None:
        """Let time go on until the first of ``transfers`` is completed, or until ``deadline``; others have their turns.

        It also returns where a rank that is waited for has ended, and where time stands still.
        """
        seat = self._seats[rank]
        seat.waits += 1
        seat.is_waiting = True
        seat.awaited = transfers
        if deadline < math.inf:
            heapq.heappush(self._deadlines, (max(deadline, seat.clock), rank, seat.waits))
        self._pass_on()
        seat.turn.acquire()

    def advance(self, rank: int, seconds: float) -> None:
        """Move a rank's clock, whatever goes on meanwhile."""
        self._seats[rank].clock += seconds

    def _pass_on(self) -> None:
        while not self._ready:
            if not self._go_on() and not self._stall():
                return  # all ranks have ended
        _, number = heapq.heappop(self._ready)
        self._seats[number].turn.release()

    def _wake(self, seat: _Seat, time: float) -> None:
        if seat.is_waiting:
            seat.is_waiting = False
            seat.clock = max(seat.clock, time)
            heapq.heappush(self._ready, (seat.clock, seat.number))

    def _stall(self) -> bool:
        waiting = [seat for seat in self._seats if seat.is_waiting]
        self.stalled = bool(waiting)
        for seat in waiting:
            self._wake(seat, seat.clock)
        return self.stalled

    # Events

    def arrive(self, rank: int, transfer: Transfer, nbytes: int, load_of: Callable[[int], Load]) -> Transfer:
        """A rank comes to an operation, which begins with the last of its members.

        Args:
            rank: who comes.
            transfer: what the rank takes the operation for.
            nbytes: what it passes in.
            load_of: what the operation asks of the network if each rank passes in so much.

        Returns:
            The operation, the same one for all its members.
        """
        transfer = self._transfers.setdefault(transfer.key, transfer)
        transfer.arrivals[rank] = self._seats[rank].clock
        transfer.nbytes = max(transfer.nbytes, nbytes)
        if len(transfer.arrivals) == len(transfer.members):
            del self._transfers[transfer.key]
            transfer.load = load_of(transfer.nbytes)
            transfer.start = max(transfer.arrivals.values())
            heapq.heappush(self._beginnings, (transfer.start + transfer.load.seconds, transfer.key, transfer))
        return transfer

    def _go_on(self) -> bool:
        """Let what comes next in time happen; False: there is nothing."""
        ending = self._links.next_end()
        beginning = self._beginnings[0][0] if self._beginnings else math.inf
        deadline = self._deadlines[0][0] if self._deadlines else math.inf
        # At the same time ends come first: who asks at that moment finds the operation completed.
        if ending <= min(beginning, deadline) and ending < math.inf:
            for transfer in self._links.complete():
                self._finish(transfer, ending)
        elif beginning <= deadline and beginning < math.inf:
            time, _, transfer = heapq.heappop(self._beginnings)
            if transfer.load.volumes:
                self._links.begin(transfer, time)
            else:
                self._finish(transfer, time)
        elif deadline < math.inf:
            time, rank, wait = heapq.heappop(self._deadlines)
            if self._seats[rank].waits == wait:
                self._wake(self._seats[rank], time)
        else:
            return False
        return True

    def _finish(self, transfer: Transfer, time: float) -> None:
        transfer.end = time
        self.finished.append(transfer)
        for member in transfer.members:
            seat = self._seats[member]
            if seat.is_waiting and transfer in seat.awaited:
                self._wake(seat, time)
