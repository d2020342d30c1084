"""Hooks of all six kinds, on the wrapped optimizer and on the wrapper, fire once for each call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import heatopt
from tests.ranks._training import (
    Algorithm,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    by_name,
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

KINDS = [
    "step_pre_hook",
    "step_post_hook",
    "state_dict_pre_hook",
    "state_dict_post_hook",
    "load_state_dict_pre_hook",
    "load_state_dict_post_hook",
]

Calls = list[tuple[str, str]]


def note(calls: Calls, where: str, kind: str, owner: list[torch.optim.Optimizer]) -> Callable[..., None]:
    """A hook that notes its call, and that it was given the optimizer that it was registered on."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert optimizer is owner[0]
        calls.append((where, kind))

    return hook


def hook_all(calls: Calls, where: str, optimizer: torch.optim.Optimizer) -> list[Any]:
    return [getattr(optimizer, f"register_{kind}")(note(calls, where, kind, [optimizer])) for kind in KINDS]


@pytest.mark.parametrize("algorithm", [by_name[n] for n in ("SGD", "LBFGS", "SparseAdam")], ids=lambda one: one.name)
def test_each_hook_fires_once_for_each_call(ranks: Ranks, algorithm: Algorithm) -> None:
    def body(comm: Communicator) -> None:
        calls: Calls = []
        model = algorithm.model()
        inner = algorithm.optimizer(model)
        handles = hook_all(calls, "before", inner)
        optimizer = heatopt.DataParallelOptimizer(inner, model=model, comm=comm)
        assert calls == []
        handles += hook_all(calls, "after", inner)
        handles += hook_all(calls, "wrapper", optimizer)

        def expected(verb: str) -> Calls:
            inside = [("before", f"{verb}_pre_hook"), ("after", f"{verb}_pre_hook")]
            inside += [("before", f"{verb}_post_hook"), ("after", f"{verb}_post_hook")]
            return [("wrapper", f"{verb}_pre_hook"), *inside, ("wrapper", f"{verb}_post_hook")]

        for _ in range(2):
            algorithm.update(optimizer, model, batch(0, comm.rank))
            assert calls == expected("step")
            calls.clear()
        saved = optimizer.state_dict()
        assert calls == expected("state_dict")
        calls.clear()
        optimizer.load_state_dict(saved)
        assert calls == expected("load_state_dict")
        calls.clear()
        for handle in handles:
            handle.remove()
        algorithm.update(optimizer, model, batch(0, comm.rank))
        optimizer.load_state_dict(optimizer.state_dict())
        assert calls == []

    ranks(body)


