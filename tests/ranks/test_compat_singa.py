"""heatopt.compat.singa: SINGA's formulas, schedulers, modes and one-batch training on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from heatopt.compat import singa
from tests.ranks._compression import Reference, at_least, largest
from tests.ranks._training import (
    TINY,
    Batch,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    loss_of,
    net,
    whole,
    words,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

Update = Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], int, float], None]
STEPS = 5
DECAY = singa.ExponentialDecay(0.05, 2, 0.5, staircase=True)


def state_of(states: dict[str, torch.Tensor], name: str, p: torch.Tensor) -> torch.Tensor:
    return states.setdefault(name, torch.zeros_like(p))


# SINGA's `apply`, for a gradient that has the weight decay already.


def sgd_update(p: torch.Tensor, g: torch.Tensor, states: dict[str, torch.Tensor], t: int, lr: float) -> None:
    buffer = state_of(states, "moments", p)
    buffer.mul_(0.9).add_(g)
    p.sub_(lr * buffer)


def nesterov_update(p: torch.Tensor, g: torch.Tensor, states: dict[str, torch.Tensor], t: int, lr: float) -> None:
    buffer = state_of(states, "moments", p)
    buffer.mul_(0.9).add_(g)
    p.sub_(lr * (g + 0.9 * buffer))


def rms_prop_update(p: torch.Tensor, g: torch.Tensor, states: dict[str, torch.Tensor], t: int, lr: float) -> None:
    average = state_of(states, "running_average", p)
    average.mul_(0.8).add_(0.2 * g * g)
    p.sub_(lr * g / (average + 0.01).sqrt())


def ada_grad_update(p: torch.Tensor, g: torch.Tensor, states: dict[str, torch.Tensor], t: int, lr: float) -> None:
    history = state_of(states, "history", p)
    history.add_(g * g)
    p.sub_(lr * g / (history + 0.01).sqrt())


def adam_update(p: torch.Tensor, g: torch.Tensor, states: dict[str, torch.Tensor], t: int, lr: float) -> None:
    m, v = state_of(states, "m", p), state_of(states, "v", p)
    m.mul_(0.8).add_(0.2 * g)
    v.mul_(0.95).add_(0.05 * g * g)
    p.sub_(lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 0.01))


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], Update]] = {
    "SGD": (singa.SGD, {"momentum": 0.9}, sgd_update),
    "Nesterov": (singa.SGD, {"momentum": 0.9, "nesterov": True}, nesterov_update),
    "RMSProp": (singa.RMSProp, {"rho": 0.8, "epsilon": 0.01}, rms_prop_update),
    "AdaGrad": (singa.AdaGrad, {"epsilon": 0.01}, ada_grad_update),
    "Adam": (singa.Adam, {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 0.01}, adam_update),
}


def follow(update: Update, model: nn.Module, size: int, weight_decay: float, rate: Callable[[int], float]) -> None:
    """Train in one process on the whole batches."""
    states: list[dict[str, torch.Tensor]] = [{} for _ in model.parameters()]
    for n in range(STEPS):
        found = torch.autograd.grad(loss_of(model, whole(n, size)), list(model.parameters()))
        with torch.no_grad():
            for p, g, state in zip(model.parameters(), found, states, strict=True):
                update(p, g + weight_decay * p, state, n + 1, rate(n))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("lr", [0.05, DECAY], ids=["number", "scheduler"])
@pytest.mark.parametrize("name", CASES)
def test_optimizers_are_singas(ranks: Ranks, name: str, lr: Any, weight_decay: float) -> None:
    make, options, update = CASES[name]

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = make(lr=lr, weight_decay=weight_decay, **options, comm=comm, bucket_mb=TINY)
        for step in range(STEPS):
            loss = loss_of(model, batch(step, comm.rank))
            assert optimizer(loss).equal(loss.detach())
        follow(update, expected, comm.size, weight_decay, lr.value if lr is DECAY else lambda n: 0.05)
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer.wrapped)

    ranks(body)


@pytest.mark.parametrize("name", CASES)
def test_sharded_states_have_the_same_bits(ranks: Ranks, name: str) -> None:
    make, options, _ = CASES[name]

    def body(comm: Communicator) -> None:
        models = [net(), net()]
        for model, shard in zip(models, ("none", "state"), strict=True):
            optimizer = make(lr=DECAY, **options, comm=comm, shard=shard)
            for step in range(3):
                optimizer(loss_of(model, batch(step, comm.rank)))
        assert_equal(*models)
        assert_ranks_equal(comm, models)

    ranks(body)


def test_exponential_decay_is_singas(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for staircase in (False, True):
            decay = singa.ExponentialDecay(init_value=0.1, decay_steps=2, decay_rate=0.25, staircase=staircase)
            optimizer = singa.SGD(lr=decay, comm=comm)
            model, rates = net(), []
            for step in range(5):
                optimizer(loss_of(model, batch(step, comm.rank)))
                rates.append(optimizer.wrapped.param_groups[0]["lr"])
            expected = [1, 2, 2, 4, 4] if staircase else [0.5, 1, 1.5, 2, 2.5]
            exponents = [0, 1, 1, 2, 2] if staircase else expected
            assert rates == pytest.approx([0.1 * 0.25**e for e in exponents], rel=1e-15)

    ranks(body)


def test_momentum_and_weight_decay_take_schedulers(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        fall = singa.ExponentialDecay(0.8, 1, 0.5)
        optimizer = singa.SGD(0.1, momentum=fall, weight_decay=singa.Constant(0.3), comm=comm)
        for step in range(3):
            optimizer.backward_and_update(loss_of(model, batch(step, comm.rank)))
            (group,) = optimizer.wrapped.param_groups
            assert (group["momentum"], group["weight_decay"]) == (fall.value(step + 1), 0.3)

    ranks(body)


# One batch


class Net(singa.Model):
    """As in SINGA's examples."""

    def __init__(self, seed: int, method: str = "__call__", **options: Any) -> None:
        super().__init__()
        self.net = net(seed=seed)
        self.method, self.options = method, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def train_one_batch(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.forward(x)
        loss = nn.functional.mse_loss(out, y)
        getattr(self.optimizer, self.method)(loss, **self.options)
        return out, loss


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "DistOpt"])
@pytest.mark.parametrize("method", ["__call__", "backward_and_update"])
def test_one_batch_at_a_time(ranks: Ranks, method: str, distributed: bool) -> None:
    """Ranks begin with other parameters; rank 0's count."""

    def body(comm: Communicator) -> None:
        model, expected = Net(comm.rank, method), net()
        if distributed:
            model.set_optimizer(singa.DistOpt(singa.SGD(lr=0.05, momentum=0.9), comm=comm))
        else:
            model.set_optimizer(singa.SGD(lr=0.05, momentum=0.9, comm=comm))
        assert_equal(model, expected)
        model.eval()
        model.compile([batch(0, 0)[0]])
        for step in range(STEPS):
            x, y = batch(step, comm.rank)
            before = model.forward(x)
            out, loss = model(x, y)
            assert_equal([out, loss], [before, nn.functional.mse_loss(before, y)])
        follow(sgd_update, expected, comm.size, 0.0, lambda n: 0.05)
        assert_close(model, expected)
        assert_ranks_equal(comm, model)
        model.compile([x], is_train=False, use_graph=True, sequential=False)
        assert_equal(model(x), model.net(x))

    ranks(body)


