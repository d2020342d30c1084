"""Gradients that come in unusual ways: not at all, twice, with a history, in another layout, too early, too late."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import heatopt
from tests.ranks._training import (
    TINY,
    Batch,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    fill,
    generator,
    gradients,
    loss_of,
    net,
    reference,
    sgd,
    train,
    whole,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

buckets = pytest.mark.parametrize("bucket_mb", [TINY, 8], ids=["many-buckets", "one-bucket"])
blocking = pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])


class Branches(nn.Module):
    """A common trunk and branches of which a call uses one; nothing uses the last one."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.branches = nn.ModuleList(nn.Linear(5, 3) for _ in range(count))
        fill(self.double())

    def forward(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        return self.branches[branch](torch.tanh(self.trunk(x)))


def branch_loss(model: nn.Module, data: Batch, branch: int) -> torch.Tensor:
    return (model(data[0], branch) - data[1]).square().mean()


@blocking
@buckets
def test_t01_branch_chosen_by_rank_and_step(ranks: Ranks, bucket_mb: float, blocking: bool) -> None:
    """A branch that no rank used keeps no gradient, so AdamW leaves it alone; one that some used is divided by all."""

    def choice(step: int, rank: int) -> int:
        return (step * rank) % 3  # step 0: all use branch 0

    def body(comm: Communicator) -> None:
        model, expected = Branches(), Branches()
        optimizer = wrap(comm, adamw, model, bucket_mb=bucket_mb, blocking=blocking)
        plain = adamw(expected)
        for step in range(4):
            optimizer.zero_grad()
            plain.zero_grad()
            branch_loss(model, batch(step, comm.rank), choice(step, comm.rank)).backward()
            parts = [branch_loss(expected, batch(step, rank), choice(step, rank)) for rank in range(comm.size)]
            (torch.stack(parts).sum() / comm.size).backward()
            for parameter, wanted in zip(model.parameters(), expected.parameters(), strict=True):
                assert (parameter.grad is None) == (wanted.grad is None)
                if parameter.grad is not None:
                    assert_close(parameter.grad, wanted.grad)
            optimizer.step()
            plain.step()
        never = model.branches[3]
        assert never.weight.grad is None
        assert never.weight not in optimizer.state
        assert_equal(never, Branches().branches[3])
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@buckets
def test_t01_rank_whose_loss_touches_no_parameter(ranks: Ranks, bucket_mb: float) -> None:
    """Each rank in turn has nothing to learn, or calls no backward at all; the divisor stays the number of ranks."""

    def body(comm: Communicator) -> None:
        for idle in range(comm.size):
            model, expected = net(), net()
            optimizer, plain = wrap(comm, adamw, model, bucket_mb=bucket_mb), adamw(expected)
            for step in range(3):
                optimizer.zero_grad()
                plain.zero_grad()
                if comm.rank != idle:
                    loss_of(model, batch(step, comm.rank)).backward()
                elif step == 1:
                    torch.ones(2, requires_grad=True).sum().backward()
                optimizer.step()
                busy = [rank for rank in range(comm.size) if rank != idle]
                if busy:
                    (loss_of(expected, whole(step, busy)) * len(busy) / comm.size).backward()
                plain.step()
            assert_close(model, expected)
            assert_close(optimizer, plain)
            assert_ranks_equal(comm, model, optimizer)
            del optimizer

    ranks(body)


def test_t01_first_and_last_parameters_unused(ranks: Ranks) -> None:
    """On one rank the first bucket to be launched never fills, on another one the last."""

    def body(comm: Communicator) -> None:
        layers = [nn.Parameter(torch.full((3,), float(n + 1), dtype=torch.float64)) for n in range(6)]
        optimizer = heatopt.DataParallelOptimizer(torch.optim.AdamW(layers, lr=0.1), comm=comm, bucket_mb=TINY)
        used = [[0, 1, 2], [2, 3, 4], [1, 3]]
        torch.stack([layers[n] for n in used[comm.rank % 3]]).sum().backward()
        for n, layer in enumerate(layers):
            users = sum(n in used[rank % 3] for rank in range(comm.size))
            if users:
                assert_equal(layer.grad, torch.full((3,), float(users), dtype=torch.float64) / comm.size)
            else:
                assert layer.grad is None
        optimizer.step()
        assert_ranks_equal(comm, layers)
        assert_equal(layers[5], torch.full((3,), 6.0, dtype=torch.float64))

    ranks(body)


def test_more_buckets_than_bits_in_a_header(ranks: Ranks) -> None:
    """Two hundred buckets; ranks use and set some of them only, far ones too."""

    def body(comm: Communicator) -> None:
        count = 200
        layers = [nn.Parameter(torch.full((2,), float(n), dtype=torch.float64)) for n in range(count)]
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(layers, lr=1.0), comm=comm, bucket_mb=TINY / 10)
        used = range(comm.rank, count - 10, 3)
        torch.stack([layers[n] * (n + 1) for n in used]).sum().backward()
        by_hand = {7: 70.0, 68: 680.0, 129: 1290.0, count - 1: 1.0}
        for number, value in by_hand.items():
            if comm.rank == comm.size - 1:
                layers[number].grad = torch.full((2,), value, dtype=torch.float64)
        expected = [
            sum(n + 1.0 for r in range(comm.size) if n in range(r, count - 10, 3)) / comm.size for n in range(count)
        ]
        for number, value in by_hand.items():
            # The other ranks have the average of the backward there, or nothing.
            expected[number] = (expected[number] * (comm.size - 1) + value) / comm.size
        optimizer.step()
        for n, layer in enumerate(layers):
            assert_close(layer, torch.full((2,), n - expected[n], dtype=torch.float64))
            assert (layer.grad is None) == (expected[n] == 0)
        assert_ranks_equal(comm, layers)

    ranks(body)


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