def test_prepended_hooks_come_first(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        calls: list[str] = []
        model = net()
        optimizer = wrap(comm, sgd, model)
        for kind in KINDS[2:]:
            register = getattr(optimizer, f"register_{kind}")
            register(lambda *_, kind=kind: calls.append(f"{kind} second"))
            register(lambda *_, kind=kind: calls.append(f"{kind} first"), prepend=True)
        optimizer.load_state_dict(optimizer.state_dict())
        assert calls == [f"{kind} {place}" for kind in KINDS[2:] for place in ("first", "second")]

    ranks(body)


@pytest.fixture
def global_calls() -> Iterator[dict[int, list[str]]]:
    """What torch's global step hooks were called for: by thread, since all ranks' threads share them."""
    calls: dict[int, list[str]] = {}

    def hook(kind: str) -> Callable[..., None]:
        def called(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            calls.setdefault(threading.get_ident(), []).append(f"{kind} {type(optimizer).__name__}")

        return called

    handles = [register_optimizer_step_pre_hook(hook("pre")), register_optimizer_step_post_hook(hook("post"))]
    yield calls
    for handle in handles:
        handle.remove()


def test_global_hooks_fire_once(ranks: Ranks, global_calls: dict[int, list[str]]) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        own = global_calls.setdefault(threading.get_ident(), [])
        for step in range(2):
            own.clear()
            train(optimizer, model, [batch(step, comm.rank)])
            assert own == ["pre SGD", "post SGD"]
        own.clear()

    ranks(body)


@pytest.mark.parametrize("place", ["inner", "wrapper"])
def test_step_pre_hook_sees_averages_and_may_change_them(ranks: Ranks, place: str) -> None:
    def halve(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        seen: list[torch.Tensor] = []
        target = optimizer if place == "wrapper" else optimizer.torch_optimizer
        target.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
        target.register_step_pre_hook(halve)
        plain.register_step_pre_hook(halve)
        wanted = net()
        # Set by hand, so that nothing before step() averages them.
        for parameter, local, other in zip(model.parameters(), net().parameters(), wanted.parameters(), strict=True):
            parameter.grad = local.detach() * (comm.rank + 1)
            other.grad = local.detach() * (comm.size + 1) / 2
        optimizer.step()
        assert_close(seen, [p.grad for p in wanted.parameters()])
        optimizer.zero_grad()
        seen.clear()
        reference_of = net()
        for parameter, other in zip(expected.parameters(), reference_of.parameters(), strict=True):
            parameter.grad = other.detach() * (comm.size + 1) / 2
        plain.step()
        train(optimizer, model, [batch(0, comm.rank)])
        train(plain, expected, [whole(0, comm.size)])
        assert_close(model, expected)
        assert_ranks_equal(comm, model, seen)

    ranks(body)


def test_step_pre_hook_may_replace_the_arguments(ranks: Ranks) -> None:
    """A hook that brings a closure: its gradients are averaged as those of any closure."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(0, comm.rank))
            loss.backward()
            return loss.detach()

        optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
        loss = optimizer.step()
        wanted = loss_of(expected, whole(0, comm.size)).item()
        reference(sgd, expected, comm.size, 1)
        assert loss.item() == pytest.approx(wanted, rel=1e-12)
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("place", ["inner", "wrapper"])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_inner_hook_may_replace_the_closure_by_keyword(ranks: Ranks, place: str, by_keyword: bool) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(0, comm.rank))
            loss.backward()
            return loss.detach()

        def hook(opt: Any, args: Any, kwargs: Any) -> Any:
            return ((opt,), {"closure": closure}) if by_keyword else ((opt, closure), {})

        (optimizer if place == "wrapper" else optimizer.torch_optimizer).register_step_pre_hook(hook)
        optimizer.step()
        reference(sgd, expected, comm.size, 1)
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_state_dict_hooks_may_replace_the_dictionary(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        train(optimizer, model, [batch(0, comm.rank)])
        optimizer.torch_optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "inner": 1})
        optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "outer": saved["inner"] + 1})
        saved = optimizer.state_dict()
        assert saved["outer"] == 2
        assert saved.keys() == {"state", "param_groups", "inner", "outer"}

        unpacked = {"packed": saved}
        optimizer.register_load_state_dict_pre_hook(lambda _, given: given["packed"])
        before = [tensor.clone() for tensor in optimizer.state_dict()["state"][0].values()]
        optimizer.load_state_dict(unpacked)
        assert_equal(list(optimizer.state_dict()["state"][0].values()), before)

    ranks(body)


def test_post_hooks_see_the_updated_parameters(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        seen: list[torch.Tensor] = []
        optimizer.register_step_post_hook(lambda *_: seen.extend(p.detach().clone() for p in model.parameters()))
        train(optimizer, model, [batch(0, comm.rank)])
        reference(sgd, expected, comm.size, 1)
        assert_close(seen, expected)

    ranks(body)


def test_hook_that_raises(ranks: Ranks) -> None:
    """The error is the user's to see, on all ranks that raise it, and training can go on."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)

        def refuse(*_: Any) -> None:
            raise LookupError("no step today")

        handle = optimizer.register_step_pre_hook(refuse)
        with pytest.raises(LookupError, match="no step today"):
            train(optimizer, model, [batch(0, comm.rank)])
        handle.remove()
        optimizer.step()  # with the gradients that are there
        reference(sgd, expected, comm.size, 1)
        assert_close(model, expected)

    ranks(body)
