"""Memory that the ranks of a node share: gradients live in it, and small agreements go through it.

[Note: Shared memory]
Each node's lowest rank makes an anonymous file in memory (``memfd_create``), and its neighbours open it through
``/proc``. It has no name, so nothing can stay behind after a crash; it does not depend on the size of ``/dev/shm``; and
each process frees its part by itself, when the last tensor in it dies, so garbage collection needs no agreement (a
window of MPI's own can only be freed by all ranks together). It serves MPI and gloo alike.

A block has one segment for each rank of the node. A rank writes into its own segment; within a reduction the owner of a
slice reads and writes that slice in all segments. See [Note: Sums in shared memory].
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from heatopt._log import logger
from heatopt.comm._process import Process
from heatopt.comm._work import Request

__all__ = ["Lane", "Meeting", "NodeMemory", "SharedBlock"]

_PAGE = 4096
_LINE = 8  # 64-bit words in a cache line: flags of two ranks never share one
# A rank that waits first spins, since its neighbours are usually about to come, then sleeps. Each turn of the spin
# offers the core to others; where ranks have to share cores it is short all the same.
_SPINS = 40
_SPINS_ON_OWN_CORE = 400
_NAP = 20e-6
# Now and then it looks whether the other is still there: not every launcher ends the job when one process has ended.
_TURNS_BETWEEN_LOOKS = 100

Exchange = Callable[[Any, str], list[Any]]
Words = npt.NDArray[np.int64]
Memory = npt.NDArray[np.uint8]


class SharedBlock:
    """One segment of memory per rank of the node; this process sees all of them."""

    def __init__(self, memory: Memory, segment_bytes: int, ranks: int) -> None:
        self.segments = [
            torch.frombuffer(memory, dtype=torch.uint8, count=segment_bytes, offset=rank * segment_bytes)
            for rank in range(ranks)
        ]
        """Bytes of each rank of the node, in the order of their ranks. They keep the memory alive."""
        self._memory = memory

    def typed(self, dtype: torch.dtype, numel: int, offset: int = 0) -> list[torch.Tensor]:
        """``numel`` elements of each segment, from its byte ``offset`` on."""
        return [segment[offset : offset + numel * dtype.itemsize].view(dtype) for segment in self.segments]

    def tensor(self, dtype: torch.dtype, numel: int, offset: int) -> torch.Tensor:
        """``numel`` elements, at least one, from byte ``offset`` of the whole block, whatever segments they are in.

        It has a storage of its own, so that whoever saves or copies it saves no more than these elements, and keeps the
        memory alive.
        """
        return torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=offset)


class Lane(IntEnum):
    """Sequences of meetings; the ranks of a node go through each of them in the same order.

    See [Note: Order of stages]: reductions are launched in program order and finished in the order of their launches,
    but how many have been finished when the next one is launched differs between ranks.
    """

    LAUNCH = 0
    FINISH = 1
    EXCHANGE = 2


class Meeting(Request):
    """Completed once every rank of the node has arrived. What they wrote before is visible afterwards."""

    def __init__(self, node: NodeMemory, lane: Lane, number: int) -> None:
        self._node = node
        self._lane = lane
        self._number = number

    def done(self) -> bool:
        return self._node.have_arrived(self._lane, self._number)

    def wait(self) -> None:
        self._node.await_others(self._lane, self._number)


class NodeMemory:
    """Shared memory and fast agreement between the ranks of one node.

    Args:
        exchange: the communicator's exchange of Python objects between all its ranks, for setting up.
        ranks: the ranks of this node, ascending.
        rank: this process's rank.
        lose: raises the error of a rank that has ended, which is then waited for in vain.
        is_gone: asked now and then about the rank that is waited for; by default whether its process has ended.
    """

    def __init__(
        self,
        exchange: Exchange,
        ranks: tuple[int, ...],
        rank: int,
        lose: Callable[[int], NoReturn],
        is_gone: Callable[[int], bool] | None = None,
    ) -> None:
        self._lose = lose
        self._is_gone = is_gone or self._has_ended
        self._processes: dict[int, Process] = {}
        self._exchange = exchange
        self._ranks = ranks
        self._rank = rank
        self.local_rank = ranks.index(rank)
        self.local_size = len(ranks)
        self._spins = _SPINS_ON_OWN_CORE if len(ranks) <= (os.cpu_count() or 1) else _SPINS
        self._numbers = [0] * len(Lane)  # of the last meeting of each lane
        self._fence = threading.Lock()
        self._flags: list[list[Words]] = []  # by local rank and lane
        self._slots: list[tuple[Words, Words]] = []

    def allocate(self, nbytes: int) -> SharedBlock | None:
        """Make a block with ``nbytes`` per rank, zeroed; None on all ranks if any rank cannot. Collective."""
        segment = -(-max(nbytes, 1) // _PAGE) * _PAGE
        # Its name in /proc may mean another file to a process that only seems to be on this node.
        mark = os.urandom(16)
        file = _make_file(segment * self.local_size, mark) if self.local_rank == 0 else None
        offers = self._exchange((os.getpid(), file, mark), "set-up of shared memory")
        process, number, mark = offers[self._ranks[0]]
        memory = None
        if number is not None:
            path = f"/proc/{process}/fd/{number}"
            memory = _open_file(path, file, mark, segment, self.local_size, self.local_rank)
        succeeded = self._exchange(memory is not None, "set-up of shared memory")
        if file is not None:
            os.close(file)
        if memory is None or not all(succeeded):
            return None
        return SharedBlock(memory, segment, self.local_size)

    def open_flags(self, words: int) -> bool:
        """Make the memory for meetings and exchanges of up to ``words`` integers; False without it. Collective."""
        first = len(Lane) * _LINE
        block = self.allocate((first + 2 * words) * 8)
        if block is None:
            return False
        numbers = self._exchange(os.getpid(), "set-up of shared memory")
        self._processes = {rank: Process(numbers[rank]) for rank in self._ranks if rank != self._rank}
        segments = [segment.numpy().view(np.int64) for segment in block.segments]
        self._flags = [[segment[lane * _LINE : lane * _LINE + 1] for lane in Lane] for segment in segments]
        self._slots = [(s[first : first + words], s[first + words : first + 2 * words]) for s in segments]
        return True

    def arrive(self, lane: Lane, reduced: int = 0) -> Request:
        """Tell the others that this rank has come to the next meeting of ``lane``.

        Args:
            lane: sequence of meetings.
            reduced: bytes of each rank that have been reduced since the last meeting; simulations charge for them.
        """
        self._numbers[lane] += 1
        self._full_fence()
        self._flags[self.local_rank][lane][0] = self._numbers[lane]
        return Meeting(self, lane, self._numbers[lane])

    def exchange_words(self, words: Words) -> Words:
        """Return the integers of all ranks of the node, ranks x words."""
        # Two slots in turn: a rank that is one exchange ahead must not overwrite what a slow one still reads.
        parity = self._numbers[Lane.EXCHANGE] & 1
        self._slots[self.local_rank][parity][: words.size] = words
        self.arrive(Lane.EXCHANGE).wait()
        return np.stack([slots[parity][: words.size] for slots in self._slots])

    def have_arrived(self, lane: Lane, number: int) -> bool:
        """True once all ranks have come to a meeting."""
        if any(flags[lane][0] < number for flags in self._flags):
            return False
        self._full_fence()
        return True

    def await_others(self, lane: Lane, number: int) -> None:
        """Block until all ranks have come to a meeting."""
        for local_rank, flags in enumerate(self._flags):
            flag = flags[lane]
            turns = 0
            while flag[0] < number:
                turns += 1
                if turns < self._spins:
                    os.sched_yield()
                    continue
                time.sleep(_NAP)
                # The flag is read after the question: what a rank has raised before it left counts.
                if turns % _TURNS_BETWEEN_LOOKS == 0 and self._is_gone(self._ranks[local_rank]) and flag[0] < number:
                    self._lose(self._ranks[local_rank])
        self._full_fence()

    def _has_ended(self, rank: int) -> bool:
        return self._processes[rank].has_ended()

    def _full_fence(self) -> None:
        # Releasing and then acquiring a lock is a full barrier on the weakly ordered processors as well.
        with self._fence:
            pass
        with self._fence:
            pass


def _make_file(nbytes: int, mark: bytes) -> int | None:
    """An anonymous file of ``nbytes``, followed by ``mark``."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        file = os.memfd_create("heatopt", os.MFD_CLOEXEC)
    except OSError:
        return None
    try:
        os.truncate(file, nbytes)
        os.pwrite(file, mark, nbytes)
    except OSError:
        os.close(file)
        return None
    return file


def _open_file(path: str, own: int | None, mark: bytes, segment: int, ranks: int, local_rank: int) -> Memory | None:
    file = own
    try:
        if file is None:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if os.pread(file, len(mark), ranks * segment) != mark:
            logger.debug("shared memory is not available: %s is another process's", path)
            return None
        # Reserving is what can fail for lack of memory, and not later as a bus error; each rank reserves its own
        # segment, so that on a machine with several memory nodes it is near to the rank.
        os.posix_fallocate(file, local_rank * segment, segment)
        # Unlike Python's mmap, torch keeps no descriptor beside the map, so there may be more maps than descriptors.
        shown = f"/proc/self/fd/{file}"
        return torch.from_file(shown, shared=True, size=ranks * segment, dtype=torch.uint8, device="cpu").numpy()
    except (OSError, RuntimeError) as error:  # the latter is torch's
        logger.debug("shared memory is not available: %s", error)
        return None
    finally:
        if own is None and file is not None:
            os.close(file)
