"""What is particular to one kind of communicator, and what a single process does not start."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch

import heatopt
from heatopt.comm import Communicator, ReduceOptions, SingleCommunicator, ThreadWorld, Topology, TorchCommunicator
from heatopt.comm._work import Request, Stage, Steps, WorkQueue
from heatopt.errors import (
    CheckpointError,
    CollectiveTimeoutError,
    HeatoptError,
    RankFailedError,
    RankMismatchError,
)
from tests.support.launch import REPOSITORY

LAUNCHER_PREFIXES = ("HEATOPT_", "OMPI_", "PMIX_", "PMI_", "SLURM_", "TORCHELASTIC_")
RENDEZVOUS = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEATOPT_RANKS_PER_NODE", raising=False)


def run_python(program: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in one process of its own, without a launcher."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=clean | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | changes,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


# Errors


def test_errors_are_heatopt_errors() -> None:
    assert issubclass(HeatoptError, RuntimeError)
    for error in (RankMismatchError, CollectiveTimeoutError, RankFailedError, CheckpointError):
        assert issubclass(error, HeatoptError)
        assert getattr(heatopt, error.__name__) is error


# One process


def test_single_communicator() -> None:
    comm = SingleCommunicator()
    assert (comm.rank, comm.size, comm.node_rank, comm.node_size, comm.node_index, comm.num_nodes) == (0, 1, 0, 1, 0, 1)
    groups = [comm.split(0), comm.split(None, 3), comm.duplicate(), *comm.by_node()]
    assert all(isinstance(group, SingleCommunicator) and group.size == 1 for group in groups)


def test_single_communicator_ends_its_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        SingleCommunicator().abort("out of data", 4)
    assert caught.value.code == 4
    assert "out of data" in capsys.readouterr().err


def test_world_is_one_object() -> None:
    found: list[Communicator] = []
    threads = [threading.Thread(target=lambda: found.append(heatopt.world())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(comm is heatopt.world() for comm in found)
    assert isinstance(heatopt.world(), SingleCommunicator)


TRAINING = """
    import random, signal, sys, threading
    sys.modules["mpi4py"] = None  # importing it fails
    import torch
    import torch.distributed as dist
    before = torch.get_rng_state(), sys.excepthook, signal.getsignal(signal.SIGTERM), random.getstate()
    import heatopt
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    start = [p.detach().clone() for p in model.parameters()]
    before = torch.get_rng_state(), *before[1:]
    comm = heatopt.world()
    optimizer = heatopt.DataParallelOptimizer(torch.optim.Adam(model.parameters()), model=model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start))
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(8, 4) * torch.arange(8.0)[:, None]).square().sum().backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    with optimizer.join(), optimizer.no_sync():
        pass
    heatopt.sync_buffers(model)
    heatopt.broadcast_parameters(model)
    heatopt.broadcast_optimizer_state(optimizer)
    comm.by_node().across.split(0).allreduce(torch.ones(3), "mean")
    comm.allreduce_async(torch.ones(3)).wait()
    assert (sys.excepthook, signal.getsignal(signal.SIGTERM), random.getstate()) == before[1:]
    assert not dist.is_initialized()
    assert "heatopt.comm._mpi" not in sys.modules and "heatopt.comm._torch" not in sys.modules
    assert threading.active_count() == 1, threading.enumerate()
    print(type(comm).__name__, comm.size)
