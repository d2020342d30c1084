"""Between the first gradient of a pass and its end hooks find what torch would leave there, and may use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from heatopt.optim import DataParallelOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from heatopt.comm import Communicator
    from tests.support.ranks import Ranks

TURNS = range(1, 6)


def parameters_of(count: int) -> list[nn.Parameter]:
    """Of no dimension, empty, and of up to three elements."""
    return [nn.Parameter(torch.full((k % 4,) if k % 5 else (), float(k), dtype=torch.float64)) for k in range(count)]


def wrap(parameters: list[nn.Parameter], comm: Communicator, bucket_mb: float) -> DataParallelOptimizer:
    return DataParallelOptimizer(torch.optim.SGD(parameters, lr=0.5), blocking=True, comm=comm, bucket_mb=bucket_mb)


def on_each_gradient(parameter: nn.Parameter, hook: Callable[[nn.Parameter], object]) -> None:
    register: Any = parameter.register_post_accumulate_grad_hook
    register(hook)


# One bucket for all, and one for each.
bucket_sizes = pytest.mark.parametrize("bucket_mb", [1, 1e-6])


@bucket_sizes
def test_what_no_rank_has_reached_has_no_gradient(ranks: Ranks, bucket_mb: float) -> None:
    """In none of the steps, whatever it had before; what some ranks reach is the mean with the others' zeros."""
    count = 9

    def reached(turn: int, rank: int) -> set[int]:
        return {k for k in range(count) if turn % 3 or k % 3 == rank or k % 4 == 3}

    def body(comm: Communicator) -> None:
        parameters = parameters_of(count)
        optimizer = wrap(parameters, comm, bucket_mb)
        for turn in range(1, 8):
            optimizer.zero_grad()
            sum((comm.rank + turn + k) * parameters[k].sum() for k in reached(turn, comm.rank)).backward()  # type: ignore[union-attr]
            for k, parameter in enumerate(parameters):
                made = [rank + turn + k for rank in range(comm.size) if k in reached(turn, rank)]
                if made:
                    assert parameter.grad is not None
                    assert torch.equal(parameter.grad, torch.full_like(parameter, sum(made) / comm.size))
                else:
                    assert parameter.grad is None
            optimizer.step()

    ranks(body)


@bucket_sizes
@pytest.mark.parametrize("keep", [lambda p: p.grad, lambda p: p.grad.detach(), lambda p: p.grad.view(-1)[:1]])
def test_a_hook_may_keep_each_gradient_as_it_comes(ranks: Ranks, keep: Any, bucket_mb: float) -> None:
    """Before the reduction it has the local ones."""

    def body(comm: Communicator) -> None:
        parameters = parameters_of(6)
        kept: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        for parameter in parameters:
            on_each_gradient(parameter, lambda p: kept.append((p, keep(p), keep(p).clone())))
        optimizer = wrap(parameters, comm, bucket_mb)
        for turn in TURNS:
            optimizer.zero_grad()
            kept.clear()
            sum((comm.rank + turn) * p.sum() for p in parameters).backward()  # type: ignore[union-attr]
            assert len(kept) == len(parameters)
            for parameter, gradient, copy in kept:
                assert torch.equal(copy, torch.full_like(copy, float(comm.rank + turn)))
                assert torch.equal(gradient, copy)
                assert torch.equal(parameter.grad, torch.full_like(parameter, turn + (comm.size - 1) / 2))  # type: ignore[arg-type]
            optimizer.step()

    ranks(body)


def test_hooks_may_scale_what_they_have_collected(ranks: Ranks) -> None:
    """The last one of the pass has all gradients, changes them, and the changed ones are averaged."""

    def body(comm: Communicator) -> None:
        parameters = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)]
        collected: list[torch.Tensor] = []

        def collect(parameter: nn.Parameter) -> None:
            collected.append(parameter.grad)  # type: ignore[arg-type]
            if len(collected) == len(parameters):
                torch._foreach_mul_(collected, 0.5)
                collected.clear()

        for parameter in parameters:
            on_each_gradient(parameter, collect)
        optimizer = wrap(parameters, comm, 1)
        for turn in TURNS:
            optimizer.zero_grad()
            sum((comm.rank + turn) * p.sum() for p in parameters).backward()  # type: ignore[union-attr]
            for parameter in parameters:
                assert torch.equal(parameter.grad, torch.full_like(parameter, (turn + (comm.size - 1) / 2) / 2))  # type: ignore[arg-type]
            optimizer.step()

    ranks(body)


def test_hooks_may_clip_what_is_there(ranks: Ranks) -> None:
    """Those that have come; no others come into being by that."""

    def body(comm: Communicator) -> None:
        parameters = parameters_of(6)
        for parameter in parameters:
            on_each_gradient(parameter, lambda _: torch.nn.utils.clip_grad_value_(parameters, 1.0))
        optimizer = wrap(parameters, comm, 1)
        for turn in TURNS:
            optimizer.zero_grad()
            used = parameters if turn % 2 else parameters[:4]
            sum((comm.rank + turn) * p.sum() for p in used).backward()  # type: ignore[union-attr]
            assert [p.grad is None for p in parameters] == [False] * 4 + [turn % 2 == 0] * 2
            assert all(torch.equal(p.grad, torch.ones_like(p).clamp(max=turn + comm.rank)) for p in used)  # type: ignore[arg-type]
            optimizer.step()

    ranks(body)


def test_what_an_interrupted_pass_did_not_reach_has_no_gradient(ranks: Ranks) -> None:
    """Whoever catches the exception sees what torch would leave."""

    def body(comm: Communicator) -> None:
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        parameters = [*first.parameters(), *second.parameters()]
        optimizer = wrap(parameters, comm, 1)
        fails = False

        def fail(gradient: torch.Tensor) -> None:
            if fails:
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

    ranks(body)
