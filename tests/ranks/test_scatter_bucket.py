"""``scatter_bucket``: each rank gets its part of the sum that ``reduce_bucket`` gives all, bit for bit."""

from __future__ import annotations

import pytest
import torch

from heatopt.comm import BucketMemory, Communicator, ReduceOptions, SingleCommunicator, ThreadWorld
from tests.ranks.test_shared_memory import values
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

CPU = torch.device("cpu")
SIZES = (0, 1, 5, 1023, 4099, 200_003)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
one_process = pytest.mark.skipif(LAUNCH.launched, reason="starts ranks of its own")


def parts(numel: int, size: int, ragged: bool) -> list[int]:
    """Bounds of equal parts, or of parts that grow, the first of them empty where there are several."""
    if not ragged:
        return [numel * rank // size for rank in range(size + 1)]
    return [0, 0, *(numel * rank * rank // size**2 for rank in range(2, size + 1))] if size > 1 else [0, numel]


def filled(comm: Communicator, numel: int, dtype: torch.dtype) -> BucketMemory:
    memory = comm.allocate(numel, dtype, CPU)
    memory.own.copy_(values(comm.rank, numel, dtype))
    return memory


def assert_scatters(comm: Communicator, dtype: torch.dtype, options: ReduceOptions) -> None:
    """Several buckets at once, equal and unequal parts."""
    cases = [(numel, parts(numel, comm.size, ragged)) for numel in SIZES for ragged in (False, True)]
    scattered = [filled(comm, numel, dtype) for numel, _ in cases]
    works = [
        comm.scatter_bucket(memory, bounds, options, "a test")
        for memory, (_, bounds) in zip(scattered, cases, strict=True)
    ]
    for work in works:
        if work is not None:
            work.wait()
    for memory, (numel, bounds) in zip(scattered, cases, strict=True):
        whole = filled(comm, numel, dtype)
        work = comm.reduce_bucket(whole, options, "a test")
        if work is not None:
            work.wait()
        own = slice(bounds[comm.rank], bounds[comm.rank + 1])
        assert torch.equal(memory.own[own], whole.own[own]), (numel, bounds)


@pytest.mark.parametrize("blocking", [True, False])
@each_dtype
def test_bits_of_the_whole_reduction(ranks: Ranks, dtype: torch.dtype, blocking: bool) -> None:
    def body(comm: Communicator) -> None:
        own = comm.duplicate()
        assert_scatters(own, dtype, ReduceOptions(comm.size, blocking))
        own.close()

    ranks(body)


@one_process
@pytest.mark.parametrize(("size", "per_node"), [(2, 1), (3, 2), (3, 3), (4, 2), (5, 3), (5, 4)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("extra", [{}, {"wire_dtype": torch.bfloat16}, {"reproducible": True}], ids=str)
def test_across_nodes(size: int, per_node: int, shared: bool, extra: dict[str, bool]) -> None:
    """Also with nodes of different sizes, whose extra ranks are served by a neighbour."""

    def body(comm: Communicator) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            for blocking in (True, False):
                assert_scatters(comm, dtype, ReduceOptions(size, blocking, **extra))

    ThreadWorld(size, ranks_per_node=per_node, shared_memory=shared).run(body)


def test_nobody_writes_the_rest(ranks: Ranks) -> None:
    """Within a node: what another rank owns is left as it was, in all segments."""

    def body(comm: Communicator) -> None:
        own = comm.duplicate()
        numel = 5000
        memory = filled(own, numel, torch.float32)
        if memory.shared and own.num_nodes == 1:
            bounds = parts(numel, own.size, False)
            own.scatter_bucket(memory, bounds, ReduceOptions(own.size, True), "a test")
            expected = values(own.rank, numel, torch.float32)
            mine = slice(bounds[own.rank], bounds[own.rank + 1])
            expected[mine] = memory.own[mine]
            assert torch.equal(memory.own, expected)
        own.close()

    ranks(body)


@one_process
def test_traffic_is_half() -> None:
    """A reduction sends each element to its owner and the result back; this sends it to its owner."""
    numel, size = 4096, 4
    world = ThreadWorld(size)
    bounds = parts(numel, size, True)

    def body(comm: Communicator) -> None:
        memory = filled(comm, numel, torch.float32)
        comm.scatter_bucket(memory, bounds, ReduceOptions(size, True), "a test")

    world.run(body)
    sent = [(event.kind, event.bytes) for event in world.events if event.rank == 0 and event.kind.startswith("all")]
    assert sent == [("all_to_all_parts", 4 * numel)]


def test_one_rank_alone() -> None:
    assert_scatters(SingleCommunicator(), torch.bfloat16, ReduceOptions(3, True))
