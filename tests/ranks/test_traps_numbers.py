"""Dtypes and shapes: half, double, complex, empty, several in one optimizer (T19 to T24)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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


HALF = (torch.bfloat16, torch.float16)
FLOATING = (*HALF, torch.float32, torch.float64)
buckets = pytest.mark.parametrize("bucket_mb", [TINY, 8], ids=["many-buckets", "one-bucket"])
every_floating = pytest.mark.parametrize("dtype", FLOATING, ids=str)


def rounded_mean(parts: list[torch.Tensor], divisor: int | None = None) -> torch.Tensor:
    """The sum in rank order in at least single precision, divided, rounded once."""
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(parts[0].dtype, parts[0].dtype)
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return (total / (divisor or len(parts))).to(parts[0].dtype)


def numbers(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator(17 + rank), dtype=torch.complex128 if dtype.is_complex else None).to(
        dtype
    )


@every_floating
@buckets
def test_t22_averages_are_rounded_once(ranks: Ranks, dtype: torch.dtype, bucket_mb: float) -> None:
    """Gradients in closed form: the mean of all ranks' numbers, bit for bit, for several sizes of a parameter."""

    def body(comm: Communicator) -> None:
        shapes = [(), (1,), (3,), (4, 5), (129,), (2, 3, 4)]
        parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
        optimizer = heatopt.DataParallelOptimizer(
            torch.optim.SGD(parameters, lr=1.0), comm=comm, bucket_mb=bucket_mb, blocking=bucket_mb == TINY
        )
        torch.stack(
            [(p * numbers(comm.rank, s, dtype)).sum() for p, s in zip(parameters, shapes, strict=True)]
        ).sum().backward()
        for parameter, shape in zip(parameters, shapes, strict=True):
            parts = [numbers(rank, shape, dtype) for rank in range(comm.size)]
            assert parameter.grad.dtype is dtype
            assert_equal(parameter.grad, rounded_mean(parts))
        optimizer.step()
        for parameter, shape in zip(parameters, shapes, strict=True):
            parts = [numbers(rank, shape, dtype) for rank in range(comm.size)]
            assert_equal(parameter, -rounded_mean(parts))

    ranks(body)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_t22_small_numbers_beside_one(ranks: Ranks, dtype: torch.dtype) -> None:
    """1 + 2^-9 is 1 in bfloat16: a sum in that type would lose every small number, one in float32 none."""

    def body(comm: Communicator) -> None:
        small = 2.0**-9
        parameter = nn.Parameter(torch.zeros(8, dtype=dtype))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
        (parameter * (1.0 if comm.rank == 0 else small)).sum().backward()
        expected = torch.full((8,), (1 + (comm.size - 1) * small) / comm.size).to(dtype)
        assert_equal(parameter.grad, expected)
        del optimizer

    ranks(body)


@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
def test_t22_sum_beyond_the_largest_half(ranks: Ranks, dtype: torch.dtype) -> None:
    """The mean of numbers near float16's largest is finite, though their sum is not."""

    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.zeros(4, dtype=dtype))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
        parameter.grad = torch.full((4,), 60000.0, dtype=dtype)
        optimizer.synchronize()
        assert_equal(parameter.grad, torch.full((4,), 60000.0, dtype=dtype))

    ranks(body)


