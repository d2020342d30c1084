"""The contract of a communicator: launched collectives, and the handles that stand for them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from heatopt.errors import RankMismatchError
from tests.support.tensors import all_values, assert_same, assert_usable, name_of, reduced, values

if TYPE_CHECKING:
    from heatopt.comm import Communicator
    from tests.support.ranks import Ranks


SIZES = (1, 40_000, 3, 0, 5001, 70_001)  # one and two stages in flight side by side


def launch_all(comm: Communicator, dtype: torch.dtype) -> tuple[list, list[torch.Tensor], list[torch.Tensor]]:
    """Handles, the tensors that they were given, and what is to come out."""
    own = [values(comm.rank, (size,), dtype, salt) for salt, size in enumerate(SIZES)]
    wanted = [reduced(all_values(comm, (size,), dtype, salt), "sum") for salt, size in enumerate(SIZES)]
    return [comm.allreduce_async(tensor) for tensor in own], own, wanted


def assert_reduced(works: list, own: list[torch.Tensor], wanted: list[torch.Tensor], order: list[int]) -> None:
    for number in order:
        assert works[number].wait() is own[number]
        assert works[number].done()
        assert works[number].wait() is own[number]
    for found, expected in zip(own, wanted, strict=True):
        assert_same(found, expected)


def order_of(comm: Communicator, kind: str) -> list[int]:
    numbers = list(range(len(SIZES)))
    if kind == "backwards":
        numbers.reverse()
    elif kind == "ranks differ":
        random.Random(comm.rank).shuffle(numbers)
    return numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool], ids=name_of)
@pytest.mark.parametrize("kind", ["in order", "backwards", "ranks differ"])
def test_wait_in_any_order(ranks: Ranks, dtype: torch.dtype, kind: str) -> None:
    def body(comm: Communicator) -> None:
        works, own, wanted = launch_all(comm, dtype)
        assert_reduced(works, own, wanted, order_of(comm, kind))
        assert_usable(comm)

    ranks(body)


def poll(work: object, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not work.done():  # type: ignore[attr-defined]
        assert time.monotonic() < deadline, "done() does not come true"
        time.sleep(0.0005)


@pytest.mark.parametrize("kind", ["in order", "backwards", "ranks differ"])
def test_polling_alone_completes(ranks: Ranks, kind: str) -> None:
    def body(comm: Communicator) -> None:
        works, own, wanted = launch_all(comm, torch.bfloat16)
        for number in order_of(comm, kind):
            poll(works[number])
        # Nothing is left to wait for: all is there, also before the first wait().
        for found, expected in zip(own, wanted, strict=True):
            assert_same(found, expected)
        assert_reduced(works, own, wanted, order_of(comm, kind))

    ranks(body)


def test_some_ranks_poll_and_others_wait(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for turn in range(4):
            works, own, wanted = launch_all(comm, torch.float32)
            if (comm.rank + turn) % 2:
                for work in works[::2]:
                    poll(work)
            assert_reduced(works, own, wanted, order_of(comm, "ranks differ"))

    ranks(body)


def test_blocking_calls_between_launch_and_wait(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        works, own, wanted = launch_all(comm, torch.float32)
        assert comm.allreduce(torch.ones(50_000))[0].item() == comm.size
        assert comm.all_gather_object(comm.rank) == list(range(comm.size))
        comm.barrier()
        more, more_own, more_wanted = launch_all(comm, torch.int32)
        assert comm.broadcast(torch.tensor(float(comm.rank)), comm.size - 1).item() == comm.size - 1
        assert_reduced(more, more_own, more_wanted, order_of(comm, "backwards"))
        assert_reduced(works, own, wanted, order_of(comm, "in order"))

    ranks(body)


def test_a_single_rank_may_wait_while_the_others_go_on(ranks: Ranks) -> None:
    """``if rank == 0: print(work.wait())``, before a call of another group."""

    def body(comm: Communicator) -> None:
        twin = comm.duplicate()
        for count in (3, 40_000):
            own = torch.full((count,), comm.rank + 1.0)
            work = comm.allreduce_async(own)
            if comm.rank == 0:
                work.wait()
            twin.barrier()
            assert (work.wait() == comm.size * (comm.size + 1) / 2).all()

    ranks(body)


def test_all_collectives_as_handles(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        last = comm.size - 1
        rows = (3 * comm.size, 3001)
        source = values(comm.rank, rows, torch.float32)
        kept = source.clone()
        sent = torch.full((5,), float(comm.rank), dtype=torch.float64)
        scattered = comm.reduce_scatter_async(source, "mean")
        gathered = comm.all_gather_async(values(comm.rank, (11,), torch.int16))
        copied = comm.broadcast_async(sent, last)
        largest = comm.allreduce_async(torch.tensor(comm.rank), "max")
        assert copied.wait() is sent
        assert sent.tolist() == [float(last)] * 5
        mean = reduced(all_values(comm, rows, torch.float32), "mean")
        assert_same(scattered.wait(), mean[3 * comm.rank : 3 * comm.rank + 3])
        assert_same(source, kept)
        assert largest.wait().item() == last
        for rank, found in enumerate(gathered.wait()):
            assert_same(found, values(rank, (11,), torch.int16))

    ranks(body)


def test_handle_owns_its_buffers(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        count = 60_000

        def launch() -> Iterator[object]:
            for turn in range(8):
                yield comm.allreduce_async(torch.full((count,), float(turn)))
                yield comm.all_gather_async(torch.full((count,), float(turn), dtype=torch.bfloat16).t())
                yield comm.broadcast_async(torch.full((count,), float(turn + comm.rank)))

        works = list(launch())
        gc.collect()
        # What was freed would be used again here, and overwritten.
        rubbish = [torch.full((count,), -1.0) for _ in range(8)]
        for turn in range(8):
            total, gathered, copied = (work.wait() for work in works[3 * turn : 3 * turn + 3])  # type: ignore[attr-defined]
            assert (total == turn * comm.size).all()
            assert all((found == turn).all() for found in gathered)
            assert (copied == turn).all()
        assert all((piece == -1.0).all() for piece in rubbish)

    ranks(body)


def test_dropped_handles_are_completed_by_the_next_call(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        kept = [torch.full((30_000,), float(turn)) for turn in range(3)]
        for tensor in kept:
            comm.allreduce_async(tensor)
        gc.collect()
        comm.barrier()
        comm.allreduce(torch.ones(1))
        for turn, tensor in enumerate(kept):
            assert (tensor == turn * comm.size).all()

    ranks(body)


@pytest.mark.parametrize("seed", range(3))
def test_random_programs(ranks: Ranks, seed: int) -> None:
    """The same calls on all ranks in the same order; each rank waits and polls when it likes."""

    def body(comm: Communicator) -> None:
        shared, own = random.Random(seed), random.Random(100 * seed + comm.rank)
        comms = [comm, comm.split(0, -comm.rank), comm.duplicate()]
        channel = comm
        pending: list[tuple[object, torch.Tensor, torch.Tensor]] = []
        for salt in range(40):
            # One group's handles are complete before another group is used, as with MPI's own.
            if not pending:
                channel = comms[shared.randrange(3)]
            dtype = shared.choice((torch.float32, torch.bfloat16, torch.int64, torch.complex64))
            shape = (shared.choice((1, 33, 9001)),)
            parts = all_values(channel, shape, dtype, salt)
            mine = parts[channel.rank].clone()
            kind = shared.choice(("allreduce", "broadcast"))
            root = shared.randrange(comm.size)
            wanted = reduced(parts, "sum") if kind == "allreduce" else parts[root]
            arguments = ("sum",) if kind == "allreduce" else (root,)
            if shared.random() < 0.7:
                pending.append((getattr(channel, f"{kind}_async")(mine, *arguments), mine, wanted))
            else:
                assert_same(getattr(channel, kind)(mine, *arguments), wanted)
            if pending and own.random() < 0.4:
                own.choice(pending)[0].done()  # type: ignore[attr-defined]
            if shared.random() < 0.2 or salt == 39:
                own.shuffle(pending)
                for work, found, expected in pending:
                    assert work.wait() is found  # type: ignore[attr-defined]
                    assert_same(found, expected)
                pending.clear()

    ranks(body)


@pytest.mark.parametrize("count", [4, 2**19 + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_handle_on_one_rank_and_blocking_call_on_another(ranks: Ranks, count: int, dtype: torch.dtype) -> None:
    """Right or refused on all ranks, never a wrong number."""

    def body(comm: Communicator) -> str:
        own = torch.full((count,), comm.rank + 1.0, dtype=dtype)
        try:
            comm.allreduce_async(own).wait() if comm.rank == 0 else comm.allreduce(own)
        except RankMismatchError:
            outcome = "refused"
        else:
            assert (own == comm.size * (comm.size + 1) / 2).all()
            outcome = "right"
        assert_usable(comm)
        return outcome

    assert len(set(ranks(body, min_size=2))) == 1
