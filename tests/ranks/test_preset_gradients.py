"""Small gradients that backward adds to what lies in the bucket: nobody sees a difference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from heatopt.optim import DataParallelOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from heatopt.comm import Communicator
    from tests.support.ranks import Ranks


def parameters_of(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((k % 4,) if k % 5 else (), float(k), dtype=torch.float64)) for k in range(count)]


def wrap(parameters: list[nn.Parameter], comm: Communicator, **options: Any) -> DataParallelOptimizer:
    inner = torch.optim.SGD(parameters, lr=0.5)
    return DataParallelOptimizer(inner, comm=comm, blocking=True, bucket_mb=1, **options)


def bucket_of(optimizer: DataParallelOptimizer) -> Any:
    (bucket,) = optimizer._gradients._plan.buckets  # type: ignore[attr-defined]
    return bucket


def on_each_gradient(parameter: nn.Parameter, hook: Callable[[torch.Tensor], object]) -> None:
    register: Any = parameter.register_post_accumulate_grad_hook
    register(hook)


def is_preset(optimizer: DataParallelOptimizer) -> bool:
    return bucket_of(optimizer)._preset is not None


def test_each_rank_reaches_what_it_reaches(ranks: Ranks) -> None:
    """A parameter that no rank reached has no gradient; one that some did, the mean with the others' zeros."""
    count = 9
    whole = set(range(count))

    def reached(turn: int, rank: int) -> set[int]:
        return {k for k in whole if turn % 3 or k % 3 == rank or k % 4 == 3}

    def body(comm: Communicator) -> None:
        parameters = parameters_of(count)
        optimizer = wrap(parameters, comm)
        used = []
        on_each_gradient(parameters[3], lambda _: used.append(is_preset(optimizer)))
        for turn in range(1, 8):
            optimizer.zero_grad()
            own = reached(turn, comm.rank)
            sum((comm.rank + turn + k) * parameters[k].sum() for k in own).backward()  # type: ignore[union-attr]
            for k, parameter in enumerate(parameters):
                made = [rank + turn + k if k in reached(turn, rank) else 0 for rank in range(comm.size)]
                if any(k in reached(turn, rank) for rank in range(comm.size)):
                    assert parameter.grad is not None
                    assert torch.equal(parameter.grad, torch.full_like(parameter, sum(made) / comm.size))
                else:
                    assert parameter.grad is None
            optimizer.step()
        # Not in the first pass, nor after one in which some had none on all ranks.
        missed = any(all(k not in reached(3, rank) for rank in range(comm.size)) for k in range(count))
        assert used == [False, True, True, not missed, True, True, not missed]

    ranks(body, min_size=2)


def test_the_sign_of_nothing_but_zero_changes(ranks: Ranks) -> None:
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -1.5]

    def body(comm: Communicator) -> None:
        parameters = [nn.Parameter(torch.zeros(len(special), dtype=torch.float64)) for _ in range(3)]
        optimizer = wrap(parameters, comm)
        gradient = torch.tensor(special, dtype=torch.float64)
        for _ in range(3):
            optimizer.zero_grad()
            sum((gradient * parameter).sum() for parameter in parameters).backward()  # type: ignore[union-attr]
            for parameter in parameters:
                expected = gradient * comm.size / comm.size
                assert torch.equal(parameter.grad.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))  # type: ignore[union-attr]

    ranks(body, min_size=2)


def test_a_hook_may_keep_each_gradient_as_it_comes(ranks: Ranks) -> None:
    """It has the local ones, for good; and new memory is not made in every step."""

    def body(comm: Communicator) -> None:
        parameters = parameters_of(6)
        optimizer = wrap(parameters, comm)
        kept: list[Any] = []
        for parameter in parameters:
            on_each_gradient(parameter, lambda p: kept.append((p, p.grad)))
        memories = []
        for turn in range(1, 6):
            optimizer.zero_grad()
            kept.clear()
            sum((comm.rank + turn) * p.sum() for p in parameters).backward()  # type: ignore[union-attr]
            assert len(kept) == len(parameters)
            for parameter, gradient in kept:
                assert torch.equal(gradient, torch.full_like(parameter, float(comm.rank + turn)))
                assert torch.equal(parameter.grad, torch.full_like(parameter, turn + (comm.size - 1) / 2))
            optimizer.step()
            memories.append(bucket_of(optimizer))
        assert all(memory is memories[-1] for memory in memories[2:])

    ranks(body, min_size=2)


def test_what_an_interrupted_pass_did_not_reach_has_no_gradient(ranks: Ranks) -> None:
    """At once: whoever catches the exception sees what torch would leave."""

    def body(comm: Communicator) -> None:
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        parameters = [*first.parameters(), *second.parameters()]
        optimizer = wrap(parameters, comm)
        fails = False

        def fail(gradient: torch.Tensor) -> None:
            if fails:
                assert is_preset(optimizer)
                raise ZeroDivisionError

        def backward() -> None:
            hidden = first(torch.full((1, 3), float(comm.rank)))
            hidden.register_hook(fail)
            second(hidden).sum().backward()

        for fails in (False, True, False):
            optimizer.zero_grad()
            if fails:
                with pytest.raises(ZeroDivisionError):
                    backward()
                assert [p.grad is None for p in parameters] == [True, True, False, False]
                optimizer.zero_grad()
            else:
                backward()
                optimizer.step()
        gathered = comm.all_gather_object([p.detach() for p in parameters])
        for row in gathered:
            assert all(map(torch.equal, row, gathered[0]))

    ranks(body, min_size=2)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_create_graph(ranks: Ranks) -> None:
    """Then autograd adds out of place, and the sum has a graph."""

    def body(comm: Communicator) -> None:
        parameters = [nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64)) for _ in range(3)]
        optimizer = wrap(parameters, comm)
        for turn in range(3):
            optimizer.zero_grad()
            loss = sum((comm.rank + 1) * p.pow(3).sum() for p in parameters)
            loss.backward(create_graph=turn > 0)  # type: ignore[union-attr]
            for parameter in parameters:
                assert torch.equal(parameter.grad, torch.full_like(parameter, 12.0 * (comm.size + 1) / 2))  # type: ignore[arg-type]

    ranks(body, min_size=2)
