"""Tied parameters, and hooks that fire several times in one backward (T7)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.ranks._training import (
    TINY,
    Batch,
    adamw,
    assert_close,
    assert_ranks_equal,
    batch,
    fill,
    generator,
    gradients,
    net,
    sgd,
    whole,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


buckets = pytest.mark.parametrize("bucket_mb", [TINY, 8], ids=["many-buckets", "one-bucket"])
blocking = pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])


class Tied(nn.Module):
    """A language model in small: the output's matrix is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight
        fill(self.double())

    def forward(self, tokens: torch.Tensor, run: Callable[..., torch.Tensor] | None) -> torch.Tensor:
        def inside(hidden: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.middle(hidden)) @ self.embedding.weight.T @ self.embedding.weight

        hidden = self.embedding(tokens)
        for _ in range(2):  # the same modules twice
            hidden = inside(hidden) if run is None else run(inside, hidden)
        return self.output(hidden)


def tied_loss(model: Tied, step: int, rank_list: list[int], run: Callable[..., torch.Tensor] | None) -> torch.Tensor:
    tokens = torch.cat([torch.randint(7, (5, 6), generator=generator(100 * step + rank)) for rank in rank_list])
    return nn.functional.cross_entropy(model(tokens[:, :-1], run).flatten(0, 1), tokens[:, 1:].flatten())


def reentrant(function: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    return checkpoint(function, hidden, use_reentrant=True)


def not_reentrant(function: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    return checkpoint(function, hidden, use_reentrant=False)


@blocking
@buckets
@pytest.mark.parametrize("run", [None, not_reentrant, reentrant], ids=["plain", "checkpoint", "reentrant"])
def test_t07_tied_parameters_checkpoint(
    ranks: Ranks, run: Callable[..., torch.Tensor] | None, bucket_mb: float, blocking: bool
) -> None:
    """One slot and one average, though hooks fire several times in one backward where checkpoints are nested in it."""

    def body(comm: Communicator) -> None:
        model, expected = Tied(), Tied()
        optimizer = wrap(comm, adamw, model, bucket_mb=bucket_mb, blocking=blocking)
        plain = adamw(expected)
        for step in range(2):
            optimizer.zero_grad()
            plain.zero_grad()
            tied_loss(model, step, [comm.rank], run).backward()
            tied_loss(expected, step, list(range(comm.size)), None).backward()
            found = [p.grad for p in model.parameters()]
            assert_close(found, [p.grad for p in expected.parameters()])
            assert_ranks_equal(comm, found)
            optimizer.step()
            plain.step()
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)
        assert model.output.weight is model.embedding.weight

    ranks(body)


def test_t07_nested_reentrant_checkpoints(ranks: Ranks) -> None:
    """A checkpoint inside a checkpoint: three backward passes, one within the other, end together."""

    def run(function: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        return reentrant(lambda h: reentrant(function, h), hidden)

    def body(comm: Communicator) -> None:
        model, expected = Tied(), Tied()
        optimizer = wrap(comm, sgd, model)
        tied_loss(model, 0, [comm.rank], run).backward()
        tied_loss(expected, 0, list(range(comm.size)), None).backward()
        assert_close(gradients(model), gradients(expected))
        optimizer.step()
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t07_reentrant_checkpoint_on_one_rank_only(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = Tied(), Tied()
        optimizer = wrap(comm, sgd, model)
        tied_loss(model, 0, [comm.rank], reentrant if comm.rank == 0 else None).backward()
        tied_loss(expected, 0, list(range(comm.size)), None).backward()
        optimizer.synchronize()  # the others do not know that rank 0's hooks fired again
        assert_close(gradients(model), gradients(expected))
        optimizer.step()
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t07_backward_inside_backward(ranks: Ranks) -> None:
    """A function whose backward differentiates another loss of the same parameters."""

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.weight = weight
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            with torch.enable_grad():
                (ctx.weight.square().sum() * 0.5).backward()
            return gradient, None

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Batch) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            hidden = Inner.apply(model[0](data[0]), model[2].weight)
            (model[4](torch.tanh(model[2](torch.tanh(hidden)))) - data[1]).square().mean().backward()
            optimizer.step()

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        run(wrap(comm, sgd, model), model, batch(0, comm.rank))
        run(sgd(expected), expected, whole(0, comm.size))
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("how", ["no_sync", "accumulation_steps"])
def test_t07_t08_accumulation_over_reentrant_checkpoints(ranks: Ranks, how: str) -> None:
    """Hooks fire several times in one backward, which counts as one all the same."""

    def body(comm: Communicator) -> None:
        model, expected = Tied(), Tied()
        optimizer = wrap(comm, adamw, model, accumulation_steps=1 if how == "no_sync" else 3)
        plain = adamw(expected)
        for step in range(2):
            optimizer.zero_grad()
            plain.zero_grad()
            for call in range(3):
                local = optimizer.no_sync() if how == "no_sync" and call < 2 else contextlib.nullcontext()
                with local:
                    tied_loss(model, 10 * step + call, [comm.rank], reentrant).backward()
                tied_loss(expected, 10 * step + call, list(range(comm.size)), None).backward()
                if call < 2:
                    alone = Tied()
                    alone.load_state_dict(model.state_dict())
                    for number in range(call + 1):
                        tied_loss(alone, 10 * step + number, [comm.rank], None).backward()
                    assert_close(gradients(model), gradients(alone))
            assert_close(gradients(model), gradients(expected))
            optimizer.step()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@pytest.mark.parametrize("kind", ["whole model", "input with gradient", "segments"])
def test_t07_checkpoint_of_everything(ranks: Ranks, kind: str) -> None:
    """The outer backward has no parameter of its own, so hooks fire in the inner ones only."""

    def loss(model: nn.Module, data: Batch) -> torch.Tensor:
        x = data[0].clone().requires_grad_()
        if kind == "segments":
            found = checkpoint_sequential(model, 3, x, use_reentrant=True)
        else:
            found = reentrant(model, x * 1 if kind == "whole model" else x)
        return (found - data[1]).square().mean()

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Batch]) -> None:
        for step in range(3):
            optimizer.zero_grad()
            loss(model, data(step)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # right only if gradients are final by now
            optimizer.step()

    def body(comm: Communicator) -> None:
        for bucket_mb in (TINY, 8):
            model, expected = net(), net()
            run(wrap(comm, adamw, model, bucket_mb=bucket_mb), model, lambda step: batch(step, comm.rank))
            run(adamw(expected), expected, lambda step: whole(step, comm.size))
            assert_close(model, expected)
            assert_ranks_equal(comm, model)

    ranks(body)


def test_t07_duplicates_in_groups_are_torchs_affair(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": [model[0].weight]})

    ranks(body)