@every_floating
def test_t20_training_keeps_its_dtype(ranks: Ranks, dtype: torch.dtype) -> None:
    def body(comm: Communicator) -> None:
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
        model, expected = net(dtype), net(dtype)
        optimizer, plain = wrap(comm, sgd, model), sgd(expected)
        train(optimizer, model, [batch(step, comm.rank, dtype=dtype) for step in range(3)])
        train(plain, expected, [whole(step, comm.size, dtype=dtype) for step in range(3)])
        assert_close(model, expected, rtol=tolerance, atol=tolerance)
        assert all(t.dtype is dtype for t in model.state_dict().values())
        assert all(s["momentum_buffer"].dtype is dtype for s in optimizer.state.values())
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "LBFGS"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_t21_complex_parameters(ranks: Ranks, dtype: torch.dtype, name: str) -> None:
    def closure_of(optimizer: torch.optim.Optimizer, model: nn.Module, data: Any) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, data)
            loss.backward()
            return loss.detach()

        return closure

    def body(comm: Communicator) -> None:
        single = dtype is torch.complex64
        kind = getattr(torch.optim, name)
        model, expected = (fill(nn.Linear(4, 3, dtype=dtype)) for _ in range(2))
        optimizer = wrap(comm, lambda m: kind(m.parameters(), lr=0.05), model)
        plain = kind(expected.parameters(), lr=0.05)
        for step in range(3):
            for one, module, (x, y) in (
                (optimizer, model, batch(step, comm.rank)),
                (plain, expected, whole(step, comm.size)),
            ):
                data = torch.complex(x, x.flip(0)).to(dtype), torch.complex(y, -y).to(dtype)
                if module is expected:  # flip within each rank's part, as the ranks do
                    parts = [batch(step, rank)[0] for rank in range(comm.size)]
                    data = torch.cat([torch.complex(part, part.flip(0)) for part in parts]).to(dtype), data[1]
                one.step(closure_of(one, module, data))
        assert model.weight.imag.abs().max() > 0.01
        tolerance = {"rtol": 1e-3, "atol": 1e-5} if single else {}
        assert_close(model, expected, **tolerance)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t21_complex_average_in_closed_form(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for dtype in (torch.complex64, torch.complex128):
            parameter = nn.Parameter(torch.zeros(5, dtype=dtype))
            optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0), comm=comm)
            parameter.grad = torch.full((5,), complex(comm.rank + 1, -2.0 * comm.rank), dtype=dtype)
            optimizer.step()
            mean = complex((comm.size + 1) / 2, -(comm.size - 1))
            assert_close(parameter, torch.full((5,), -mean, dtype=dtype))

    ranks(body)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
@buckets
def test_t23_scalars_and_empty_parameters(ranks: Ranks, name: str, bucket_mb: float) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
            self.empty = nn.Parameter(torch.empty(0, 3, dtype=torch.float64))
            self.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
            self.nothing = nn.Parameter(torch.empty(0, dtype=torch.float64))
            self.one = nn.Parameter(torch.full((1, 1, 1), 0.5, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * (x @ self.weight) + self.one.sum() + self.empty.sum() + self.nothing.sum()

    def body(comm: Communicator) -> None:
        def make(model: nn.Module) -> torch.optim.Optimizer:
            return getattr(torch.optim, name)(model.parameters(), lr=0.01)

        model, expected = Odd(), Odd()
        optimizer = wrap(comm, make, model, bucket_mb=bucket_mb)
        train(optimizer, model, [batch(step, comm.rank) for step in range(3)])
        plain = reference(make, expected, comm.size, 3)
        assert [p.grad.shape for p in model.parameters()] == [p.shape for p in model.parameters()]
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t23_only_empty_parameters(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.empty(0, 2))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=0.1), comm=comm)
        parameter.sum().backward()
        optimizer.step()
        assert parameter.grad.shape == (0, 2)

    ranks(body)


