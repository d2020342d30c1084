"""A backward that ends with an exception, be it of a hook or of a signal, which the user catches."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt.buckets import Bucket
from heatopt.comm import ThreadWorld, _node_reduction
from heatopt.comm._threads import ThreadCommunicator
from tests.ranks._training import (
    TINY,
    adamw,
    assert_close,
    assert_ranks_equal,
    batch,
    loss_of,
    net,
    reference,
    train,
    whole,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


class BadNumberError(Exception):
    """What a user's hook raises."""


class Breaking:
    """Makes a network's backward fail at the output of one of its layers, while ``armed``."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.armed = False
        model[layer].register_forward_hook(self._on_forward)  # type: ignore[index]

    def _on_forward(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(self._on_gradient)

    def _on_gradient(self, gradient: torch.Tensor) -> None:
        if self.armed:
            raise BadNumberError


BEFORE_ANY_GRADIENT, AFTER_THE_LAST_LAYER = 4, 2

# Where backward breaks, and the size of a bucket: nothing has been launched in each of these.
UNSEEN = [
    pytest.param(BEFORE_ANY_GRADIENT, TINY, id="before-any-gradient"),
    pytest.param(BEFORE_ANY_GRADIENT, 8, id="before-any-gradient-one-bucket"),
    pytest.param(AFTER_THE_LAST_LAYER, 8, id="in-the-first-bucket"),
]
unseen = pytest.mark.parametrize(("layer", "bucket_mb"), UNSEEN)
blocking = pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])


def broken_backward(breaking: Breaking, model: nn.Module, data: Any) -> None:
    breaking.armed = True
    with pytest.raises(BadNumberError):
        loss_of(model, data).backward()
    breaking.armed = False


@blocking
@unseen
@pytest.mark.parametrize("who", ["all", "last"])
def test_batch_is_skipped(ranks: Ranks, who: str, layer: int, bucket_mb: float, blocking: bool) -> None:
    """The rank clears its gradients and goes on to step(): it counts as one without a gradient."""

    def body(comm: Communicator) -> None:
        broken = range(comm.size) if who == "all" else [comm.size - 1]
        model, expected = net(), net()
        breaking = Breaking(model, layer)
        optimizer, plain = wrap(comm, adamw, model, bucket_mb=bucket_mb, blocking=blocking), adamw(expected)
        for step in range(3):
            optimizer.zero_grad()
            plain.zero_grad()
            if step == 1 and comm.rank in broken:
                broken_backward(breaking, model, batch(step, comm.rank))
                optimizer.zero_grad()
            else:
                loss_of(model, batch(step, comm.rank)).backward()
            good = [rank for rank in range(comm.size) if step != 1 or rank not in broken]
            if good:
                (loss_of(expected, whole(step, good)) * len(good) / comm.size).backward()
            optimizer.step()
            plain.step()
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@blocking
@unseen
@pytest.mark.parametrize("who", ["all", "last"])
def test_batch_is_repeated(ranks: Ranks, who: str, layer: int, bucket_mb: float, blocking: bool) -> None:
    """The rank clears its gradients and calls backward again: as if nothing had happened."""

    def body(comm: Communicator) -> None:
        broken = range(comm.size) if who == "all" else [comm.size - 1]
        model, expected = net(), net()
        breaking = Breaking(model, layer)
        optimizer = wrap(comm, adamw, model, bucket_mb=bucket_mb, blocking=blocking)
        for step in range(3):
            optimizer.zero_grad()
            if step == 1 and comm.rank in broken:
                broken_backward(breaking, model, batch(step, comm.rank))
                optimizer.zero_grad()
            loss_of(model, batch(step, comm.rank)).backward()
            optimizer.step()
        assert_close(optimizer, reference(adamw, expected, comm.size, 3))
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@unseen
@pytest.mark.parametrize("clear", ["model", "by hand"])
def test_gradients_cleared_without_the_wrapper(ranks: Ranks, clear: str, layer: int, bucket_mb: float) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        breaking = Breaking(model, layer)
        optimizer = wrap(comm, adamw, model, bucket_mb=bucket_mb)
        if comm.rank == 0:
            broken_backward(breaking, model, batch(0, comm.rank))
            if clear == "model":
                model.zero_grad()
            else:
                for parameter in model.parameters():
                    parameter.grad = None
        loss_of(model, batch(0, comm.rank)).backward()
        optimizer.step()
        assert_close(optimizer, reference(adamw, expected, comm.size, 1))
        assert_close(model, expected)

    ranks(body)


@unseen
def test_gradients_are_not_cleared(ranks: Ranks, layer: int, bucket_mb: float) -> None:
    """What the broken backward has left is part of the sum, as in plain torch."""

    def body(comm: Communicator) -> None:
        model = net()
        breaking = Breaking(model, layer)
        optimizer = wrap(comm, adamw, model, bucket_mb=bucket_mb)
        partial = net()
        partial_breaking = Breaking(partial, layer)
        if comm.rank == 0:
            broken_backward(breaking, model, batch(0, comm.rank))
        loss_of(model, batch(1, comm.rank)).backward()
        expected = net()
        plain = adamw(expected)
        loss_of(expected, whole(1, comm.size)).backward()
        broken_backward(partial_breaking, partial, batch(0, 0))
        for parameter, left in zip(expected.parameters(), partial.parameters(), strict=True):
            if left.grad is not None:
                parameter.grad += left.grad / comm.size
        optimizer.step()
        plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_broken_in_no_sync(ranks: Ranks) -> None:
    """Whatever had been delivered: nothing was to be launched."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        breaking = Breaking(model, AFTER_THE_LAST_LAYER)
        optimizer = wrap(comm, adamw, model)
        with optimizer.no_sync():
            broken_backward(breaking, model, batch(0, comm.rank))
        optimizer.zero_grad()
        train(optimizer, model, [batch(0, comm.rank)])
        assert_close(optimizer, reference(adamw, expected, comm.size, 1))
        assert_close(model, expected)

    ranks(body)


