"""Works in the background: no other communicator's call completes them, and they need no call to go on."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import pytest
import torch

import heatopt
from heatopt.comm import ThreadWorld
from tests.support.tensors import all_values, assert_same, assert_usable, name_of, reduced, values

if TYPE_CHECKING:
    from heatopt.comm import Communicator
    from tests.support.ranks import Ranks

SIZES = (1, 40_000, 3, 0, 5001, 70_001)  # one and two stages in flight side by side


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=name_of)
def test_bits_are_those_of_a_blocking_reduction(ranks: Ranks, dtype: torch.dtype, op: str) -> None:
    def body(comm: Communicator) -> None:
        background = comm.background()
        own = [values(comm.rank, (size,), dtype, salt) for salt, size in enumerate(SIZES)]
        works = [background.reduce_async(flat, op, "a test") for flat in own]
        for salt, (work, flat) in enumerate(zip(works, own, strict=True)):
            work.wait()
            assert work.done()
            assert_same(flat, comm.allreduce(values(comm.rank, flat.shape, dtype, salt), op))
            assert_same(flat, reduced(all_values(comm, flat.shape, dtype, salt), op))
        assert_usable(background)

    ranks(body)


@pytest.mark.parametrize("count", [3, 40_000])
def test_blocking_calls_of_other_groups_do_not_wait_for_a_late_rank(ranks: Ranks, count: int) -> None:
    """The last rank launches when the others have made all their calls: whoever completed works first would hang."""

    def body(comm: Communicator) -> None:
        late = comm.rank == comm.size - 1
        background, node = comm.background(), comm.split(int(late))
        flats = [torch.full((count,), comm.rank + turn + 0.0) for turn in range(3)]
        works = [] if late else [background.reduce_async(flat, "sum", "a test") for flat in flats]
        assert (node.allreduce(torch.ones(count)) == node.size).all()
        assert node.allreduce_async(torch.ones(count)).wait()[0] == node.size
        assert node.all_gather_object(node.rank) == list(range(node.size))
        comm.progress()
        node.barrier()
        assert not any(work.done() for work in works)
        comm.barrier()  # only now may the late rank launch
        works = works or [background.reduce_async(flat, "sum", "a test") for flat in flats]
        for turn, work in reversed(list(enumerate(works))):
            work.wait()
            assert (flats[turn] == sum(range(comm.size)) + turn * comm.size).all()

    ranks(body, min_size=2)


def test_a_single_rank_may_wait_while_the_others_are_in_another_call(ranks: Ranks) -> None:
    """Later stages are started on all ranks, by the pumps, wherever their programs are."""

    def body(comm: Communicator) -> None:
        background = comm.background()
        for root in range(comm.size):
            flats = [torch.full((count,), comm.rank + 1.0) for count in (40_000, 3, 40_000)]
            works = [background.reduce_async(flat, "sum", "a test") for flat in flats]
            if comm.rank == root:
                works[-1].wait()
            comm.barrier()
            for work, flat in zip(works, flats, strict=True):
                work.wait()
                assert (flat == comm.size * (comm.size + 1) / 2).all()

    ranks(body)


@pytest.mark.parametrize("seed", range(2))
def test_random_programs(ranks: Ranks, seed: int) -> None:
    """Launches on two background communicators among blocking and launched calls of others; waits when a rank likes."""

    def body(comm: Communicator) -> None:
        shared, own = random.Random(seed), random.Random(100 * seed + comm.rank)
        backgrounds = [comm.background(), comm.split(0, -comm.rank).background()]
        others = [comm, comm.split(comm.rank % 2), comm.split(0, -comm.rank)]
        pending = []
        for salt in range(40):
            shape = (shared.choice((1, 33, 9001)),)
            if shared.random() < 0.5:
                group = shared.choice(backgrounds)
                parts = all_values(group, shape, torch.float32, salt)
                flat = parts[group.rank].clone()
                pending.append((group.reduce_async(flat, "mean", "a test"), flat, reduced(parts, "mean")))
            else:
                group = shared.choice(others)
                parts = all_values(group, shape, torch.bfloat16, salt)
                mine = parts[group.rank].clone()
                work = group.allreduce_async(mine) if shared.random() < 0.5 else None
                assert_same(group.allreduce(mine) if work is None else work.wait(), reduced(parts, "sum"))
            if pending and own.random() < 0.3:
                own.choice(pending)[0].wait()
        own.shuffle(pending)
        for handle, flat, wanted in pending:
            handle.wait()
            assert_same(flat, wanted)

    ranks(body)


def test_close_completes_what_is_on_its_way(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        background = comm.background()
        flats = [torch.full((count,), 1.0) for count in (3, 40_000)]
        for flat in flats:
            background.reduce_async(flat, "sum", "a test")
        background.close()
        assert all((flat == comm.size).all() for flat in flats)
        assert_usable(comm)

    ranks(body)


def test_what_nobody_waits_for_arrives_before_the_program_ends() -> None:
    def body(comm: Communicator) -> torch.Tensor:
        flat = torch.full((40_000,), comm.rank + 1.0)
        comm.background().background().reduce_async(flat, "sum", "a test")
        return flat

    for found in ThreadWorld(3).run(body):
        assert (found == 6).all()


@pytest.mark.parametrize("count", [3, 40_000])
def test_a_rank_that_failed_is_named_by_all_waits(count: int) -> None:
    caught: list[str] = []

    def body(comm: Communicator) -> None:
        background = comm.background()
        first = background.reduce_async(torch.ones(count), "sum", "a test")
        first.wait()
        if comm.rank == 2:
            raise OSError("the disk is full")
        works = [background.reduce_async(torch.ones(count), "sum", "a test") for _ in range(2)]
        for work in (works[1], works[0], works[1]):  # again: the same error, never a wrong number
            with pytest.raises(heatopt.RankFailedError) as error:
                work.wait()
            caught.append(str(error.value))

    with pytest.raises(OSError, match="the disk is full"):
        ThreadWorld(3, timeout=20).run(body)
    assert len(caught) == 6
    assert all("waits for rank 2, which failed with OSError: the disk is full" in text for text in caught)


def test_a_rank_that_never_launches_is_named_after_the_time_out() -> None:
    noticed = threading.Event()

    def body(comm: Communicator) -> None:
        background = comm.background()
        if comm.rank == 1:
            noticed.wait(60)
            return
        try:
            background.reduce_async(torch.ones(40_000), "sum", "a test").wait()
        finally:
            noticed.set()

    with pytest.raises(heatopt.CollectiveTimeoutError, match=r"rank 0 waited 1 s in all_to_all; late: ranks \[1\]"):
        ThreadWorld(2, timeout=1).run(body)
