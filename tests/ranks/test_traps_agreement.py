"""Ranks that disagree: an error on every rank that names what differs, never a hang and never a wrong number."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.comm import ThreadWorld
from tests.ranks._training import (
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    loss_of,
    net,
    reference,
    sgd,
    train,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

Construct = Callable[["Communicator", bool], Any]


def _odd_net() -> nn.Module:
    model = net()
    model[2] = nn.Linear(6, 6).double()
    return model


def _renamed(other: bool) -> nn.Module:
    model = nn.Module()
    model.register_parameter("beta" if other else "alpha", nn.Parameter(torch.ones(2)))
    return model


def _groups(model: nn.Module, split: bool) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": parameters[:3]}, {"params": parameters[3:]}] if split else [{"params": parameters}]


def _permuted(comm: Communicator, other: bool) -> None:
    model = net()
    parameters = list(model.parameters())
    if other:
        parameters[0], parameters[4] = parameters[4], parameters[0]
    heatopt.DataParallelOptimizer(torch.optim.SGD(parameters, lr=0.1), model=model, comm=comm)


def _same_shapes_permuted(comm: Communicator, other: bool) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("first", "second", "third")})
    order = ["first", "third", "second"] if other else ["first", "second", "third"]
    inner = torch.optim.SGD([model[name].weight for name in order], lr=0.1)
    heatopt.DataParallelOptimizer(inner, model=model, comm=comm)


# What differs on the last rank, and what the message must hold beside that rank.
DIFFERENCES: dict[str, tuple[Construct, list[str]]] = {
    "order": (_permuted, ["0.weight", "4.weight"]),
    "order of equal shapes": (_same_shapes_permuted, ["second.weight", "third.weight", "order"]),
    "names": (
        lambda comm, other: wrap(comm, sgd, _renamed(other)),
        ["alpha", "beta"],
    ),
    "shape": (
        lambda comm, other: heatopt.DataParallelOptimizer(sgd(_odd_net() if other else net()), comm=comm),
        ["(5, 6)", "(6, 6)"],
    ),
    "dtype": (
        lambda comm, other: wrap(comm, sgd, net(torch.float32 if other else torch.float64)),
        ["torch.float64", "torch.float32", "0.weight"],
    ),
    "count": (
        lambda comm, other: heatopt.DataParallelOptimizer(
            torch.optim.SGD(list(net().parameters())[: 5 if other else 6], lr=0.1), comm=comm
        ),
        ["6", "5"],
    ),
    "groups": (
        lambda comm, other: heatopt.DataParallelOptimizer(torch.optim.SGD(_groups(net(), other), lr=0.1), comm=comm),
        ["group"],
    ),
    "learning rate": (
        lambda comm, other: heatopt.DataParallelOptimizer(
            torch.optim.SGD(net().parameters(), lr=0.2 if other else 0.1), comm=comm
        ),
        ["lr", "0.1", "0.2"],
    ),
    "option": (
        lambda comm, other: heatopt.DataParallelOptimizer(
            torch.optim.Adam(net().parameters(), amsgrad=other), comm=comm
        ),
        ["amsgrad", "True", "False"],
    ),
    "algorithm": (
        lambda comm, other: wrap(comm, adamw if other else sgd, net()),
        ["SGD", "AdamW"],
    ),
    "bucket_mb": (
        lambda comm, other: wrap(comm, sgd, net(), bucket_mb=2 if other else 1),
        ["bucket_mb", "1", "2"],
    ),
    "accumulation_steps": (
        lambda comm, other: wrap(comm, sgd, net(), accumulation_steps=2 if other else 1),
        ["accumulation_steps"],
    ),
    "blocking": (
        lambda comm, other: wrap(comm, sgd, net(), blocking=other),
        ["blocking"],
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_t02_t30_different_optimizers(ranks: Ranks, name: str) -> None:
    construct, words = DIFFERENCES[name]

    def body(comm: Communicator) -> str:
        last = comm.size - 1
        with pytest.raises(heatopt.RankMismatchError) as raised:
            construct(comm, comm.rank == last)
        assert type(raised.value) is heatopt.RankMismatchError
        message = str(raised.value)
        for word in [*words, f"rank {last}", "rank 0"]:
            assert word in message, message
        # The ranks are still together.
        model, expected = net(), net()
        train(wrap(comm, sgd, model), model, [batch(0, comm.rank)])
        reference(sgd, expected, comm.size, 1)
        assert_close(model, expected)
        return message

    messages = ranks(body, min_size=2)
    assert len(set(messages)) == 1


def test_t02_first_rank_that_differs_is_named(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(heatopt.RankMismatchError, match="rank 1 has"):
            wrap(comm, sgd, net(torch.float64 if comm.rank == 0 else torch.float32))

    ranks(body, min_size=2)


def test_t30_one_rank_constructs_another_number_of_optimizers(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, other = net(), net(seed=1)
        optimizer = wrap(comm, sgd, model)
        if comm.rank == 0:
            with pytest.raises(heatopt.RankMismatchError, match="construction"):
                wrap(comm, sgd, other)
        else:
            with pytest.raises(heatopt.RankMismatchError, match="construction"):
                optimizer.step()

    ranks(body, min_size=2)


CALLS: dict[str, Callable[[Any, nn.Module], Any]] = {
    "step()": lambda optimizer, model: optimizer.step(),
    "synchronize()": lambda optimizer, model: optimizer.synchronize(),
    "clip_grad_norm_()": lambda optimizer, model: optimizer.clip_grad_norm_(1.0),
    "step(closure)": lambda optimizer, model: optimizer.step(lambda: None),
}


@pytest.mark.parametrize("one", CALLS)
def test_t30_different_calls_at_the_same_time(ranks: Ranks, one: str) -> None:
    """Rank 0 is in one call, the others in another one: all raise, and nothing has been applied."""

    def body(comm: Communicator) -> None:
        for other in CALLS:
            if other == one:
                continue
            model = net()
            optimizer = wrap(comm, sgd, model)
            loss_of(model, batch(0, comm.rank)).backward()
            call = CALLS[one if comm.rank == 0 else other]
            with pytest.raises(heatopt.RankMismatchError) as raised:
                call(optimizer, model)
            assert one in str(raised.value)
            assert other in str(raised.value)
            assert_equal(model, net())
            optimizer.step()  # all are in the same call again
            expected = net()
            reference(sgd, expected, comm.size, 1)
            assert_close(model, expected)
            del optimizer

    ranks(body, min_size=2)


def test_t30_two_optimizers_in_another_order(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        models = net(), net(seed=1)
        pair = [wrap(comm, sgd, model) for model in models]
        for model in models:
            loss_of(model, batch(0, comm.rank)).backward()
        first = pair[0 if comm.rank == 0 else 1]
        with pytest.raises(heatopt.RankMismatchError, match="same order"):
            first.step()
        assert_equal(models[0], net())
        assert_equal(models[1], net(seed=1))
        for optimizer in pair:
            optimizer.step()
        assert_ranks_equal(comm, *models)

    ranks(body, min_size=2)


def test_t30_option_changed_on_one_rank(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        train(optimizer, model, [batch(0, comm.rank)])
        before = [p.detach().clone() for p in model.parameters()]
        if comm.rank == comm.size - 1:
            optimizer.param_groups[0]["weight_decay"] = 0.5
        with pytest.raises(heatopt.RankMismatchError, match=rf"'weight_decay'.*rank {comm.size - 1} has 0\.5"):
            train(optimizer, model, [batch(1, comm.rank)])
        assert_equal(list(model.parameters()), before)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        expected = net()
        reference(sgd, expected, comm.size, 2)
        assert_close(model, expected)

    ranks(body, min_size=2)


# What ends a job ends the world, so worlds of their own: threads, under a launcher too.


def on_threads(body: Callable[[Communicator], Any], size: int = 3, timeout: float = 10.0) -> list[Any]:
    return ThreadWorld(size, timeout=timeout).run(body)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_t33_exception_on_one_rank(failing: int) -> None:
    """At its third step one rank raises: the others stop at once, and the cause is what the program ends with."""
    seen: dict[int, BaseException] = {}

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        try:
            for step in range(5):
                if step == 3 and comm.rank == failing:
                    raise LookupError("bad sample")
                train(optimizer, model, [batch(step, comm.rank)])
        except Exception as error:
            seen[comm.rank] = error
            raise

    started = time.monotonic()
    with pytest.raises(LookupError, match="bad sample"):
        on_threads(body)
    assert time.monotonic() - started < 5
    for rank in {0, 1, 2} - {failing}:
        assert isinstance(seen[rank], heatopt.RankFailedError)
        assert f"rank {failing}" in str(seen[rank])
        assert "bad sample" in str(seen[rank])


@pytest.mark.parametrize("where", ["hook", "forward", "step hook", "closure"])
def test_t33_exception_in_users_code(where: str) -> None:
    """Errors of code that heatopt calls, or that runs within backward, surface unchanged."""

    def fail(*_: Any) -> None:
        raise LookupError(where)

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        train(optimizer, model, [batch(0, comm.rank)])
        if comm.rank == 1:
            if where == "hook":
                model[2].weight.register_hook(fail)
            elif where == "forward":
                model.register_forward_hook(fail)
            elif where == "step hook":
                optimizer.register_step_pre_hook(fail)
        if where == "closure":
            optimizer.step(fail if comm.rank == 1 else lambda: None)
        train(optimizer, model, [batch(1, comm.rank)])
        optimizer.step()

    with pytest.raises(LookupError, match=where):
        on_threads(body)


@pytest.mark.parametrize("short", [0, 2])
def test_t30_rank_with_fewer_steps(short: int) -> None:
    """It ends its program while the others wait for it."""
    seen: dict[int, str] = {}

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        try:
            train(optimizer, model, [batch(step, comm.rank) for step in range(2 if comm.rank == short else 3)])
        except heatopt.RankFailedError as error:
            seen[comm.rank] = str(error)
            raise

    with pytest.raises(heatopt.RankFailedError, match=f"rank {short}"):
        on_threads(body)
    assert seen.keys() == {0, 1, 2} - {short}


def test_t30_rank_that_is_late(tmp_path: Any) -> None:
    """The optimizer's own time-out, not the world's; the late rank is named."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = heatopt.DataParallelOptimizer(sgd(model), comm=comm, timeout=0.1)
        if comm.rank == 1:
            time.sleep(0.4)
        train(optimizer, model, [batch(0, comm.rank)])

    with pytest.raises(heatopt.CollectiveTimeoutError, match=r"0\.1 s.*late.*1"):
        on_threads(body)