# Freezing


@buckets
def test_t16_freezing_and_unfreezing(ranks: Ranks, bucket_mb: float) -> None:
    """A parameter that was frozen at construction, one that is frozen for a while, and all of them together."""

    def run(make: Callable[[nn.Module], torch.optim.Optimizer], data: Callable[[int], Batch]) -> Any:
        model = net()
        model[0].weight.requires_grad_(False)
        model[4].bias.requires_grad_(False)
        optimizer = make(model)
        for step in range(6):
            if step == 1:
                model[4].bias.requires_grad_(True)  # was frozen at construction
                model[2].weight.requires_grad_(False)
            if step == 3:
                model[2].weight.requires_grad_(True)
                model[0].weight.requires_grad_(True)
            if step == 4:
                model[2].requires_grad_(False)
                model[2].weight.grad = None
            train(optimizer, model, [data(step)])
        return model, optimizer

    def body(comm: Communicator) -> None:
        model, optimizer = run(lambda m: wrap(comm, adamw, m, bucket_mb=bucket_mb), lambda s: batch(s, comm.rank))
        expected, plain = run(adamw, lambda step: whole(step, comm.size))
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t16_everything_frozen_at_construction(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        model.requires_grad_(False)
        optimizer = wrap(comm, adamw, model)
        optimizer.step()
        assert not optimizer.state
        model.requires_grad_(True)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        assert_close(optimizer, reference(adamw, expected, comm.size, 2))
        assert_close(model, expected)

    ranks(body)


def test_t16_frozen_on_one_rank_only(ranks: Ranks) -> None:
    """There it counts as zero; all ranks apply the same average."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        last = comm.size - 1
        if comm.rank == last:
            model[2].weight.requires_grad_(False)
        train(optimizer, model, [batch(0, comm.rank)])
        loss_of(expected, whole(0, comm.size)).backward()
        others = net()
        if last:
            loss_of(others, whole(0, last)).backward()
            expected[2].weight.grad = others[2].weight.grad * last / comm.size
            plain.step()
            assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t16_unfrozen_on_one_rank_only(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        layers = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
        layers[1].requires_grad_(False)
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(layers, lr=1.0), comm=comm, bucket_mb=TINY)
        if comm.rank == comm.size - 1:
            layers[1].requires_grad_(True)
        (layers[0] + layers[1]).sum().backward()
        optimizer.step()
        assert_close(layers, [torch.zeros(2).double(), torch.full((2,), 1 - 1 / comm.size, dtype=torch.float64)])
        assert_ranks_equal(comm, layers)

    ranks(body)


# Between backward and step

Between = Callable[[torch.optim.Optimizer, nn.Module], None]


def _clear(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad(set_to_none=True)


def _zero(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad(set_to_none=False)


def _drop_all(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _drop_some(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    model[0].weight.grad = None
    model[4].bias.grad = None


def _clip(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def _clip_values(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def _scale(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad *= 0.5


def _detach(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad.detach_()


def _replace(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.grad * 0.5


def _drop_and_replace(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Neighbours in one bucket: the one that is gone must not come back when the other one is averaged."""
    model[0].weight.grad = None
    model[0].bias.grad = model[0].bias.grad * 0.5


def _replace_data(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad.data = parameter.grad.data * 0.5


@blocking
@pytest.mark.parametrize(
    "between",
    [
        _clear,
        _zero,
        _drop_all,
        _drop_some,
        _clip,
        _clip_values,
        _scale,
        _detach,
        _replace,
        _drop_and_replace,
        _replace_data,
    ],
    ids=lambda between: between.__name__[1:],
)
def test_t31_between_backward_and_step(ranks: Ranks, between: Between, blocking: bool) -> None:
    """What users do with gradients before step() has the effect that it has in one process; one rank is late."""

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Batch], late: bool) -> None:
        for step in range(2):
            optimizer.zero_grad()
            if late:
                time.sleep(0.003)
            loss_of(model, data(step)).backward()
            between(optimizer, model)
            optimizer.step()

    def body(comm: Communicator) -> None:
        for bucket_mb in (TINY, 8):
            model, expected = net(), net()
            optimizer = wrap(comm, adamw, model, blocking=blocking, bucket_mb=bucket_mb)
            plain = adamw(expected)
            run(optimizer, model, lambda step: batch(step, comm.rank), comm.rank == comm.size - 1)
            run(plain, expected, lambda step: whole(step, comm.size), False)
            assert_close(model, expected)
            assert_close(optimizer, plain)
            assert_ranks_equal(comm, model, optimizer)
            del optimizer

    ranks(body)