def test_broken_with_several_optimizers(ranks: Ranks) -> None:
    """With more than one optimizer nothing is launched before the end of a backward."""

    def body(comm: Communicator) -> None:
        models, expected = [net(), net(seed=1)], [net(), net(seed=1)]
        breaking = Breaking(models[0], AFTER_THE_LAST_LAYER)
        optimizers = [wrap(comm, adamw, model) for model in models]
        for model, optimizer in zip(models, optimizers, strict=True):
            if comm.rank == comm.size - 1 and model is models[0]:
                broken_backward(breaking, model, batch(0, comm.rank))
                optimizer.zero_grad()
            loss_of(model, batch(0, comm.rank)).backward()
            optimizer.step()
        for model, other in zip(models, expected, strict=True):
            reference(adamw, other, comm.size, 1)
            assert_close(model, other)
        assert_ranks_equal(comm, *models)

    ranks(body)


@blocking
@pytest.mark.parametrize("then", ["step", "zero_grad", "backward", "clip_grad_norm_", "synchronize"])
def test_broken_after_the_first_launch(ranks: Ranks, then: str, blocking: bool) -> None:
    """The other ranks have this backward's first bucket: to go on without the rest would mix up the sums."""

    def body(comm: Communicator) -> None:
        model = net()
        breaking = Breaking(model, AFTER_THE_LAST_LAYER)
        optimizer = wrap(comm, adamw, model, blocking=blocking)
        broken_backward(breaking, model, batch(0, comm.rank))
        calls = {
            "step": optimizer.step,
            "zero_grad": optimizer.zero_grad,
            "backward": lambda: loss_of(model, batch(0, comm.rank)).backward(),
            "clip_grad_norm_": lambda: optimizer.clip_grad_norm_(1.0),
            "synchronize": optimizer.synchronize,
        }
        with pytest.raises(heatopt.HeatoptError, match=r"interrupted"):
            calls[then]()

    if ranks.size == 1:
        pytest.skip("one rank has nobody to mix up")
    if ranks.size > 1 and heatopt.world().size > 1:
        pytest.skip("the channel of this world's other tests is not left in the middle of a round")
    ranks(body)