@buckets
def test_t24_several_dtypes_in_one_optimizer(ranks: Ranks, bucket_mb: float) -> None:
    """Dtypes alternate, so each bucket takes every fourth parameter: several sequences of buckets at once."""

    def build() -> nn.ParameterList:
        dtypes = [torch.float64, torch.bfloat16, torch.float32, torch.complex64] * 3
        return nn.ParameterList(torch.full((n + 2,), 1.0, dtype=dtype) for n, dtype in enumerate(dtypes))

    def backward(model: nn.ParameterList, weight: float) -> None:
        torch.stack([((n + 1) * weight * p).real.sum().double() for n, p in enumerate(model)]).sum().backward()

    def body(comm: Communicator) -> None:
        model, expected = build(), build()
        optimizer, plain = wrap(comm, sgd, model, bucket_mb=bucket_mb), sgd(expected)
        for _ in range(3):
            optimizer.zero_grad()
            plain.zero_grad()
            backward(model, comm.rank + 1.0)
            backward(expected, (comm.size + 1) / 2)  # halves of small integers: exact in every dtype
            for parameter, wanted in zip(model, expected, strict=True):
                assert parameter.grad.dtype is parameter.dtype
                assert_close(parameter.grad, wanted.grad, rtol=1e-6)
            optimizer.step()
            plain.step()
        assert_close(model, expected, rtol=1e-5)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_t24_dtypes_on_different_ranks_only(ranks: Ranks) -> None:
    """One rank uses the half parameters only, the others the double ones."""

    def body(comm: Communicator) -> None:
        half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        double = nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([half, double], lr=1.0), comm=comm)
        (half if comm.rank == 0 else double).sum().backward()
        optimizer.step()
        assert_equal(half, (torch.ones(3) - (torch.ones(3) / comm.size).bfloat16()).bfloat16())
        assert_close(double, torch.full((2,), 1 / comm.size, dtype=torch.float64))
        assert_ranks_equal(comm, half, double)

    ranks(body)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradient_of_another_dtype(ranks: Ranks) -> None:
    """torch can keep gradients of bfloat16 parameters in single precision: they stay so, unrounded."""

    def body(comm: Communicator) -> None:
        for how in ("backward", "by hand"):
            parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
            parameter.grad_dtype = torch.float32
            optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD([parameter], lr=1.0, foreach=False), comm=comm)
            if how == "backward":
                (parameter.float() * (1 + comm.rank * 2.0**-12)).sum().backward()
            else:
                parameter.grad = torch.full((3,), 1 + comm.rank * 2.0**-12)
            optimizer.synchronize()
            assert parameter.grad.dtype is torch.float32
            if how == "by hand":  # a backward of this graph rounds on its way
                assert_close(parameter.grad, torch.full((3,), 1 + (comm.size - 1) / 2 * 2.0**-12), rtol=1e-6)
            optimizer.step()
            assert_ranks_equal(comm, parameter)
            del optimizer

    ranks(body)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_t19_fused_sgd_in_half_precision_on_a_cpu(ranks: Ranks, dtype: torch.dtype) -> None:
    """torch's own kernel does not update whole vectors: the wrapper says so and takes the loop."""
    count = 100

    def make(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5, fused=fused)

    def build() -> nn.Module:
        return nn.ParameterList([torch.ones(count, dtype=dtype)])

    def body(comm: Communicator) -> list[str]:
        model, expected = build(), build()
        inner = make(model, True)
        optimizer = heatopt.DataParallelOptimizer(inner, comm=comm)
        assert optimizer.param_groups[0]["fused"] is False
        plain = make(expected, False)
        for _ in range(3):
            model[0].grad = torch.ones(count, dtype=dtype)
            expected[0].grad = torch.ones(count, dtype=dtype)
            optimizer.step()
            plain.step()
        assert_equal(model, expected)
        added = nn.Parameter(torch.ones(count, dtype=dtype))
        optimizer.add_param_group({"params": [added], "fused": True})
        assert optimizer.param_groups[1]["fused"] is False
        return []

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ranks(body)
    assert caught
    assert all("fused SGD" in str(warning.message) for warning in caught)
    assert all(warning.category is UserWarning for warning in caught)


def test_t19_fused_elsewhere_stays(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for kind, dtype in ((torch.optim.SGD, torch.float32), (torch.optim.Adam, torch.bfloat16)):
            model, expected = net(dtype), net(dtype)
            optimizer = wrap(comm, lambda m, kind=kind: kind(m.parameters(), lr=0.01, fused=True), model)
            assert optimizer.param_groups[0]["fused"] is True
            plain = kind(expected.parameters(), lr=0.01)
            train(optimizer, model, [batch(step, comm.rank, dtype=dtype) for step in range(3)])
            train(plain, expected, [whole(step, comm.size, dtype=dtype) for step in range(3)])
            tolerance = 1e-5 if dtype is torch.float32 else 5e-2
            assert_close(model, expected, rtol=tolerance, atol=tolerance)
            assert_ranks_equal(comm, model)
            del optimizer

    ranks(body)


def test_nan_and_infinity_reach_all_ranks(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        loss = loss_of(model, batch(0, comm.rank))
        (loss * (torch.nan if comm.rank == comm.size - 1 else 1.0)).backward()
        assert all(g.isnan().all() for g in gradients(model))
        optimizer.zero_grad()
        optimizer.step()
        expected = net()
        assert_equal(model, expected)
        train(optimizer, model, [batch(0, comm.rank)])  # nothing of the NaN is left in the buckets
        reference(sgd, expected, comm.size, 1)
        assert_close(model, expected)

    ranks(body)
