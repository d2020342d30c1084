"""Reductions in memory that the ranks of a node share: exact sums in rank order, whatever the topology."""

from __future__ import annotations

import gc
import os
import random
import resource
import subprocess
import sys
import time

import pytest
import torch

import heatopt
from heatopt.comm import ReduceOptions, ThreadWorld
from tests.support.launch import LAUNCH, REPOSITORY

SIZES = (1, 5, 1023, 1024, 4099, 200_003)

one_process = pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")


def values(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(numel, generator=generator, dtype=wide).to(dtype)


def in_rank_order(parts: list[torch.Tensor], divisor: int) -> torch.Tensor:
    """The slow, obvious sum: at least in single precision, rounded once."""
    half = parts[0].dtype in (torch.float16, torch.bfloat16)
    total = parts[0].float() if half else parts[0].clone()
    for part in parts[1:]:
        total = total + part
    if total.is_complex():
        return torch.view_as_complex(torch.view_as_real(total) / divisor)
    return (total / divisor).to(parts[0].dtype)


def reduce_all(comm, dtype, options):
    memories = [comm.allocate(numel, dtype, torch.device("cpu")) for numel in SIZES]
    for memory, numel in zip(memories, SIZES, strict=True):
        memory.own.copy_(values(comm.rank, numel, dtype))
    works = [comm.reduce_bucket(memory, options, "a test") for memory in memories]
    for work in works:
        if work is not None:
            work.wait()
    return memories


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_one_node_sums_in_rank_order(ranks, dtype, blocking):
    def body(comm):
        memories = reduce_all(comm.duplicate(), dtype, ReduceOptions(comm.size, blocking))
        for memory, numel in zip(memories, SIZES, strict=True):
            expected = in_rank_order([values(rank, numel, dtype) for rank in range(comm.size)], comm.size)
            assert torch.equal(memory.own, expected)

    ranks(body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_small_buckets_keep_what_others_still_read(ranks, dtype):
    """A rank that is done may write its next values, and show them, while another one has yet to sum the last ones."""
    numels = (1, 5, 4099, 65_536 // dtype.itemsize)

    def body(comm):
        group = comm.duplicate()
        memories = [group.allocate(numel, dtype, torch.device("cpu")) for numel in numels]
        assert all((memory.copies is not None) is memory.shared for memory in memories)
        assert group.allocate(numels[-1] + 1, dtype, torch.device("cpu")).copies is None
        memories[1] = memories[1].first(3)
        for turn in range(9):
            for memory in memories:
                memory.own.copy_(values(comm.rank + 10 * turn, memory.own.numel(), dtype))
            options = ReduceOptions(comm.size, turn % 3 == 2)
            works = [group.reduce_bucket(memory, options, "a test") for memory in memories]
            if comm.rank == turn % comm.size:
                time.sleep(0.01)
            for work in works:
                if work is not None:
                    work.wait()
            for memory in memories:
                parts = [values(rank + 10 * turn, memory.own.numel(), dtype) for rank in range(comm.size)]
                assert torch.equal(memory.own, in_rank_order(parts, comm.size))
                memory.own.fill_(7)  # it is this rank's alone again

    ranks(body, min_size=2, shared_memory=True)


@one_process
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_threads_in_shared_memory_sum_in_rank_order(size, dtype):
    def body(comm):
        memories = reduce_all(comm, dtype, ReduceOptions(comm.size, True))
        assert all(memory.shared and len(memory.segments) == size for memory in memories)
        return [memory.own.clone() for memory in memories]

    for found in ThreadWorld(size, shared_memory=True).run(body):
        for tensor, numel in zip(found, SIZES, strict=True):
            assert torch.equal(tensor, in_rank_order([values(rank, numel, dtype) for rank in range(size)], size))


@one_process
@pytest.mark.parametrize(("size", "per_node"), [(2, 1), (3, 2), (4, 2), (4, 3), (5, 2)])
def test_nodes_sum_their_own_first(size, per_node):
    def body(comm):
        memories = reduce_all(comm, torch.float32, ReduceOptions(size, True))
        return [memory.own.clone() for memory in memories]

    nodes = [range(first, min(first + per_node, size)) for first in range(0, size, per_node)]
    for found in ThreadWorld(size, ranks_per_node=per_node, shared_memory=True).run(body):
        for tensor, numel in zip(found, SIZES, strict=True):
            sums = [in_rank_order([values(rank, numel, torch.float32) for rank in node], 1) for node in nodes]
            assert torch.equal(tensor, in_rank_order(sums, size))


@one_process
@pytest.mark.parametrize(("size", "per_node"), [(4, 2), (5, 2), (6, 3)])
@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_ranks_may_be_at_different_stages_of_works(size, per_node, wire):
    """Some ranks look after their works often, others never: the order of the stages is the same on all of them."""
    numels = (20_003, 3, 7_000, 1, 4099, 20_003, 5)

    def body(comm):
        chance = random.Random(comm.rank)
        memories = [comm.allocate(numel, torch.float32, torch.device("cpu")) for numel in numels]
        found = []
        for turn in range(4):
            for memory, numel in zip(memories, numels, strict=True):
                memory.own.copy_(values(comm.rank + turn, numel, torch.float32))
            options = ReduceOptions(1, False, wire_dtype=wire)
            works = [comm.reduce_bucket(memory, options, "a test") for memory in memories]
            if chance.random() < 0.5:
                time.sleep(0.01)
                for _ in range(chance.randrange(8)):
                    comm.progress()
            for work in chance.sample(works, len(works)):
                work.wait()
            found.append([memory.own.clone() for memory in memories])
        return found

    nodes = [range(first, min(first + per_node, size)) for first in range(0, size, per_node)]
    everybody = ThreadWorld(size, ranks_per_node=per_node, shared_memory=True).run(body)
    for turn in range(4):
        for index, numel in enumerate(numels):
            sums = [in_rank_order([values(rank + turn, numel, torch.float32) for rank in node], 1) for node in nodes]
            sums = sums if wire is None else [part.to(wire) for part in sums]
            expected = in_rank_order(sums, 1).float()
            assert all(torch.equal(found[turn][index], expected) for found in everybody)


@one_process
@pytest.mark.parametrize("per_node", [1, 2, 3, 4])
def test_reproducible_does_not_depend_on_the_placement(per_node):
    def body(comm):
        memories = reduce_all(comm, torch.float32, ReduceOptions(4, True, reproducible=True))
        return [memory.own.clone() for memory in memories]

    for found in ThreadWorld(4, ranks_per_node=per_node, shared_memory=True).run(body):
        for tensor, numel in zip(found, SIZES, strict=True):
            assert torch.equal(tensor, in_rank_order([values(rank, numel, torch.float32) for rank in range(4)], 4))


@one_process
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
def test_wire_dtype_rounds_between_nodes_only(wire):
    def body(comm):
        memories = reduce_all(comm, torch.float32, ReduceOptions(1, True, wire_dtype=wire))
        return [memory.own.clone() for memory in memories]

    worlds = [ThreadWorld(4, ranks_per_node=2, shared_memory=True), ThreadWorld(4, shared_memory=True)]
    across, within = (world.run(body) for world in worlds)
    for tensor, alone, numel in zip(across[0], within[0], SIZES, strict=True):
        parts = [values(rank, numel, torch.float32) for rank in range(4)]
        sums = [parts[0] + parts[1], parts[2] + parts[3]]
        assert torch.equal(tensor, sum(s.to(wire).float() for s in sums).to(wire).float())
        assert torch.equal(alone, in_rank_order(parts, 1))
    assert all(torch.equal(a, b) for found in across for a, b in zip(found, across[0], strict=True))


@one_process
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(("own", "wire"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_gradients_of_the_other_half_type_keep_their_own(own, wire, scattered):
    """Each node's sum is rounded to it; as wire_dtype it would overflow, or lose digits."""
    numel, scale = 4099, 3e6 if own is torch.bfloat16 else 1

    def gradient(rank):
        return (values(rank, numel, torch.float32) * scale).to(own)

    def body(comm):
        memory = comm.allocate(numel, own, torch.device("cpu"))
        memory.own.copy_(gradient(comm.rank))
        options = ReduceOptions(1, True, wire_dtype=wire)
        if not scattered:
            comm.reduce_bucket(memory, options, "a test")
            return memory.own.clone()
        bounds = [0, 1000, 1001, 3000, numel]
        comm.scatter_bucket(memory, bounds, options, "a test")
        return memory.own[bounds[comm.rank] : bounds[comm.rank + 1]].clone()

    found = ThreadWorld(4, ranks_per_node=2, shared_memory=True).run(body)
    sums = [in_rank_order([gradient(rank) for rank in node], 1) for node in ((0, 1), (2, 3))]
    expected = in_rank_order(sums, 1)
    assert expected.isfinite().all()
    assert torch.equal(torch.cat(found) if scattered else found[3], expected)


def test_memory_is_freed_with_the_optimizer(ranks):
    """Nothing has to be closed: the mapping goes with the last tensor in it."""

    def mappings() -> set[str]:  # by inode: those of earlier tests may go meanwhile
        with open("/proc/self/maps") as maps:
            return {line.split()[4] for line in maps if "memfd:heatopt" in line}

    def body(comm):
        if not comm.can_share_memory or comm.size == 1:
            return
        model = torch.nn.Linear(300, 300)
        gc.collect()
        before = mappings()
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), comm=comm)
        model(torch.ones(2, 300)).sum().backward()
        own = mappings() - before
        optimizer.zero_grad()
        del optimizer
        gc.collect()
        comm.barrier()
        assert own
        assert len(own & mappings()) <= 1  # what stays are the coordinator's flags
        assert not [name for name in os.listdir("/dev/shm") if "heatopt" in name]

    ranks(body)


def allocate_many() -> None:
    """The program of the next test."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    def body(comm):
        memories = [comm.allocate(3, torch.float32, torch.device("cpu")) for _ in range(2000)]
        return all(memory.shared and memory.own.data_ptr() % 4096 == 0 for memory in memories)

    assert ThreadWorld(2, shared_memory=True).run(body) == [True, True]
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert not [line for line in maps if "memfd:heatopt" in line]


@one_process
def test_buckets_hold_no_descriptors():
    program = "from tests.ranks.test_shared_memory import allocate_many; allocate_many()"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=60)


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("ranks_per_node", [2, 4])
def test_report_says_whether_gradients_meet_in_shared_memory(ranks_per_node, reproducible):
    def body(comm):
        optimizer = torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), lr=0.1)
        return heatopt.DataParallelOptimizer(optimizer, comm=comm, reproducible=reproducible).report()["shared_memory"]

    expected = ranks_per_node == 4 or not reproducible  # sums in rank order across nodes go another way
    assert ThreadWorld(4, ranks_per_node=ranks_per_node, shared_memory=True).run(body) == [expected] * 4


@pytest.mark.parametrize("shard", ["none", "state", "gradients"])
def test_default_device_is_the_users_own(ranks, shard):
    """What the package makes for itself is not where the user's new tensors are."""

    def train(comm, device):
        parameters = [torch.nn.Parameter(torch.ones(size)) for size in (3000, 3)]
        with torch.device(device):
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
            optimizer = heatopt.DataParallelOptimizer(optimizer, comm=comm, shard=shard)
            for step in range(3):
                optimizer.zero_grad()
                loss = (parameters[0] * (comm.rank + 1)).sum()
                (loss + parameters[1].sum() if step == 1 else loss).backward()
                optimizer.step()
            optimizer.state_dict()
        return parameters

    def body(comm):
        assert all(map(torch.equal, train(comm, "meta"), train(comm, "cpu")))

    ranks(body)


def test_a_rank_that_fails_releases_the_others():
    def body(comm):
        memory = comm.allocate(100, torch.float32, torch.device("cpu"))
        if comm.rank == 1:
            raise ValueError("the cause")
        comm.reduce_bucket(memory, ReduceOptions(2, True), "a test")

    with pytest.raises(ValueError, match="the cause"):
        ThreadWorld(2, shared_memory=True).run(body)


@one_process
@pytest.mark.parametrize("who", ["all", "one"])
@pytest.mark.parametrize("where", ["_make_file", "_open_file"])
def test_falls_back_together_where_memory_cannot_be_shared(where, who, monkeypatch, caplog):
    from heatopt.comm import _shared_memory

    real = getattr(_shared_memory, where)
    calls = iter(range(1000))
    monkeypatch.setattr(_shared_memory, where, lambda *a: None if who == "all" or next(calls) == 0 else real(*a))

    def body(comm):
        memories = reduce_all(comm, torch.float32, ReduceOptions(comm.size, True))
        assert not any(memory.shared for memory in memories)
        return [memory.own.clone() for memory in memories]

    with caplog.at_level("WARNING"):
        found = ThreadWorld(3, shared_memory=True).run(body)
    assert "cannot share memory" in caplog.text
    for tensors in found:
        for tensor, numel in zip(tensors, SIZES, strict=True):
            assert torch.equal(tensor, in_rank_order([values(rank, numel, torch.float32) for rank in range(3)], 3))


@one_process
def test_buckets_for_which_memory_runs_out_are_private(monkeypatch, caplog):
    """Each rank says so once, however many there are, and sums are what they are anyway."""
    from heatopt.comm import _shared_memory

    real, limit = _shared_memory._make_file, 90_000  # bytes: two of the buckets are larger
    monkeypatch.setattr(_shared_memory, "_make_file", lambda size, mark: real(size, mark) if size < limit else None)

    def body(comm):
        memories = reduce_all(comm, torch.float64, ReduceOptions(comm.size, True))
        assert {memory.shared for memory in memories} == {True, False}
        return [memory.own.clone() for memory in memories]

    with caplog.at_level("WARNING"):
        found = ThreadWorld(3, shared_memory=True).run(body)
    assert caplog.text.count("no memory to share") == 3
    for tensors in found:
        for tensor, numel in zip(tensors, SIZES, strict=True):
            assert torch.equal(tensor, in_rank_order([values(rank, numel, torch.float64) for rank in range(3)], 3))


def test_a_file_of_somebody_else_is_not_taken(monkeypatch, tmp_path):
    """Processes in different containers may see different things under one process number."""
    from heatopt.comm import _shared_memory

    other = tmp_path / "other"
    other.write_bytes(bytes(10**7))
    real = _shared_memory._open_file
    monkeypatch.setattr(
        _shared_memory, "_open_file", lambda path, own, *a: real(path if own is not None else str(other), own, *a)
    )

    def body(comm):
        return [memory.shared for memory in reduce_all(comm, torch.float32, ReduceOptions(comm.size, True))]

    assert not any(map(any, ThreadWorld(2, shared_memory=True).run(body)))
    assert other.read_bytes() == bytes(10**7)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_launches_and_completions_interleave_differently(size):
    """A rank that polls often and one that never does go through the same meetings, whatever the order."""

    def body(comm):
        memories = [comm.allocate(5000 + n, torch.float64, torch.device("cpu")) for n in range(6)]
        works = []
        for number, memory in enumerate(memories):
            memory.own.fill_(comm.rank + number)
            works.append(comm.reduce_bucket(memory, ReduceOptions(1, False), "a test"))
            for _ in range(3 * comm.rank):
                comm.progress()
            if number % (comm.rank + 2) == 0:
                works[number // 2].wait()
        for work in works:
            work.wait()
        return [memory.own.unique().tolist() for memory in memories]

    total = sum(range(size))
    for found in ThreadWorld(size, shared_memory=True).run(body):
        assert found == [[total + size * number] for number in range(6)]