def test_one_process_goes_on_in_any_case(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        alone = comm.split(None)
        model, expected = net(), net()
        breaking = Breaking(model, AFTER_THE_LAST_LAYER)
        optimizer = wrap(alone, adamw, model)
        broken_backward(breaking, model, batch(0, comm.rank))
        train(optimizer, model, [batch(0, 0)])
        reference(adamw, expected, 1, 1)
        assert_close(model, expected)

    ranks(body)


@pytest.mark.parametrize("then", ["step", "leave"])
def test_broken_after_the_first_launch_on_one_rank(then: str) -> None:
    """That rank is told, or leaves; the others, which wait for its next bucket, are released with the cause."""
    seen: dict[int, BaseException] = {}

    def body(comm: Communicator) -> None:
        model = net()
        breaking = Breaking(model, AFTER_THE_LAST_LAYER)
        optimizer = wrap(comm, adamw, model)
        breaking.armed = comm.rank == 1
        try:
            try:
                loss_of(model, batch(0, comm.rank)).backward()
            except BadNumberError:
                if then == "leave":
                    raise
            optimizer.step()
        except Exception as error:
            seen[comm.rank] = error
            raise

    with pytest.raises(heatopt.HeatoptError if then == "step" else BadNumberError):
        ThreadWorld(3, timeout=10).run(body)
    assert type(seen[1]) is (heatopt.HeatoptError if then == "step" else BadNumberError)
    for rank in (0, 2):
        assert isinstance(seen[rank], heatopt.RankFailedError)
        assert "rank 1" in str(seen[rank])


@pytest.mark.parametrize(
    ("owner", "name", "number", "bucket_mb", "shared_memory"),
    [
        pytest.param(ThreadCommunicator, "_begin_wait", 1, 8, False, id="header"),
        pytest.param(ThreadCommunicator, "_begin_wait", 2, 8, False, id="blocking"),
        pytest.param(ThreadCommunicator, "_begin_wait", 2, TINY, True, id="non-blocking"),
        pytest.param(_node_reduction, "sum_small", 1, 8, True, id="sum of a small bucket"),
        pytest.param(_node_reduction, "sum_slice", 1, 8, True, id="sum"),
        pytest.param(Bucket, "reveal", 1, 8, True, id="result"),
    ],
)
def test_signal_while_ranks_are_together(
    owner: Any, name: str, number: int, bucket_mb: float, shared_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever catches what the handler raises cannot go on: the others have gone on with the reduction."""
    seen: dict[int, BaseException] = {}
    function, calls = getattr(owner, name), iter(range(0))

    def interrupted(*arguments: Any) -> Any:
        if threading.current_thread().name == "rank1" and next(calls, 0) == number:
            raise KeyboardInterrupt
        return function(*arguments)

    def body(comm: Communicator) -> None:
        nonlocal calls
        model = net()
        optimizer = wrap(comm, adamw, model, bucket_mb=bucket_mb, blocking=number == 1 or bucket_mb == 8)
        train(optimizer, model, [batch(0, comm.rank)])
        optimizer.zero_grad()
        try:
            if comm.rank == 1:
                calls = iter(range(1, 100))
                with pytest.raises(KeyboardInterrupt):
                    loss_of(model, batch(1, comm.rank)).backward()
            else:
                loss_of(model, batch(1, comm.rank)).backward()
            optimizer.step()
        except Exception as error:
            seen[comm.rank] = error
            raise

    monkeypatch.setattr(owner, name, interrupted)
    if name != "sum_small":
        monkeypatch.setattr(_node_reduction, "_SMALL_BYTES", -1)
    with pytest.raises(heatopt.HeatoptError, match=r"rank 1 was interrupted in .*backward"):
        ThreadWorld(3, timeout=10, shared_memory=shared_memory).run(body)
    assert "rank 1" in str(seen[0])
    assert "rank 1" in str(seen[2])
