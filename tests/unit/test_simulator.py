"""The simulator: times against closed forms, numbers against the ring of threads, the same course in each run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch

import heatopt
from heatopt.comm import Communicator, Passage, SimulatedCommunicator, SimulatedWorld, ThreadWorld, VirtualNetwork
from heatopt.errors import CollectiveTimeoutError, RankFailedError, RankMismatchError

# A second moves 1000 bytes between nodes; within one all is free, but for what a test asks.
NETWORK = VirtualNetwork(latency=0.25, bandwidth=1000.0, node_latency=0.0, node_bandwidth=math.inf)


def rounds_of(size: int) -> int:
    """Rounds of a small exchange."""
    return math.ceil(math.log2(size))


def tensors_of(world: SimulatedWorld) -> list[Passage]:
    """The operations that move tensors."""
    return [passage for passage in world.trace if passage.kind not in ("words", "objects", "meeting")]


def duration(passages: list[Passage]) -> float:
    return max(p.end for p in passages) - min(p.start for p in passages)


# Closed forms


@pytest.mark.parametrize("size", [2, 3, 8])
def test_reduction_by_owners_costs_what_a_ring_costs(size: int) -> None:
    """2 (P - 1) latencies, and 2 (P - 1) / P of the bytes over each link."""
    world = SimulatedWorld(size, NETWORK, ranks_per_node=1)
    numel = 5040 * size
    world.run(lambda comm: comm.allreduce(torch.ones(numel)))
    passages = tensors_of(world)
    assert [passage.kind for passage in passages] == ["all_to_all", "all_gather"]
    expected = 2 * (size - 1) * 0.25 + 2 * (size - 1) / size * numel * 4 / 1000
    assert duration(passages) == pytest.approx(expected, rel=1e-12)
    assert sum(p.sent for p in passages) == 2 * (size - 1) * numel * 4


def test_words_travel_in_a_logarithm_of_rounds() -> None:
    world = SimulatedWorld(5, NETWORK, ranks_per_node=1)
    world.run(lambda comm: comm.barrier())
    [passage] = world.trace
    assert passage.kind == "words"
    assert passage.end == pytest.approx(rounds_of(5) * 0.25 + 4 * 8 / 1000, rel=1e-12)


def test_broadcast_crosses_each_link_once() -> None:
    world = SimulatedWorld(6, NETWORK, ranks_per_node=2)
    world.run(lambda comm: comm.broadcast(torch.full((500,), float(comm.rank)), root=3))
    [passage] = tensors_of(world)
    assert duration([passage]) == pytest.approx(rounds_of(6) * 0.25 + 2000 / 1000, rel=1e-12)
    assert passage.sent == 2 * 2000


def train_exactly(comm: Communicator, width: int, steps: int = 1) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Linear(width, 1, bias=False)
    optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), True, model=model, comm=comm)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.full((1, width), comm.rank + 1.0)).sum().backward()
        optimizer.step()
    return model.weight.detach().flatten().tolist()


@pytest.mark.parametrize(("nodes", "slots"), [(2, 2), (3, 4)])
def test_buckets_cross_the_network_once_and_slices_share_the_link(nodes: int, slots: int) -> None:
    """The owners of slices reduce among nodes, all at once over one link: 2 (M - 1) / M of the bytes per node."""
    network = VirtualNetwork(latency=0.0, bandwidth=1000.0, node_latency=0.0, node_bandwidth=math.inf)
    numel = 1024 * slots * nodes * 2  # presence flags and padding come on top, in the last slice
    world = SimulatedWorld(nodes * slots, network, ranks_per_node=slots)
    world.run(lambda comm: train_exactly(comm, numel))
    slices = [p for p in tensors_of(world) if p.kind in ("all_to_all", "all_gather") and len(p.members) == nodes]
    assert len({p.channel for p in slices}) == 2 * slots
    assert {p.members for p in slices} == {tuple(range(k, nodes * slots, slots)) for k in range(slots)}
    assert duration(slices) == pytest.approx(2 * (nodes - 1) / nodes * numel * 4 / 1000, rel=0.02)
    assert sum(p.sent for p in slices) / nodes == pytest.approx(2 * (nodes - 1) / nodes * numel * 4, rel=0.02)


@pytest.mark.parametrize(("numel", "lane"), [(4096, "LAUNCH"), (65_536, "FINISH")])
def test_memory_of_a_node_takes_time(numel: int, lane: str) -> None:
    """Of a small bucket, which meets once, and of a larger one, at its second meeting."""
    network = VirtualNetwork(latency=0.0, bandwidth=math.inf, node_latency=0.5, node_bandwidth=1e6)
    world = SimulatedWorld(4, network, ranks_per_node=4)
    world.run(lambda comm: train_exactly(comm, numel))
    met = [p for p in world.trace if p.channel.endswith(("LAUNCH", "FINISH"))]
    finish = [p for p in met if p.channel.endswith(lane)]
    assert len(finish) == len(met) / (1 if lane == "LAUNCH" else 2)
    nbytes = 1e6 * (duration(finish[:1]) - 2 * 0.5) / (2 * 4)
    assert 4 * numel <= nbytes <= 4 * numel + 256  # the weights, and presence flags


# Overlap


@pytest.mark.parametrize("seconds", [0.5, 20.0, 21.0, 50.0])
def test_what_is_on_its_way_goes_on_beside_computation(seconds: float) -> None:
    """Both stages of it, though nobody asks in between: the longer one of computation and communication counts."""

    def body(comm: SimulatedCommunicator) -> tuple[float, float, float]:
        tensor = torch.full((5000,), comm.rank + 1.0)
        work = comm.allreduce_async(tensor)
        begin = comm.now
        comm.compute(seconds)
        assert comm.now == pytest.approx(begin + seconds, rel=1e-12)
        work.wait()
        return begin, comm.now, tensor[-1].item()

    communication = 2 * 0.25 + 20_000 / 1000
    world = SimulatedWorld(2, NETWORK, ranks_per_node=1)
    for begin, end, value in world.run(body):
        assert end - begin == pytest.approx(max(seconds, communication), rel=1e-12)
        assert value == 3.0


def test_questions_move_no_clock_and_find_what_has_arrived() -> None:
    def body(comm: SimulatedCommunicator) -> tuple[bool, bool, bool]:
        work = comm.broadcast_async(torch.ones(1000))
        begin = comm.now
        early = work.done()
        assert comm.now == begin
        comm.compute(0.25 + 3.5)
        almost = work.done()
        comm.compute(0.5)
        return early, almost, work.done()

    assert SimulatedWorld(2, NETWORK, ranks_per_node=1).run(body) == [(False, False, True)] * 2


def test_works_in_the_background_go_on_while_a_rank_waits_elsewhere() -> None:
    """20.5 s of them beside 11 s of computation, 10 s of waiting for a slow rank, and small exchanges in between."""

    def body(comm: SimulatedCommunicator) -> tuple[float, float]:
        group = comm.background()
        tensor = torch.full((5000,), comm.rank + 1.0)
        comm.barrier()
        begin = comm.now
        work = group.reduce_async(tensor, "sum", "the test")
        comm.compute(1.0)
        comm.compute(10.0 * comm.rank)
        comm.barrier()
        comm.compute(10.0)
        before = comm.now
        work.wait()
        assert comm.now == before
        return comm.now - begin, tensor[-1].item()

    for seconds, value in SimulatedWorld(2, NETWORK, ranks_per_node=1).run(body):
        assert value == 3.0
        assert seconds == pytest.approx(1 + 10 + 10 + 0.25 + 2 * 8 / 1000, abs=0.02)


# Slow ranks and shared links


def test_a_slow_rank_delays_all() -> None:
    def body(comm: SimulatedCommunicator) -> float:
        for _ in range(3):
            comm.compute(1.0)
            comm.barrier()
        return comm.now

    even, uneven = (SimulatedWorld(3, NETWORK, ranks_per_node=1, slow=slow) for slow in (None, {2: 2.5}))
    [base] = set(even.run(body))
    [slow] = set(uneven.run(body))
    assert slow - base == pytest.approx(3 * 1.5, rel=1e-12)
    assert uneven.seconds == slow


def test_two_groups_share_a_link_and_the_second_has_it_alone_at_the_end() -> None:
    """Group 1 comes two seconds later: 2 s alone, then both at half the speed, then group 1 alone."""

    def body(comm: SimulatedCommunicator) -> float:
        group = comm.split(comm.node_rank)
        comm.barrier()
        begin = comm.now
        comm.compute(2.0 * comm.node_rank)
        group.broadcast_bytes(torch.ones(1000), 0, "the test")
        return comm.now - begin

    first, second, *others = SimulatedWorld(4, NETWORK, ranks_per_node=2).run(body)
    assert others == [first, second]
    # 4000 bytes each: group 0 moves 2000 alone and 2000 at half speed; group 1 then has 2000 left.
    assert first == pytest.approx(0.25 + 2 + 4, rel=1e-12)
    assert second == pytest.approx(0.25 + 2 + 4 + 2, rel=1e-12)


def test_other_directions_and_other_nodes_do_not_share() -> None:
    def body(comm: SimulatedCommunicator) -> float:
        group = comm.split(comm.rank // 2)
        comm.barrier()
        begin = comm.now
        group.broadcast_bytes(torch.ones(1000), 0, "the test")
        return comm.now - begin

    assert SimulatedWorld(4, NETWORK, ranks_per_node=1).run(body) == pytest.approx([0.25 + 4] * 4, rel=1e-12)


# The same numbers, the same course


def local_training(comm: Communicator, make: Callable[..., torch.optim.Optimizer], steps: int = 11) -> bytes:
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    begin = torch.Generator().manual_seed(0)  # torch's own is that of all threads
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=begin)
    optimizer = make(torch.optim.AdamW(model.parameters(), lr=0.01), model=model, comm=comm)
    data = torch.Generator().manual_seed(comm.rank)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 7, generator=data)).square().mean().backward()
        if isinstance(comm, SimulatedCommunicator):
            comm.compute(0.125)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes()


def make_daso(optimizer: torch.optim.Optimizer, **options: object) -> torch.optim.Optimizer:
    return heatopt.DASO(optimizer, 9, warmup_epochs=0, cooldown_epochs=0, **options)  # type: ignore[arg-type]


def make_streaming(optimizer: torch.optim.Optimizer, **options: object) -> torch.optim.Optimizer:
    return heatopt.DiLoCo(optimizer, sync_every=4, fragments=2, delay=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [heatopt.DataParallelOptimizer, heatopt.LocalSGD, make_streaming, make_daso])
def test_numbers_are_those_of_the_ring_of_threads(make: Callable[..., torch.optim.Optimizer]) -> None:
    real = ThreadWorld(4, ranks_per_node=2, shared_memory=True).run(local_training, make)
    world = SimulatedWorld(4, ranks_per_node=2, slow={1: 3.0})
    assert world.run(local_training, make) == real
    trace, seconds = world.trace, world.seconds
    assert seconds > 11 * 0.125 * 3
    assert world.run(local_training, make) == real
    assert (world.trace, world.seconds) == (trace, seconds)


def test_settings_are_chosen_by_virtual_time() -> None:
    """The trials of the first steps look at the rank's clock, so that they too take the same course each time."""
    world = SimulatedWorld(2, ranks_per_node=1)

    def trials(comm: SimulatedCommunicator) -> object:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 3)
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), comm=comm)
        for _ in range(60):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            comm.compute(2.0)
            optimizer.step()
        return optimizer.report()["trials"]

    first = world.run(trials)
    assert first == world.run(trials)
    assert all(trial["seconds"] > 2.0 for trial in first[0])  # type: ignore[attr-defined]


