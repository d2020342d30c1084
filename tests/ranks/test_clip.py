"""``clip_grad_norm_`` against torch's own, which has all gradients in one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._training import (
    TINY,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    by_name,
    fill,
    gradients,
    loss_of,
    net,
    sgd,
    whole,
    words,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

orders = pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf], ids=str)


@orders
@pytest.mark.parametrize("bucket_mb", [TINY, 8], ids=["many-buckets", "one-bucket"])
def test_t10_equals_torchs(ranks: Ranks, bucket_mb: float, norm_type: float) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer, plain = wrap(comm, sgd, model, bucket_mb=bucket_mb), sgd(expected)
        for step, max_norm in enumerate((1e-3, 0.5, 1e6)):
            optimizer.zero_grad()
            plain.zero_grad()
            loss_of(model, batch(step, comm.rank)).backward()
            loss_of(expected, whole(step, comm.size)).backward()
            norm = optimizer.clip_grad_norm_(max_norm, norm_type)
            wanted = nn.utils.clip_grad_norm_(expected.parameters(), max_norm, norm_type)
            assert norm.shape == ()
            assert_close(norm, wanted)
            assert_close(gradients(model), gradients(expected))
            assert_ranks_equal(comm, norm, gradients(model))
            optimizer.step()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@orders
def test_t10_clips_the_average_of_what_was_set_by_hand(ranks: Ranks, norm_type: float) -> None:
    """The global norm is that of the average, not of what a rank happens to have."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
            parameter.grad = parameter.detach() * (comm.rank + 1)
            other.grad = other.detach() * (comm.size + 1) / 2
        norm = optimizer.clip_grad_norm_(0.1, norm_type)
        assert_close(norm, nn.utils.clip_grad_norm_(expected.parameters(), 0.1, norm_type))
        assert_close(gradients(model), gradients(expected))
        optimizer.step()  # does not average again what is an average
        sgd(expected).step()
        assert_close(model, expected)
        assert_ranks_equal(comm, norm, model)

    ranks(body)


def test_t10_after_accumulation(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        with optimizer.no_sync():
            loss_of(model, batch(0, comm.rank)).backward()
            loss_of(model, batch(1, comm.rank)).backward()
        for step in range(2):
            loss_of(expected, whole(step, comm.size)).backward()
        assert_close(optimizer.clip_grad_norm_(0.1), nn.utils.clip_grad_norm_(expected.parameters(), 0.1))
        assert_close(gradients(model), gradients(expected))
        optimizer.step()
        sgd(expected).step()
        assert_close(model, expected)

    ranks(body)


def test_t10_twice(ranks: Ranks) -> None:
    """Once to look at the norm, once to clip."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, sgd, model)
        loss_of(model, batch(0, comm.rank)).backward()
        loss_of(expected, whole(0, comm.size)).backward()
        before = gradients(model)
        norm = optimizer.clip_grad_norm_(math.inf)
        assert_equal(gradients(model), before)
        assert_close(optimizer.clip_grad_norm_(0.1), norm)
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        assert_close(gradients(model), gradients(expected))

    ranks(body)


@orders
def test_t10_several_dtypes(ranks: Ranks, norm_type: float) -> None:
    """Half types count with single precision's range and accuracy."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]

    def build(scale: float) -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.zeros(50, dtype=dtype)) for dtype in dtypes]
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, scale * (number + 1))
        return parameters

    def body(comm: Communicator) -> None:
        parameters = build(comm.rank + 1.0)
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(parameters, lr=1.0), comm=comm, bucket_mb=TINY)
        norm = optimizer.clip_grad_norm_(1.0, norm_type)
        exact = [p.grad.to(torch.complex128).abs() for p in build((comm.size + 1) / 2)]
        wanted = torch.linalg.vector_norm(torch.cat(exact), norm_type)
        assert norm.dtype in (torch.float32, torch.float64)
        assert norm.item() == pytest.approx(wanted.item(), rel=1e-5)
        for number, parameter in enumerate(parameters):
            scaled = (comm.size + 1) / 2 * (number + 1) / wanted.item()
            half = parameter.dtype in (torch.bfloat16, torch.float16)
            assert parameter.grad.dtype is parameter.dtype
            assert_close(parameter.grad, torch.full_like(parameter, scaled), rtol=1e-2 if half else 1e-5)
        assert_ranks_equal(comm, norm, [p.grad for p in parameters])

    ranks(body)


def test_t10_norm_beyond_the_largest_half(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.zeros(400, dtype=torch.float16))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
        parameter.grad = torch.full_like(parameter, 30000.0)
        assert optimizer.clip_grad_norm_(20.0).item() == pytest.approx(600000.0, rel=1e-3)
        assert_close(parameter.grad, torch.ones_like(parameter), rtol=1e-2)

    ranks(body)


@orders
def test_t04_t10_sparse_gradients(ranks: Ranks, norm_type: float) -> None:
    """torch's own function refuses them; here they count by their values, equal indices added first."""

    def body(comm: Communicator) -> None:
        for algorithm in ("SparseAdam", "SGD"):
            model, expected = words(), words()
            optimizer = wrap(comm, by_name[algorithm].optimizer if algorithm == "SparseAdam" else sgd, model)
            loss_of(model, batch(0, comm.rank)).backward()
            loss_of(expected, whole(0, comm.size)).backward()
            dense = expected.embedding.weight.grad.to_dense()
            norm = optimizer.clip_grad_norm_(0.01, norm_type)
            wanted = torch.linalg.vector_norm(dense, norm_type)
            assert_close(norm, wanted)
            assert model.embedding.weight.grad.is_sparse
            assert_close(model.embedding.weight.grad.to_dense(), dense * min(1.0, 0.01 / (wanted.item() + 1e-6)))
            optimizer.step()
            assert_ranks_equal(comm, norm, model)
            del optimizer

    ranks(body)