def test_half_precision(ranks: Ranks) -> None:
    """float16 on the wire, as the wrapped optimizer has it; and each rank's gradients clipped before the average."""

    def body(comm: Communicator) -> None:
        model = Net(comm.rank, "backward_and_update_half", clipping=True, clip_Value=0.01)
        model.set_optimizer(singa.DistOpt(singa.SGD(lr=0.05), comm=comm))
        expected = net()
        for step in range(STEPS):
            model(*batch(step, comm.rank))
            sums = [torch.zeros_like(p) for p in expected.parameters()]
            for rank in range(comm.size):
                found = torch.autograd.grad(loss_of(expected, batch(step, rank)), list(expected.parameters()))
                for total, g in zip(sums, found, strict=True):
                    total.add_(g.clamp(-0.01, 0.01))
            for p, total in zip(expected.parameters(), sums, strict=True):
                p.data.sub_(0.05 * total / comm.size)
        assert_close(model, expected, rtol=1e-3, atol=1e-5)
        assert_ranks_equal(comm, model)
        assert model.optimizer.opt.wrapped._settings.wire_dtype is torch.float16

    ranks(body)


PARAMETERS = 6


@pytest.mark.parametrize(("threshold", "parts"), [(0, PARAMETERS), (30, 2), (10_000, 1)])
def test_partial_update(ranks: Ranks, threshold: int, parts: int) -> None:
    """Each rank updates by its own gradients; then the parts are averaged in turn, one after each step."""
    turns = {6: [[0], [1], [2], [3], [4], [5]], 2: [[0, 1], [2, 3, 4, 5]], 1: [list(range(PARAMETERS))]}[parts]

    def body(comm: Communicator) -> None:
        model = Net(comm.rank, "backward_and_partial_update", threshold=threshold)
        model.set_optimizer(singa.DistOpt(singa.SGD(lr=0.05), comm=comm))
        replicas = [net() for _ in range(comm.size)]
        for step in range(2 * parts + 1):
            model(*batch(step, comm.rank))
            for rank, replica in enumerate(replicas):
                for p, g in zip(
                    replica.parameters(),
                    torch.autograd.grad(loss_of(replica, batch(step, rank)), list(replica.parameters())),
                    strict=True,
                ):
                    p.data.sub_(0.05 * g)
            for together in zip(*(replica.parameters() for replica in replicas), strict=True):
                number = [p is together[0] for p in replicas[0].parameters()].index(True)
                if number in turns[step % parts]:
                    mean = sum(p.detach() for p in together) / comm.size
                    for p in together:
                        p.data.copy_(mean)
            assert_close(model, replicas[comm.rank])
        model.optimizer.opt.wrapped.synchronize()
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("corr", [True, False])
@pytest.mark.parametrize(("topK", "spars"), [(True, 0.2), (False, 0.02)])
def test_sparse_update(ranks: Ranks, topK: bool, spars: float, corr: bool) -> None:
    def body(comm: Communicator) -> None:
        model = Net(comm.rank, "backward_and_sparse_update", spars=spars, topK=topK, corr=corr)
        model.set_optimizer(singa.DistOpt(singa.SGD(lr=0.05, momentum=0.9), comm=comm))
        expected = net()
        optimizer = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9)
        for step in range(STEPS):
            model(*batch(step, comm.rank))
        reference = Reference(largest(spars) if topK else at_least(spars), feedback=corr)
        if comm.size > 1:
            reference.train(expected, optimizer, comm.size, range(STEPS))
        else:
            follow(sgd_update, expected, 1, 0.0, lambda n: 0.05)
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_threshold_is_the_size_of_a_bucket(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        results: list[Batch] = []
        for threshold in (8, 10_000):
            model = Net(0, "backward_and_update", threshold=threshold)
            dist = singa.DistOpt(singa.Adam(lr=0.01), comm=comm)
            model.set_optimizer(dist)
            for step in range(2):
                model(*batch(step, comm.rank))
            results.append([p.detach() for p in model.parameters()])  # type: ignore[arg-type]
            if comm.size > 1:
                assert dist.opt.wrapped.report()["bucket_mb"] == threshold * 4 / 2**20
        assert_equal(*results)
        loss = loss_of(model.net, batch(3, comm.rank))
        for other in (dist.backward_and_update_half, dist.backward_and_partial_update, dist.backward_and_sparse_update):
            with pytest.raises(ValueError, match="make another one"):
                other(loss)

    ranks(body)


def test_options_are_given_once(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="comm is given to this optimizer, and to what it is used by"):
            singa.DistOpt(singa.SGD(comm=comm), comm=comm)
        model = net()
        dist = singa.DistOpt(singa.SGD(wire_dtype=torch.bfloat16, bucket_mb=TINY), comm=comm)
        loss = loss_of(model, batch(0, comm.rank))
        with pytest.raises(ValueError, match="wire_dtype is given"):
            dist.backward_and_update_half(loss)
        dist.backward_and_update(loss)
        assert dist.opt.wrapped._settings.wire_dtype is torch.bfloat16

    ranks(body)


def test_ranks_of_dist_opt(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        dist = singa.DistOpt(comm=comm)
        assert isinstance(dist.opt, singa.SGD)
        assert (dist.world_size, dist.global_rank, dist.local_rank) == (comm.size, comm.rank, comm.node_rank)

    ranks(body)


# What is refused


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: singa.SGD(dampening=0.1), ValueError, "dampening must be 0, got 0.1: SINGA applies it to the first"),
        (lambda: singa.SGD(nesterov=True), ValueError, "Nesterov momentum requires a momentum"),
        (lambda: singa.SGD(momentum=-1.0), ValueError, "momentum"),
        (lambda: singa.SGD(lr=-1.0), ValueError, "lr must be >= 0"),
        (lambda: singa.SGD(lr="0.1"), TypeError, "lr must be a number or a heatopt.lr_scheduler.Schedule, got '0.1'"),
        (lambda: singa.Adam(weight_decay=-0.1), ValueError, "weight_decay must be >= 0"),
        (lambda: singa.Adam(beta_1=1.0), ValueError, "beta"),
        (lambda: singa.AdaGrad(epsilon=-1.0), ValueError, "initial_accumulator_value"),
        (lambda: singa.RMSProp(rho=2.0), ValueError, r"rho must be in \[0, 1\], got 2.0"),
        (lambda: singa.RMSProp(epsilon=-1.0), ValueError, "epsilon must be >= 0"),
        (lambda: singa.Adam(topK=True), TypeError, "unexpected keyword argument 'topK'"),
        (lambda: singa.DistOpt(torch.optim.SGD([torch.ones(1)])), TypeError, "opt must be an optimizer of"),
        (lambda: singa.DistOpt().backward_and_sparse_update(None, spars=2, topK=True), ValueError, "ratio must be"),
        (lambda: singa.DistOpt(nccl_id=1), TypeError, "unexpected keyword argument 'nccl_id'"),
        (lambda: Net(0).set_optimizer("sgd"), TypeError, "optimizer must be one of heatopt.compat.singa"),
        (lambda: singa.Model()(1), NotImplementedError, "Model must define train_one_batch"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_rms_prop_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match=r"fuse=True needs an algorithm .*, got RootedRMSprop"):
        singa.RMSProp(fuse=True)(loss_of(net(), batch(0, 0)))


def test_rms_prop_steps_by_closure_and_refuses_sparse_gradients() -> None:
    optimizer = singa.RMSProp()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer(loss_of(words(), batch(0, 0)))
    model = net()
    optimizer = singa.RMSProp()
    optimizer(loss_of(model, batch(0, 0)))
    before = [p.detach().clone() for p in model.parameters()]
    loss_before = loss_of(model, batch(0, 0))

    def closure() -> torch.Tensor:
        optimizer.wrapped.zero_grad()
        loss = loss_of(model, batch(0, 0))
        loss.backward()
        return loss

    assert optimizer.wrapped.step(closure) == loss_before
    assert not any(map(torch.equal, before, model.parameters()))