def test_hundreds_of_ranks() -> None:
    def train(comm: SimulatedCommunicator) -> float:
        model = torch.nn.Linear(16, 4)
        optimizer = heatopt.LocalSGD(
            torch.optim.SGD(model.parameters(), lr=0.1), model=model, comm=comm, sync_every=4, within="node"
        )
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.ones(2, 16)).square().mean().backward()
            comm.compute(1.0)
            optimizer.step()
        return comm.now

    begin = time.perf_counter()
    times = SimulatedWorld(128, ranks_per_node=4).run(train)
    assert max(times) < 8.5
    assert min(times) > 8.0
    assert time.perf_counter() - begin < 300


# Failures


def test_a_rank_that_fails_ends_the_run_with_its_error() -> None:
    seen: list[BaseException] = []

    def body(comm: SimulatedCommunicator) -> None:
        comm.barrier()
        if comm.rank == 1:
            raise KeyError("lost")
        try:
            comm.barrier()
        except RankFailedError as error:
            seen.append(error)
            raise

    with pytest.raises(KeyError, match="lost"):
        SimulatedWorld(3, NETWORK).run(body)
    assert [str(error) for error in seen] == [
        f"rank {rank} waits for rank 1, which failed with KeyError: 'lost'" for rank in (0, 2)
    ]