def test_t04_t10_sparse_gradient_that_is_not_coalesced(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
        indices, values = torch.tensor([[1, 1, 2]]), torch.ones(3, 2, dtype=torch.float64)
        parameter.grad = torch.sparse_coo_tensor(indices, values, (4, 2), check_invariants=True)
        norm = optimizer.clip_grad_norm_(1.0)
        assert norm.item() == pytest.approx(math.sqrt(2 * (4 + 1)), rel=1e-12)
        optimizer.step()
        wanted = torch.zeros(4, 2, dtype=torch.float64)
        wanted[1], wanted[2] = -2, -1
        assert_close(parameter, wanted / (math.sqrt(10) + 1e-6))

    ranks(body)


def test_t10_no_gradients(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        norm = optimizer.clip_grad_norm_(1.0)
        assert norm.shape == ()
        assert norm.item() == 0.0
        assert all(p.grad is None for p in model.parameters())

    ranks(body)


def test_t10_gradients_of_one_rank(ranks: Ranks) -> None:
    """The norm on ranks without a gradient of their own is the same."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        if comm.rank == comm.size - 1:
            loss_of(model, batch(0, comm.rank)).backward()
        norm = optimizer.clip_grad_norm_(1e9)
        expected = net()
        loss_of(expected, batch(0, comm.size - 1)).backward()
        wanted = nn.utils.clip_grad_norm_(expected.parameters(), 1e9) / comm.size
        assert_close(norm, wanted)
        optimizer.step()
        assert_ranks_equal(comm, norm, model)

    ranks(body)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_t10_error_if_nonfinite(ranks: Ranks, bad: float) -> None:
    """On all ranks, though one rank alone has the bad gradient; the gradients are not touched."""

    def body(comm: Communicator) -> None:
        for who in range(comm.size):
            model = net()
            optimizer = wrap(comm, sgd, model)
            loss = loss_of(model, batch(0, comm.rank))
            (loss * (bad if comm.rank == who else 1.0)).backward()
            before = gradients(model)
            with pytest.raises(RuntimeError, match=r"norm.*(nan|inf)"):
                optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
            assert_equal(gradients(model), before)
            expected = net()
            for parameter, gradient in zip(expected.parameters(), before, strict=True):
                parameter.grad = gradient
            norm = optimizer.clip_grad_norm_(1.0)
            wanted = nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
            assert_close(norm, wanted)
            assert_close(gradients(model), gradients(expected))
            del optimizer

    ranks(body)


def test_t10_wrong_arguments(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        optimizer = wrap(comm, sgd, net())
        for wrong in ("a lot", None):
            with pytest.raises((TypeError, ValueError)):
                optimizer.clip_grad_norm_(wrong)  # type: ignore[arg-type]
        optimizer.step()  # ranks are still together

    ranks(body)


def test_t10_torchs_functions_need_no_extra_call(ranks: Ranks) -> None:
    """Gradients are final when backward returns, so torch's own clipping and norm are right as they are."""

    clip: list[Callable[[nn.Module], object]] = [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
        lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
        lambda model: nn.utils.clip_grads_with_norm_(
            model.parameters(), 0.1, nn.utils.get_total_norm([p.grad for p in model.parameters()])
        ),
    ]

    def body(comm: Communicator) -> None:
        for one in clip:
            model, expected = net(), net()
            optimizer, plain = wrap(comm, sgd, model), sgd(expected)
            loss_of(model, batch(0, comm.rank)).backward()
            loss_of(expected, whole(0, comm.size)).backward()
            one(model)
            one(expected)
            optimizer.step()
            plain.step()
            assert_close(model, expected)
            assert_ranks_equal(comm, model)
            del optimizer

    ranks(body)


def test_t10_empty_and_scalar_parameters(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        parameters = [nn.Parameter(torch.empty(0, 2)), nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(3))]
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(parameters, lr=1.0), comm=comm)
        torch.stack([p.sum() for p in parameters]).sum().backward()
        for norm_type, wanted in ((1.0, 4.0), (2.0, 2.0), (math.inf, 1.0)):
            assert optimizer.clip_grad_norm_(1e9, norm_type).item() == pytest.approx(wanted)

    ranks(body)


def test_t10_several_groups(ranks: Ranks) -> None:
    """One norm over all groups, as over all parameters in one list."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        return torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.01}], lr=0.1)

    def body(comm: Communicator) -> None:
        model, expected = fill(net(), 3), fill(net(), 3)
        optimizer, plain = wrap(comm, make, model), make(expected)
        loss_of(model, batch(0, comm.rank)).backward()
        loss_of(expected, whole(0, comm.size)).backward()
        assert_close(optimizer.clip_grad_norm_(0.2), nn.utils.clip_grad_norm_(expected.parameters(), 0.2))
        optimizer.step()
        plain.step()
        assert_close(model, expected)

    ranks(body)