"""


def test_one_process_starts_nothing() -> None:
    result = run_python(TRAINING)
    assert (result.returncode, result.stdout, result.stderr) == (0, "SingleCommunicator 1\n", "")


def test_one_process_does_not_import_mpi4py_that_is_there() -> None:
    program = TRAINING.replace('sys.modules["mpi4py"] = None', "pass")
    result = run_python(program + '    assert not any(name.startswith("mpi4py") for name in sys.modules)\n')
    assert (result.returncode, result.stdout, result.stderr) == (0, "SingleCommunicator 1\n", "")


def test_failures_of_one_process_are_pythons_own() -> None:
    program = """
        import sys, torch, heatopt
        model = torch.nn.Linear(2, 1)
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        heatopt.world()
        {}
    """
    failed = run_python(program.format("raise KeyError('missing')"))
    assert failed.returncode == 1
    assert failed.stderr.rstrip().endswith("KeyError: 'missing'")
    left = run_python(program.format("sys.exit(3)"))
    assert (left.returncode, left.stderr) == (3, "")


def test_default_group_of_one_process_and_of_the_environment() -> None:
    program = """
        import os, torch, torch.distributed as dist
        import heatopt
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        assert type(heatopt.world()) is heatopt.comm.SingleCommunicator
        assert heatopt.world().allreduce(torch.tensor(2.0)).item() == 2.0
        dist.destroy_process_group()
        print("ok")
    """
    # WORLD_SIZE 3 without the other processes: the group that was initialised comes first.
    result = run_python(program, **RENDEZVOUS)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


def test_names_on_demand() -> None:
    assert heatopt.comm.TorchCommunicator is TorchCommunicator
    assert {"MPICommunicator", "TorchCommunicator", "ThreadWorld", "SingleCommunicator"} <= set(heatopt.comm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'CarrierPigeon'"):
        _ = heatopt.comm.CarrierPigeon
    with pytest.raises(TypeError, match="abstract"):
        Communicator(0, Topology((0,)), 1.0)  # type: ignore[abstract]


# torch.distributed


def test_torch_communicator_needs_a_store_or_a_group() -> None:
    with pytest.raises(ValueError, match="store"):
        TorchCommunicator()
    with pytest.raises(ValueError, match="rank and size"):
        TorchCommunicator(torch.distributed.HashStore())


def test_torch_communicator_of_one_rank() -> None:
    comm = TorchCommunicator(torch.distributed.HashStore(), 0, 1, timeout=5.0)
    assert (comm.rank, comm.size, comm.timeout) == (0, 1, 5.0)
    tensor = torch.arange(70_000, dtype=torch.bfloat16)
    assert torch.equal(comm.allreduce(tensor.clone(), "mean"), tensor)
    assert comm.split(4).all_gather_object("alone") == ["alone"]
    assert not torch.distributed.is_initialized()


# The queue of launched works


class Operation(Request):
    """An operation whose end the test decides."""

    def __init__(self, error: Exception | None = None) -> None:
        self.complete = False
        self._error = error

    def done(self) -> bool:
        return self.complete

    def wait(self) -> None:
        self.complete = True
        if self._error is not None:
            raise self._error


def stages(log: list[str], name: str, *operations: Operation | Stage) -> Steps[str]:
    number = 0
    for operation in operations:
        if isinstance(operation, Operation):
            log.append(f"{name}{number}")
            number += 1
        yield operation
    return name


def test_operations_of_a_stage_start_in_the_order_of_the_launches() -> None:
    queue, log = WorkQueue(), list[str]()
    a, b = [Operation(), Operation(), Operation()], [Operation(), Operation(), Operation()]
    first = queue.launch(stages(log, "a", a[0], Stage.EXCHANGE, a[1], Stage.FINISH, a[2]), nullcontext)
    second = queue.launch(stages(log, "b", b[0], Stage.EXCHANGE, b[1], Stage.GATHER, b[2]), nullcontext)
    assert log == ["a0", "b0"]
    b[0].complete = True
    assert not second.done()
    assert log == ["a0", "b0"]  # b1 may start after a1 only, whatever has completed
    a[0].complete = True
    assert not first.done()
    assert log == ["a0", "b0", "a1", "b1"]
    b[1].complete = True
    assert not second.done()
    assert log == ["a0", "b0", "a1", "b1"]  # a might still gather
    a[1].complete = True
    assert not second.done()
    assert log == ["a0", "b0", "a1", "b1", "a2", "b2"]  # it did not: its finish is later than any gathering
    b[2].complete = True
    assert second.done()  # and need not wait for a's end
    assert not first.done()
    assert first.wait() == "a"
    assert second.wait() == "b"


def test_a_rank_blocks_for_its_oldest_work_alone() -> None:
    queue, log, waits = WorkQueue(), list[str](), list[str]()

    def waiting(name: str) -> AbstractContextManager[None]:
        waits.append(name)
        return nullcontext()

    works = [
        queue.launch(stages(log, name, Operation(), Stage.EXCHANGE, Operation()), partial(waiting, name))
        for name in "abc"
    ]
    assert works[1].wait() == "b"
    assert waits == ["a", "a", "b", "b"]
    assert log == ["a0", "b0", "c0", "a1", "b1"]
    assert works[2].wait() == "c"
    queue.drain()
    assert works[0].done()
    assert log == ["a0", "b0", "c0", "a1", "b1", "c1"]


def test_failed_work_stays_failed() -> None:
    queue, log = WorkQueue(), list[str]()
    failing = queue.launch(stages(log, "a", Operation(RankFailedError("rank 3 is gone"))), nullcontext)
    with pytest.raises(RankFailedError, match="rank 3 is gone"):
        failing.wait()
    with pytest.raises(RankFailedError, match="rank 3 is gone"):
        failing.wait()


def test_work_that_failed_between_stages_stays_failed() -> None:
    def steps() -> Steps[str]:
        yield Operation()
        raise ArithmeticError("no room for the result")

    queue = WorkQueue()
    failing, other = queue.launch(steps(), nullcontext), queue.launch(stages([], "b", Operation()), nullcontext)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="no room"):
            failing.wait()
    assert other.wait() == "b"


# Threads as ranks


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2", None])
def test_thread_world_needs_a_number_of_ranks(size: object) -> None:
    with pytest.raises(ValueError, match="size must be an integer >= 1"):
        ThreadWorld(size)  # type: ignore[arg-type]
    if size is not None:
        with pytest.raises(ValueError, match="ranks_per_node must be an integer >= 1"):
            ThreadWorld(2, ranks_per_node=size)  # type: ignore[arg-type]


def test_thread_world_returns_results_by_rank() -> None:
    def body(comm: Communicator, factor: int, shift: int) -> int:
        time.sleep(0.02 * (3 - comm.rank))
        assert threading.current_thread().name == f"rank{comm.rank}"
        return factor * comm.rank + shift

    assert ThreadWorld(3).run(body, 10, 1) == [1, 11, 21]


def test_thread_world_can_run_again() -> None:
    world = ThreadWorld(2, timeout=10.0)

    def body(comm: Communicator, value: float) -> float:
        time.sleep(0.05 * comm.rank)
        return comm.allreduce(torch.tensor([value])).item()

    assert world.run(body, 1.0) == [2.0, 2.0]
    assert world.run(body, 10.0) == [20.0, 20.0]

    def fail(comm: Communicator) -> None:
        if comm.rank == 1:
            time.sleep(0.05)
            raise KeyError("missing")
        comm.barrier()

    def backwards(comm: Communicator) -> float:
        time.sleep(0.05 * (1 - comm.rank))
        return comm.allreduce(torch.tensor([5.0])).item()

    with pytest.raises(KeyError):
        world.run(fail)  # what rank 0 has said is never heard
    assert world.run(backwards) == [10.0, 10.0]


def test_thread_world_forgets_what_has_arrived() -> None:
    count = 77_777

    def body(comm: Communicator) -> None:
        own = torch.ones(count)
        for _ in range(20):
            comm.broadcast(own)
        comm.barrier()

    world = ThreadWorld(2)
    world.run(body)
    kept = [found for found in gc.get_objects() if type(found) is torch.Tensor and found.numel() == count]
    assert kept == []


def test_first_failure_is_raised() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            time.sleep(0.05)
            raise KeyError("missing")
        comm.barrier()

    started = time.monotonic()
    with pytest.raises(KeyError, match="missing"):
        ThreadWorld(4, timeout=60.0).run(body)
    assert time.monotonic() - started < 20.0


def test_waiting_ranks_learn_who_failed() -> None:
    messages: dict[int, str] = {}

    def body(comm: Communicator) -> None:
        if comm.rank == 2:
            raise LookupError("no data")
        try:
            comm.allreduce(torch.ones(3))
        except RankFailedError as error:
            messages[comm.rank] = str(error)
            raise

    with pytest.raises(LookupError):
        ThreadWorld(3, timeout=60.0).run(body)
    assert messages.keys() == {0, 1}
    assert all("rank 2" in message and "LookupError: no data" in message for message in messages.values())


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_exits_of_threads_are_failures(error: BaseException) -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 0:
            raise error
        comm.barrier()

    with pytest.raises(type(error)):
        ThreadWorld(2).run(body)


def test_rank_that_has_finished_is_named() -> None:
    def body(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank != 1:
            comm.barrier()

    with pytest.raises(RankFailedError, match="waits for rank 1, which has finished"):
        ThreadWorld(3, timeout=60.0).run(body)


def test_late_rank_is_named() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            time.sleep(0.6)
        comm.barrier()

    with pytest.raises(CollectiveTimeoutError, match=r"waited 0\.2 s .*late: .*1"):
        ThreadWorld(2, timeout=0.2).run(body)


def test_late_rank_is_named_in_shared_memory() -> None:
    def body(comm: Communicator) -> None:
        memory = comm.allocate(8, torch.float32, torch.device("cpu"))
        if comm.rank == 1:
            time.sleep(1.0)
        comm.reduce_bucket(memory, ReduceOptions(2, True), "a test")

    with pytest.raises(CollectiveTimeoutError, match=r"rank 0 waited 0\.2 s in a test; late: rank 1"):
        ThreadWorld(2, timeout=0.2, shared_memory=True).run(body)


def test_operations_that_do_not_match_are_found() -> None:
    def body(comm: Communicator) -> str:
        try:
            # Without the agreement that comes before the public calls.
            comm.broadcast_bytes(torch.zeros(4 + comm.rank, dtype=torch.uint8), 0, "test")
        except RankMismatchError as error:
            return str(error)
        return "undetected"

    for message in ThreadWorld(2).run(body):
        assert "rank 0" in message
        assert "rank 1" in message


def test_abort_of_a_thread_is_an_error() -> None:
    with pytest.raises(RankFailedError, match="no more data"):
        ThreadWorld(2).run(lambda comm: comm.abort("no more data", 3))


def test_virtual_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(comm: Communicator) -> tuple[int, int, int]:
        return comm.node_index, comm.node_rank, comm.num_nodes

    assert ThreadWorld(3).run(body) == [(0, 0, 1), (0, 1, 1), (0, 2, 1)]
    assert ThreadWorld(3, ranks_per_node=2).run(body) == [(0, 0, 2), (0, 1, 2), (1, 0, 2)]
    monkeypatch.setenv("HEATOPT_RANKS_PER_NODE", "1")
    assert ThreadWorld(3).run(body) == [(0, 0, 3), (1, 0, 3), (2, 0, 3)]
    assert ThreadWorld(3, ranks_per_node=2).run(body) == [(0, 0, 2), (0, 1, 2), (1, 0, 2)]  # whatever the environment


def test_events_are_listed() -> None:
    world = ThreadWorld(2)
    world.run(lambda comm: comm.broadcast(torch.zeros(6)))
    moved = [event for event in world.events if event.kind == "broadcast"]
    assert sorted(event.rank for event in moved) == [0, 1]
    assert all(event.bytes == 24 for event in moved)


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 60_000), (torch.bfloat16, 60_001), (torch.bool, 50_000), (torch.complex128, 9001)],
    ids=str,
)
def test_reductions_move_no_more_bytes_than_a_ring(dtype: torch.dtype, count: int) -> None:
    """Two thirds of the tensor there and two thirds back with three ranks; never a wider dtype on the wire."""
    size = 3
    world = ThreadWorld(size)
    world.run(lambda comm: comm.allreduce(torch.zeros(count, dtype=dtype)))
    sent = [0] * size
    for event in world.events:
        if event.kind == "all_to_all":
            sent[event.rank] += event.bytes * (size - 1) // size
        elif event.kind == "all_gather":
            sent[event.rank] += event.bytes * (size - 1)
    ring = 2 * count * dtype.itemsize * (size - 1) / size
    assert all(ring <= number < 1.001 * ring for number in sent)


@pytest.mark.parametrize(("size", "kinds"), [(2, ["all_gather"]), (3, ["all_to_all", "all_gather"])])
def test_two_ranks_exchange_half_types_at_once(size: int, kinds: list[str]) -> None:
    world = ThreadWorld(size)
    world.run(lambda comm: comm.allreduce(torch.zeros(60_001, dtype=torch.bfloat16)))
    assert [event.kind for event in world.events if event.rank == 0 and event.kind != "words"] == kinds


def test_results_do_not_depend_on_the_pace_of_ranks() -> None:
    def body(comm: Communicator, pause: Callable[[int], float]) -> torch.Tensor:
        tensor = torch.linspace(0.1, 1.7, 9001).pow(comm.rank + 1)
        time.sleep(pause(comm.rank))
        return comm.allreduce(tensor, "mean")

    first = ThreadWorld(3).run(body, lambda rank: 0.02 * rank)
    second = ThreadWorld(3).run(body, lambda rank: 0.02 * (2 - rank))
    assert all(torch.equal(first[0], found) for found in (*first, *second))