def test_t30_rank_that_is_late_within_the_limit() -> None:
    def body(comm: Communicator) -> list[torch.Tensor]:
        model = net()
        optimizer = heatopt.DataParallelOptimizer(sgd(model), comm=comm, timeout=8)
        if comm.rank == 1:
            time.sleep(0.1)
        train(optimizer, model, [batch(0, comm.rank)])
        return [p.detach() for p in model.parameters()]

    expected = net()
    reference(sgd, expected, 3, 1)
    for found in on_threads(body):
        assert_close(found, expected)


def test_t30_time_out_of_zero_is_never() -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = heatopt.DataParallelOptimizer(sgd(model), comm=comm, timeout=0)
        if comm.rank == 1:
            time.sleep(0.3)
        train(optimizer, model, [batch(0, comm.rank)])

    ThreadWorld(2, timeout=0.2).run(lambda comm: _never(comm, body))


def _never(comm: Communicator, body: Callable[[Communicator], None]) -> None:
    comm.timeout = 10.0  # for the construction
    body(comm)


def test_t30_optimizer_deleted_on_one_rank(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, other = net(), net(seed=1)
        optimizer = wrap(comm, sgd, model)
        kept = wrap(comm, sgd, other)
        if comm.rank == comm.size - 1:
            del optimizer
            with pytest.raises(heatopt.HeatoptError, match=r"deleted|different|is in"):
                kept.step()
        else:
            with pytest.raises(heatopt.HeatoptError, match=r"deleted|different|is in"):
                optimizer.step()

    ranks(body, min_size=2)