def test_a_rank_that_leaves_early_is_named() -> None:
    def body(comm: SimulatedCommunicator) -> None:
        if comm.rank:
            comm.barrier()

    with pytest.raises(RankFailedError, match="rank 1 waits for rank 0, which has finished"):
        SimulatedWorld(2, NETWORK).run(body)


def test_different_calls_are_an_error_on_all_ranks() -> None:
    def body(comm: SimulatedCommunicator) -> str:
        with pytest.raises(RankMismatchError) as caught:
            comm.allreduce(torch.ones(3 + comm.rank // 2))
        return str(caught.value)

    first, *others = SimulatedWorld(3, NETWORK).run(body)
    assert others == [first] * 2
    assert "rank 2 calls allreduce sum, shape (4,)" in first


def test_time_outs_are_virtual() -> None:
    def body(comm: SimulatedCommunicator) -> None:
        comm.compute(11.0 if comm.rank else 0.0)
        comm.barrier()

    with pytest.raises(CollectiveTimeoutError, match=r"rank 0 waited 10 s in words; late: ranks \[1\]"):
        SimulatedWorld(2, NETWORK, timeout=10.0).run(body)
    SimulatedWorld(2, NETWORK, timeout=11.5).run(body)


def test_time_that_stands_still_is_noticed() -> None:
    def body(comm: SimulatedCommunicator) -> None:
        pairs = comm.split(comm.rank // 2)
        (pairs if comm.rank % 2 else comm).barrier()

    with pytest.raises(CollectiveTimeoutError, match="late: ranks"):
        SimulatedWorld(4, NETWORK, timeout=math.inf).run(body)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"latency": -1.0}, "latency must be seconds >= 0, got -1.0"),
        ({"bandwidth": 0.0}, "bandwidth must be bytes per second > 0, got 0.0"),
        ({"node_latency": math.inf}, "node_latency must be"),
        ({"node_bandwidth": math.nan}, "node_bandwidth must be"),
    ],
)
def test_wrong_networks(arguments: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VirtualNetwork(**arguments)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"slow must map ranks \(0 to 1\) to factors > 0, got 2: 1.5"):
        SimulatedWorld(2, slow={2: 1.5})
    with pytest.raises(ValueError, match="got 0: 0"):
        SimulatedWorld(2, slow={0: 0})
    with pytest.raises(ValueError, match="seconds must be a number >= 0, got -1"):
        SimulatedWorld(1).run(lambda comm: comm.compute(-1))
