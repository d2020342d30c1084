"""Several optimizers beside each other: adversaries, heads that some ranks use, groups of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._training import (
    TINY,
    Batch,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    every_mode,
    fill,
    generator,
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

Optimizers = Sequence[torch.optim.Optimizer]


class Adversaries:
    """A small GAN: noise -> generator -> discriminator."""

    def __init__(self) -> None:
        self.generator = fill(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)).double(), 1)
        self.discriminator = fill(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double(), 2)

    @property
    def models(self) -> list[nn.Module]:
        return [self.generator, self.discriminator]

    def noise(self, step: int, rank_list: Sequence[int]) -> torch.Tensor:
        parts = [torch.randn(4, 2, generator=generator(5000 + 100 * step + r), dtype=torch.float64) for r in rank_list]
        return torch.cat(parts)

    def step(self, optimizers: Optimizers, step: int, rank_list: Sequence[int], freeze: bool) -> None:
        generators, discriminators = optimizers
        real, noise = whole(step, rank_list)[0], self.noise(step, rank_list)
        for number in range(2):  # two steps of the one for each step of the other
            discriminators.zero_grad()
            # Without detach(): the generator gets gradients too, which nobody uses.
            fake = self.generator(noise + number)
            score = nn.functional.softplus(self.discriminator(fake)).mean()
            score = score + nn.functional.softplus(-self.discriminator(real)).mean()
            score.backward()
            discriminators.step()
        generators.zero_grad()
        if freeze:
            self.discriminator.requires_grad_(False)
        nn.functional.softplus(-self.discriminator(self.generator(noise))).mean().backward()
        generators.step()
        if freeze:
            self.discriminator.requires_grad_(True)


@every_mode
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "not-frozen"])
def test_adversaries(ranks: Ranks, freeze: bool, mode: dict[str, Any]) -> None:
    def body(comm: Communicator) -> None:
        one, other = Adversaries(), Adversaries()
        optimizers = [wrap(comm, adamw, one.generator, **mode), wrap(comm, adamw, one.discriminator, **mode)]
        plain = [adamw(other.generator), adamw(other.discriminator)]
        for step in range(3):
            one.step(optimizers, step, [comm.rank], freeze)
            other.step(plain, step, range(comm.size), freeze)
        for found, wanted in zip([*one.models, *optimizers], [*other.models, *plain], strict=True):
            assert_close(found, wanted)
        assert_ranks_equal(comm, *one.models, *optimizers)

    ranks(body)


class Heads(nn.Module):
    """A trunk and two heads, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))])
        fill(self.double())

    def loss(self, data: Batch, head: int) -> torch.Tensor:
        return (self.heads[head](torch.tanh(self.trunk(data[0]))) - data[1]).square().mean()

    def parts(self) -> list[nn.Module]:
        return [self.trunk, *self.heads]


HEAD_OF: dict[str, Callable[[int, int], int]] = {
    "by rank": lambda rank, step: rank % 2,
    "by step": lambda rank, step: step % 2,
    "by both": lambda rank, step: (rank + step) % 2,
    "one rank apart": lambda rank, step: int(rank == 0),
}


@every_mode
@pytest.mark.parametrize("choice", HEAD_OF)
def test_heads_that_some_ranks_use(ranks: Ranks, choice: str, mode: dict[str, Any]) -> None:
    head_of = HEAD_OF[choice]

    def body(comm: Communicator) -> None:
        model, expected = Heads(), Heads()
        optimizers = [wrap(comm, adamw, part, **mode) for part in model.parts()]
        plain = [adamw(part) for part in expected.parts()]
        for step in range(4):
            for optimizer in (*optimizers, *plain):
                optimizer.zero_grad()
            model.loss(batch(step, comm.rank), head_of(comm.rank, step)).backward()
            losses = [expected.loss(batch(step, rank), head_of(rank, step)) for rank in range(comm.size)]
            (torch.stack(losses).sum() / comm.size).backward()
            for one, other in zip(model.parameters(), expected.parameters(), strict=True):
                assert (one.grad is None) == (other.grad is None)
            for optimizer in (*optimizers, *plain):
                optimizer.step()
        assert_close(model, expected)
        for optimizer, wanted in zip(optimizers, plain, strict=True):
            assert_close(optimizer, wanted)
        assert_ranks_equal(comm, model, *optimizers)

    ranks(body)