@blocking
def test_t31_kept_gradient_is_the_users(ranks: Ranks, blocking: bool) -> None:
    """Step leaves gradients as they are, and a clone of them outlives the next backward."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model, blocking=blocking)
        loss_of(model, batch(0, comm.rank)).backward()
        kept = gradients(model)
        before = [p.grad for p in model.parameters()]
        optimizer.step()
        assert_equal(before, kept)
        optimizer.zero_grad()
        train(optimizer, model, [batch(1, comm.rank)])
        first = net()
        loss_of(first, whole(0, comm.size)).backward()
        assert_close(kept, gradients(first))

    ranks(body)


# Histories and layouts


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_t32_gradients_with_a_history(ranks: Ranks) -> None:
    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Batch]) -> None:
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, data(step)).backward(create_graph=True)
            optimizer.step()
        optimizer.zero_grad()  # breaks the cycle of parameter and gradient

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        run(wrap(comm, sgd, model), model, lambda step: batch(step, comm.rank))
        run(sgd(expected), expected, lambda step: whole(step, comm.size))
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t32_gradient_penalty(ranks: Ranks) -> None:
    """Double backward, as in WGAN-GP: the inner derivative is taken without hooks, the outer one fires them."""

    def loss_with_penalty(model: nn.Module, data: Batch) -> torch.Tensor:
        x = data[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean() + loss_of(model, data)

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], Batch]) -> None:
        for step in range(3):
            optimizer.zero_grad()
            loss_with_penalty(model, data(step)).backward()
            optimizer.step()

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        run(wrap(comm, adamw, model), model, lambda step: batch(step, comm.rank))
        run(adamw(expected), expected, lambda step: whole(step, comm.size))
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t32_gradient_with_a_history_set_by_hand(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
        parameter.grad = parameter * (comm.rank + 1)
        assert parameter.grad.requires_grad
        optimizer.step()
        assert_close(parameter, torch.full((3,), 1 - (comm.size + 1) / 2, dtype=torch.float64))

    ranks(body)


@blocking
@buckets
def test_t32_layouts(ranks: Ranks, bucket_mb: float, blocking: bool) -> None:
    """Channels last, transposed parameters, expanded and permuted gradients."""

    class Layouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(2, 3, 2)
            self.turned = nn.Parameter(torch.empty(5, 3).T)
            self.gaps = nn.Parameter(torch.empty(4, 6)[:, ::2])
            self.summed = nn.Parameter(torch.empty(3, 5))
            self.expanded = nn.Parameter(torch.empty(7))
            fill(self.double())
            self.convolution.to(memory_format=torch.channels_last)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            images = x.view(-1, 2, 2, 2).contiguous(memory_format=torch.channels_last)
            hidden = self.convolution(images).flatten(1)
            return hidden @ self.turned + (hidden @ self.summed) ** 2 + self.gaps.mean() ** 2 + self.expanded.sum()

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, data: Callable[[int], torch.Tensor]) -> None:
        for step in range(3):
            optimizer.zero_grad()
            (model(data(step)).square().mean() + model.expanded.sum()).backward()
            optimizer.step()

    def inputs(step: int, rank: int) -> torch.Tensor:
        return torch.randn(4, 8, generator=generator(step * 100 + rank), dtype=torch.float64)

    def body(comm: Communicator) -> None:
        model, expected = Layouts(), Layouts()
        strides = [p.stride() for p in model.parameters()]
        optimizer, plain = wrap(comm, adamw, model, bucket_mb=bucket_mb, blocking=blocking), adamw(expected)
        run(optimizer, model, lambda step: inputs(step, comm.rank))
        run(plain, expected, lambda step: torch.cat([inputs(step, rank) for rank in range(comm.size)]))
        assert [p.stride() for p in model.parameters()] == strides
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t32_expanded_gradient_set_by_hand(ranks: Ranks) -> None:
    """Its elements share one memory cell, so nothing may be written through it."""

    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
        given = torch.tensor(comm.rank + 1.0, dtype=torch.float64)
        parameter.grad = given.expand(3, 4)
        optimizer.step()
        assert_close(parameter, torch.full((3, 4), -(comm.size + 1) / 2, dtype=torch.float64))
        assert given.item() == comm.rank + 1.0 or comm.size == 1

    ranks(body)
