"""The traffic of one training step: which operations, how many, of what size, and in the same order on all ranks.

Ranks are threads here: their world keeps a list of all operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch

from heatopt import DataParallelOptimizer
from heatopt.buckets import BucketPlan, ParameterSpec, plan_buckets
from heatopt.comm import Communicator, ThreadWorld
from tests.support.launch import LAUNCH
from tests.support.problems import Net
from tests.support.training import SMALL_BUCKET_MB

if LAUNCH.launched:
    pytest.skip("runs on threads, and so without a launcher", allow_module_level=True)

MANY = (2, 3, 4)
BLOCKING = pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
HEADER = "words"


class Operation(NamedTuple):
    """What a rank started, without the name of its group."""

    kind: str
    lane: str
    bytes: int


def traffic(world: ThreadWorld, comm: Communicator, action: Callable[[], object]) -> list[Operation]:
    """The operations that this rank starts in ``action``."""

    def own() -> list[Operation]:
        events = [event for event in list(world.events) if event.rank == comm.rank]
        return [Operation(event.kind, event.channel.rpartition("/")[2], event.bytes) for event in events]

    before = len(own())
    action()
    return own()[before:]


def plan_of(parameters: Iterable[torch.Tensor], bucket_mb: float) -> tuple[BucketPlan, ...]:
    specs = [ParameterSpec(i, f"p{i}", tuple(p.shape), p.dtype, p.device) for i, p in enumerate(parameters)]
    return plan_buckets(specs, int(bucket_mb * 2**20))


def bucket_bytes(parameters: Iterable[torch.Tensor], bucket_mb: float = SMALL_BUCKET_MB) -> list[int]:
    return [plan.numel * plan.dtype.itemsize for plan in plan_of(parameters, bucket_mb)]


def kinds(operations: list[Operation]) -> list[str]:
    return [operation.kind for operation in operations]


def of_lane(operations: list[Operation], lane: int) -> list[tuple[str, int]]:
    return [(o.kind, o.bytes) for o in operations if o.lane == f"lane{lane}" and o.kind != HEADER]


class Step(NamedTuple):
    """A model with its optimizer on one rank, and the traffic of what they do."""

    world: ThreadWorld
    comm: Communicator
    net: Net
    optimizer: DataParallelOptimizer

    def backward(self, step: int = 0) -> list[Operation]:
        loss = self.net(self.net.batch(step, self.comm.size).part(self.comm.rank, self.comm.size))
        return traffic(self.world, self.comm, loss.backward)

    def call(self, action: Callable[[], object]) -> list[Operation]:
        return traffic(self.world, self.comm, action)


def run(size: int, body: Callable[[Step], Any], **settings: Any) -> list[Any]:
    """Run ``body`` on each of ``size`` threads; what they return must be equal."""
    world = ThreadWorld(size)

    def on_rank(comm: Communicator) -> Any:
        net = Net()
        plain = torch.optim.AdamW(net.parameters())
        options = {"bucket_mb": SMALL_BUCKET_MB} | settings
        return body(Step(world, comm, net, DataParallelOptimizer(plain, comm=comm, **options)))

    results = world.run(on_rank)
    assert all(result == results[0] for result in results)
    return results[0]


def test_one_rank_has_no_traffic() -> None:
    def body(step: Step) -> None:
        assert step.backward() == []
        assert step.call(step.optimizer.step) == []
        assert step.call(step.optimizer.synchronize) == []
        assert step.call(lambda: step.optimizer.clip_grad_norm_(1.0)) == []

    run(1, body)


@BLOCKING
@pytest.mark.parametrize("size", MANY)
def test_training_step(size: int, blocking: bool) -> None:
    """Backward: one header, then each bucket once, in order. The step: one header."""

    def body(step: Step) -> list[list[list[Operation]]]:
        found = []
        for number in range(3):
            step.optimizer.zero_grad()
            found.append([step.backward(number), step.call(step.optimizer.step)])
        return found

    expected = bucket_bytes(Net().parameters())
    assert len(expected) >= 3, "several buckets"
    assert len(plan_of(Net().parameters(), SMALL_BUCKET_MB)) < len(list(Net().parameters())), (
        "some of several parameters"
    )
    for backward, update in run(size, body, blocking=blocking):
        assert kinds(backward) == [HEADER] + ["all_gather"] * len(expected)
        assert of_lane(backward, 0) == [("all_gather", count) for count in expected]
        assert kinds(update) == [HEADER]


@BLOCKING
@pytest.mark.parametrize("size", MANY)
def test_weights_cost_no_message(size: int, blocking: bool) -> None:
    """They are in the header: the same operations of the same sizes, also where micro-batches add up."""

    def body(step: Step) -> list[list[Operation]]:
        found = []
        for weighted in (False, True, True):
            step.optimizer.zero_grad()
            for number in range(2):
                with step.optimizer.weight(step.comm.rank + number) if weighted else nullcontext():
                    found.append(step.backward(number))
            found.append(step.call(step.optimizer.step))
        return found

    plain, weighted, again = (lambda found: (found[:3], found[3:6], found[6:]))(run(size, body, blocking=blocking))
    assert plain == weighted == again
    assert kinds(plain[0]) == [HEADER] + ["all_gather"] * len(bucket_bytes(Net().parameters()))


@pytest.mark.parametrize("size", MANY)
def test_weights_by_hand_cost_no_message(size: int) -> None:
    def body(step: Step) -> list[list[Operation]]:
        found = []
        for options in ({}, {"weight": step.comm.rank + 1}):
            step.optimizer.zero_grad()
            for parameter in step.net.parameters():
                parameter.grad = torch.ones_like(parameter)
            found.append(step.call(lambda options=options: step.optimizer.step(**options)))
        return found

    plain, weighted = run(size, body)
    assert plain == weighted
    assert kinds(plain) == [HEADER] + ["all_gather"] * len(bucket_bytes(Net().parameters()))


@BLOCKING
@pytest.mark.parametrize("size", MANY)
def test_large_buckets_travel_in_two_exchanges(size: int, blocking: bool) -> None:
    """Each rank sends the others their parts, then all send their sums; each kind in the order of the buckets."""
    world = ThreadWorld(size)
    shapes = [(3001,), (4003,), (5,), (5003,)]

    def body(comm: Communicator) -> list[list[tuple[str, int]]]:
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer = DataParallelOptimizer(torch.optim.SGD(parameters), blocking, comm=comm, bucket_mb=0.001)
        found = traffic(world, comm, sum((p * (comm.rank + 1)).sum() for p in parameters).backward)
        assert kinds(found).count(HEADER) == 1
        assert kinds(found)[0] == HEADER
        assert traffic(world, comm, optimizer.step) == [found[0]]
        return [of_lane(found, 0), of_lane(found, 1)]

    results = world.run(body)
    first, second = [], []
    for plan in plan_of([torch.zeros(shape) for shape in shapes], 0.001):
        part = -(-plan.numel // size) * plan.dtype.itemsize
        if plan.numel < 100:
            first.append(("all_gather", plan.numel * plan.dtype.itemsize))
        else:
            first.append(("all_to_all", part * size))
            second.append(("all_gather", part))
    assert results == [[first, second]] * size


@BLOCKING
@pytest.mark.parametrize("size", MANY)
def test_gradients_in_other_orders_on_each_rank(size: int, blocking: bool) -> None:
    """The order of the hooks decides nothing: the traffic is equal on all ranks, and as ever."""
    world = ThreadWorld(size)
    shapes = [(61,), (3,), (17, 5), (29,), (70,)]

    def body(comm: Communicator) -> tuple[list[Operation], list[int]]:
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer = DataParallelOptimizer(torch.optim.SGD(parameters), blocking, comm=comm, bucket_mb=SMALL_BUCKET_MB)
        arrived: list[int] = []
        for number, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: arrived.append(number))
        order = list(range(comm.rank, len(shapes))) + list(range(comm.rank))
        loss = torch.zeros(())
        for number in order:
            loss = loss + (parameters[number] * (number + comm.rank)).sum()
        found = traffic(world, comm, loss.backward)
        for number, parameter in enumerate(parameters):
            assert parameter.grad is not None
            assert parameter.grad.unique().tolist() == pytest.approx([number + (size - 1) / 2])
        assert kinds(traffic(world, comm, optimizer.step)) == [HEADER]
        return found, arrived

    results = world.run(body)
    assert len({tuple(arrived) for _, arrived in results}) == size
    for found, _ in results:
        assert found == results[0][0]
        expected = bucket_bytes([torch.zeros(shape) for shape in shapes])
        assert len(expected) > 2
        assert of_lane(found, 0) == [("all_gather", count) for count in expected]
        assert kinds(found).count(HEADER) == 1


@BLOCKING
@pytest.mark.parametrize("size", MANY)
def test_parameters_without_gradient_take_part(size: int, blocking: bool) -> None:
    """Step 0 and step 1 use other parameters, on some ranks or on none: the traffic does not tell."""
    assert run(size, lambda step: step.backward(0), blocking=blocking) == run(
        size, lambda step: step.backward(1), blocking=blocking
    )


@BLOCKING
@pytest.mark.parametrize("absent", ["first", "last"])
@pytest.mark.parametrize("size", MANY)
def test_rank_without_backward_serves_the_others_from_step(size: int, absent: str, blocking: bool) -> None:
    def body(step: Step) -> list[Operation]:
        present = step.comm.rank != (0 if absent == "first" else size - 1)
        backward = step.backward() if present else []
        return backward + step.call(step.optimizer.step)

    buckets = len(bucket_bytes(Net().parameters()))
    assert kinds(run(size, body, blocking=blocking)) == [HEADER] + ["all_gather"] * buckets + [HEADER]


@BLOCKING
@pytest.mark.parametrize("size", MANY)
def test_no_sync_is_silent(size: int, blocking: bool) -> None:
    def body(step: Step) -> list[list[Operation]]:
        found = []
        for number in range(4):
            with step.optimizer.no_sync() if number < 3 else nullcontext():
                found.append(step.backward(number))
        return [*found, step.call(step.optimizer.step)]

    *silent, synchronised, update = run(size, body, blocking=blocking)
    buckets = len(bucket_bytes(Net().parameters()))
    assert silent == [[], [], []]
    assert kinds(synchronised) == [HEADER] + ["all_gather"] * buckets
    assert kinds(update) == [HEADER]


@BLOCKING
@pytest.mark.parametrize("size", MANY)
def test_step_after_no_sync_reduces_once(size: int, blocking: bool) -> None:
    """The header of the step asks for the reduction; there is no second one."""

    def body(step: Step) -> list[Operation]:
        with step.optimizer.no_sync():
            assert step.backward(0) == step.backward(2) == []
        return step.call(step.optimizer.step)

    expected = bucket_bytes(Net().parameters())
    found = run(size, body, blocking=blocking)
    assert kinds(found) == [HEADER] + ["all_gather"] * len(expected)
    assert of_lane(found, 0) == [("all_gather", count) for count in expected]


@BLOCKING
@pytest.mark.parametrize("size", MANY)
def test_accumulation_synchronises_the_last_backward(size: int, blocking: bool) -> None:
    def body(step: Step) -> list[list[str]]:
        found = []
        for _ in range(2):
            step.optimizer.zero_grad()
            found += [kinds(step.backward(number)) for number in range(3)]
            found.append(kinds(step.call(step.optimizer.step)))
        return found

    reductions = ["all_gather"] * len(bucket_bytes(Net().parameters()))
    one_update = [[], [], [HEADER, *reductions], [HEADER]]
    assert run(size, body, blocking=blocking, accumulation_steps=3) == one_update * 2


@pytest.mark.parametrize("size", MANY)
def test_calls_without_anything_to_reduce_take_one_header(size: int) -> None:
    def body(step: Step) -> dict[str, list[str]]:
        step.backward()
        optimizer = step.optimizer
        calls = {
            "synchronize": optimizer.synchronize,
            "clip": lambda: optimizer.clip_grad_norm_(1.0),
            "step": optimizer.step,
            "state_dict": optimizer.state_dict,
            "zero_grad": optimizer.zero_grad,
        }
        return {name: kinds(step.call(call)) for name, call in calls.items()}

    expected = {name: [HEADER] for name in ("synchronize", "clip", "step")} | {"state_dict": [], "zero_grad": []}
    assert run(size, body) == expected


@pytest.mark.parametrize("size", MANY)
def test_gradient_set_by_hand_is_reduced_by_step(size: int) -> None:
    """... with its bucket alone."""

    def body(step: Step) -> list[Operation]:
        step.backward()
        assert step.net.bias.grad is not None
        step.net.bias.grad = step.net.bias.grad.clone()
        return step.call(step.optimizer.step)

    names = [name for name, _ in Net().named_parameters()]
    sizes = bucket_bytes(Net().parameters())
    plans = plan_of(Net().parameters(), SMALL_BUCKET_MB)
    number = next(n for n, plan in enumerate(plans) if names.index("bias") in [slot.index for slot in plan.slots])
    found = run(size, body)
    assert kinds(found) == [HEADER, "all_gather"]
    assert found[1].bytes == sizes[number]


@BLOCKING
@pytest.mark.parametrize("size", MANY)
def test_second_backward_before_step_reduces_again(size: int, blocking: bool) -> None:
    def body(step: Step) -> list[list[Operation]]:
        return [step.backward(0), step.backward(2), step.call(step.optimizer.step)]

    first, second, update = run(size, body, blocking=blocking)
    assert first == second
    assert kinds(update) == [HEADER]


@pytest.mark.parametrize("size", MANY)
def test_closure_takes_one_header_per_evaluation(size: int) -> None:
    """Beside that of its backward: the header of the closure carries the loss."""

    def body(step: Step) -> list[str]:
        def closure() -> torch.Tensor:
            step.optimizer.zero_grad()
            loss = step.net(step.net.batch(0, size).part(step.comm.rank, size))
            loss.backward()
            return loss

        return kinds(step.call(lambda: step.optimizer.step(closure)))

    reductions = ["all_gather"] * len(bucket_bytes(Net().parameters()))
    assert run(size, body) == [HEADER, *reductions, HEADER]


@pytest.mark.parametrize("size", MANY)
def test_reductions_start_before_backward_ends(size: int) -> None:
    """The first bucket travels while later gradients are still to come, so that both can go on at once."""
    world = ThreadWorld(size)

    def body(comm: Communicator) -> list[int]:
        parameters = [torch.nn.Parameter(torch.ones(40)) for _ in range(4)]
        optimizer = DataParallelOptimizer(torch.optim.SGD(parameters), False, comm=comm, bucket_mb=1e-4)

        def reductions() -> int:
            return sum(event.rank == comm.rank and event.kind == "all_gather" for event in list(world.events))

        before = reductions()
        started: list[int] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda _: started.append(reductions() - before))
        product = torch.ones(40)
        for parameter in parameters:
            product = product * parameter
        product.sum().backward()
        optimizer.step()
        return started

    # The hook that counts runs after that of the optimizer, and its own parameter's bucket leaves after both: a user's
    # hook always sees the local gradient.
    assert world.run(body) == [[0, 1, 2, 3]] * size