@every_mode
def test_backward_calls_in_another_order_on_each_rank(ranks: Ranks, mode: dict[str, Any]) -> None:
    """Even ranks differentiate the first model first, odd ranks the second one."""

    def body(comm: Communicator) -> None:
        models, expected = [net(), net(seed=1)], [net(), net(seed=1)]
        optimizers = [wrap(comm, sgd, model, **mode) for model in models]
        for step in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for model in models[:: 1 if comm.rank % 2 == 0 else -1]:
                loss_of(model, batch(step, comm.rank)).backward()
            for optimizer in optimizers:
                optimizer.step()
        for model, other in zip(models, expected, strict=True):
            reference(sgd, other, comm.size, 2)
            assert_close(model, other)
        assert_ranks_equal(comm, *models, *optimizers)

    ranks(body)


@every_mode
def test_one_backward_for_two_in_another_order(ranks: Ranks, mode: dict[str, Any]) -> None:
    """In one backward hooks of both fire; which comes first depends on the rank."""

    def loss(models: Sequence[nn.Module], data: Batch, reverse: bool) -> torch.Tensor:
        first, second = models[::-1] if reverse else models
        hidden = torch.cat([first(data[0]), data[0][:, :1]], 1)
        return (second(hidden) - data[1]).square().mean()

    def body(comm: Communicator) -> None:
        models, expected = [net(), net(seed=1)], [net(), net(seed=1)]
        optimizers = [wrap(comm, sgd, model, **mode) for model in models]
        plain = [sgd(model) for model in expected]
        for step in range(2):
            for optimizer in (*optimizers, *plain):
                optimizer.zero_grad()
            loss(models, batch(step, comm.rank), comm.rank % 2 == 1).backward()
            losses = [loss(expected, batch(step, rank), rank % 2 == 1) for rank in range(comm.size)]
            (torch.stack(losses).sum() / comm.size).backward()
            for optimizer in (*optimizers, *plain):
                optimizer.step()
        for model, other in zip(models, expected, strict=True):
            assert_close(model, other)
        assert_ranks_equal(comm, *models)

    ranks(body)


def test_steps_of_one_while_another_has_local_gradients(ranks: Ranks) -> None:
    """One accumulates in no_sync() over several steps of the other."""

    def body(comm: Communicator) -> None:
        models, expected = [net(), net(seed=1)], [net(), net(seed=1)]
        slow, fast = [wrap(comm, sgd, model) for model in models]
        for step in range(3):
            with slow.no_sync():
                loss_of(models[0], batch(step, comm.rank)).backward()
            train(fast, models[1], [batch(step, comm.rank)])
        slow.step()
        plain = sgd(expected[0])
        for step in range(3):
            loss_of(expected[0], whole(step, comm.size)).backward()
        plain.step()
        reference(sgd, expected[1], comm.size, 3)
        for model, other in zip(models, expected, strict=True):
            assert_close(model, other)
        assert_ranks_equal(comm, *models)

    ranks(body)


def test_optimizer_that_is_never_used(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, idle, expected = net(), net(seed=1), net()
        optimizer, unused = wrap(comm, adamw, model), wrap(comm, adamw, idle)
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        assert_close(optimizer, reference(adamw, expected, comm.size, 2))
        assert_close(model, expected)
        assert not unused.state
        assert_equal(idle, net(seed=1))

    ranks(body)


def test_optimizers_that_come_and_go(ranks: Ranks) -> None:
    """Launching early in backward is for one optimizer alone; numbers of deleted ones are not used again."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        for step in range(4):
            other = net(seed=step + 1)
            temporary = wrap(comm, adamw, other) if step % 2 else None
            if temporary is not None:
                train(temporary, other, [batch(step, comm.rank)])
                wanted = net(seed=step + 1)
                reference(adamw, wanted, comm.size, [step])
                assert_close(other, wanted)
            train(optimizer, model, [batch(step, comm.rank)])
            train(plain, expected, [whole(step, comm.size)])
            del temporary
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_groups_of_ranks(ranks: Ranks) -> None:
    """A model for all ranks and, beside it, a model for each half of them."""

    def body(comm: Communicator) -> None:
        half = comm.split(comm.rank % 2, comm.rank)
        members = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
        assert half.size == len(members)
        common, own = net(), net(seed=1 + comm.rank % 2)
        optimizers = [wrap(comm, sgd, common), wrap(half, sgd, own)]
        plain_common, plain_own = net(), net(seed=1 + comm.rank % 2)
        plain = [sgd(plain_common), sgd(plain_own)]
        for step in range(3):
            for optimizer in (*optimizers, *plain):
                optimizer.zero_grad()
            loss_of(common, batch(step, comm.rank)).backward()
            loss_of(own, batch(step, comm.rank)).backward()
            loss_of(plain_common, whole(step, comm.size)).backward()
            loss_of(plain_own, whole(step, members)).backward()
            for optimizer in (*optimizers, *plain):
                optimizer.step()
        assert_close(common, plain_common)
        assert_close(own, plain_own)
        assert_ranks_equal(comm, common)
        assert_ranks_equal(half, own)

    ranks(body)


def test_group_of_one_rank(ranks: Ranks) -> None:
    """There the wrapper is the plain optimizer."""

    def body(comm: Communicator) -> None:
        alone = comm.split(None)
        model, expected = net(), net()
        optimizer = wrap(alone, adamw, model)
        if comm.rank == 0:  # nobody else takes part
            data = [batch(step, comm.rank) for step in range(2)]
            train(optimizer, model, data)
            plain = adamw(expected)
            train(plain, expected, data)
            assert_equal(model, expected)
            assert_equal(optimizer, plain)

    ranks(body)


def test_closures_of_two_optimizers(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        models, expected = [net(), net(seed=1)], [net(), net(seed=1)]
        optimizers = [wrap(comm, sgd, model) for model in models]
        plain = [sgd(model) for model in expected]

        def run(every: Optimizers, modules: Sequence[nn.Module], data: Batch) -> list[float]:
            def closure_of(number: int) -> Callable[[], torch.Tensor]:
                def closure() -> torch.Tensor:
                    every[number].zero_grad()
                    loss = (modules[0](data[0]) + modules[1](data[0]) - data[1]).square().mean()
                    loss.backward()
                    return loss.detach()

                return closure

            return [every[number].step(closure_of(number)).item() for number in range(2)]

        for step in range(2):
            found = run(optimizers, models, batch(step, comm.rank))
            assert found == pytest.approx(run(plain, expected, whole(step, comm.size)), rel=1e-9)
        for model, other in zip(models, expected, strict=True):
            assert_close(model, other)
        assert_ranks_equal(comm, *models)

    ranks(body)


def test_options_of_each_other_do_not_mix(ranks: Ranks) -> None:
    """accumulation_steps and time-outs belong to one optimizer."""

    def body(comm: Communicator) -> None:
        models, expected = [net(), net(seed=1)], [net(), net(seed=1)]
        first = wrap(comm, sgd, models[0], accumulation_steps=2, timeout=30)
        second = wrap(comm, sgd, models[1], timeout=60)
        for step in range(2):
            loss_of(models[0], batch(step, comm.rank)).backward()
            train(second, models[1], [batch(step, comm.rank)])
        first.step()
        plain = sgd(expected[0])
        for step in range(2):
            loss_of(expected[0], whole(step, comm.size)).backward()
        plain.step()
        reference(sgd, expected[1], comm.size, 2)
        for model, other in zip(models, expected, strict=True):
            assert_close(model, other)

    ranks(body)


def test_deleted_between_backward_and_step(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        loss_of(model, batch(0, comm.rank)).backward()
        del optimizer
        again = heatopt.DataParallelOptimizer(sgd(model), comm=comm)
        again.step()  # with the averages that are there
        reference(sgd, expected, comm.size, 1)
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t30_collective_of_the_user_beside_the_optimizers(ranks: Ranks) -> None:
    """The user's own collectives have a channel of their own: between backward and step they disturb nothing."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model, bucket_mb=TINY, blocking=False)
        for step in range(3):
            optimizer.zero_grad()
            handle = comm.allreduce_async(torch.tensor([float(comm.rank)]))
            loss = loss_of(model, batch(step, comm.rank))
            loss.backward()
            mean = comm.allreduce(loss.detach(), "mean")
            optimizer.step()
            assert handle.wait().item() == sum(range(comm.size))
            assert mean.item() == comm.all_gather(mean)[-1].item()
        reference(sgd, expected, comm.size, 3)
        assert_close(model, expected)

    ranks(body)
