"""What users do with gradients outside of backward and step: keep them, write into them, look at them in hooks."""

from __future__ import annotations

import copy

import pytest
import torch

import heatopt
from heatopt.optim import DataParallelOptimizer


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def mean_rank(comm) -> float:
    return (comm.size + 1) / 2


@pytest.mark.parametrize("keep", [lambda p: p.grad, lambda p: p.grad.detach(), lambda p: p.grad[:1]])
@pytest.mark.parametrize("blocking", [True, False])
def test_a_kept_gradient_is_not_overwritten_by_the_next_backward(ranks, keep, blocking):
    """Gradient surgery: two backward calls, whose gradients are combined by hand."""

    def body(comm):
        weights = [parameter(1.0, 2.0), parameter(3.0)]
        optimizer = DataParallelOptimizer(torch.optim.SGD(weights, lr=1.0), blocking, comm=comm, bucket_mb=1e-5)
        for _ in range(3):
            sum((comm.rank + 1) * w.sum() for w in weights).backward()
            first = [keep(w) for w in weights]
            optimizer.zero_grad()
            sum(10.0 * (comm.rank + 1) * w.sum() for w in weights).backward()
            for kept, w in zip(first, weights, strict=True):
                assert torch.equal(kept, torch.full_like(kept, mean_rank(comm)))
                assert torch.equal(w.grad, torch.full_like(w, 10 * mean_rank(comm)))
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(weights[1].detach(), torch.tensor([3.0 - 30 * mean_rank(comm)], dtype=torch.float64))

    ranks(body)


@pytest.mark.parametrize("write", ["copy_", "zero_grad and add_"])
def test_gradients_written_in_place_after_a_step_are_averaged(ranks, write):
    """``p.grad = g if p.grad is None else p.grad.copy_(g)``, the usual way to set gradients by hand."""

    def body(comm):
        weight = parameter(0.0, 0.0)
        optimizer = DataParallelOptimizer(torch.optim.SGD([weight], lr=1.0), comm=comm)
        for step in range(3):
            gradient = torch.full_like(weight, float(comm.rank + 1)).detach()
            if weight.grad is None:
                weight.grad = gradient
            elif write == "copy_":
                weight.grad.copy_(gradient)
            else:
                optimizer.zero_grad(set_to_none=False)
                weight.grad.add_(gradient)
            optimizer.step()
            expected = torch.full((2,), -(step + 1) * mean_rank(comm), dtype=torch.float64)
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-15, atol=0)
        assert all(torch.equal(weight.detach(), other) for other in comm.all_gather(weight))

    ranks(body)


def test_a_gradient_changed_between_backward_and_step_is_used_as_it_is(ranks):
    def body(comm):
        weight = parameter(0.0)
        optimizer = DataParallelOptimizer(torch.optim.SGD([weight], lr=1.0), comm=comm)
        (weight * (comm.rank + 1)).sum().backward()
        weight.grad.mul_(2)
        optimizer.step()
        assert weight.item() == -2 * mean_rank(comm)

    ranks(body)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("bucket_mb", [1e-5, 8.0])
def test_hooks_registered_after_wrapping_see_the_local_gradient(ranks, blocking, bucket_mb):
    def body(comm):
        weights = [parameter(1.0, 1.0) for _ in range(4)]
        optimizer = DataParallelOptimizer(torch.optim.SGD(weights, lr=1.0), blocking, comm=comm, bucket_mb=bucket_mb)

        def clamp(tensor: torch.Tensor) -> None:
            tensor.grad.clamp_(max=1.5)

        for w in weights:
            w.register_post_accumulate_grad_hook(clamp)
        product = sum((comm.rank + 1) * w.sum() for w in weights)
        product.backward()
        clamped = sum(min(rank + 1.0, 1.5) for rank in range(comm.size)) / comm.size
        for w in weights:
            torch.testing.assert_close(w.grad, torch.full_like(w, clamped), rtol=1e-15, atol=0)
        optimizer.step()

    ranks(body)


def test_a_state_dict_loaded_on_one_rank_only_is_noticed(ranks):
    def body(comm):
        weight = parameter(1.0, 2.0)
        optimizer = DataParallelOptimizer(torch.optim.Adam([weight]), comm=comm)
        weight.sum().backward()
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        if comm.rank == comm.size - 1:
            optimizer.load_state_dict(saved)
        if comm.size > 1:
            with pytest.raises(heatopt.RankMismatchError, match="load_state_dict"):
                optimizer.step()

    ranks(body)


def test_a_state_dict_loaded_on_one_rank_and_broadcast_is_right(ranks):
    def body(comm):
        weight = parameter(1.0, 2.0)
        optimizer = DataParallelOptimizer(torch.optim.Adam([weight]), comm=comm)
        (weight * (comm.rank + 1)).sum().backward()
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        if comm.rank == 0:
            optimizer.load_state_dict(saved)
        heatopt.broadcast_optimizer_state(optimizer, comm=comm)
        optimizer.step()
        assert optimizer.state[weight]["step"].item() == 2
        assert all(torch.equal(weight.detach(), other) for other in comm.all_gather(weight))

    ranks(body)


def test_a_generator_of_owned_parameters_is_refused():
    owned = torch.nn.Linear(2, 2)
    first = DataParallelOptimizer(torch.optim.SGD(owned.parameters(), lr=0.1))
    second = DataParallelOptimizer(torch.optim.SGD([parameter(1.0)], lr=0.1))
    with pytest.raises(ValueError, match="another DataParallelOptimizer"):
        second.add_param_group({"params": owned.parameters()})
    del first
    second.add_param_group({"params": owned.parameters()})
    assert len(second.param_groups) == 2


def test_a_missing_attribute_of_the_wrapped_optimizer_is_pointed_out():
    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None: ...

    optimizer = DataParallelOptimizer(ScheduleFree([parameter(1.0)], lr=0.1))
    with pytest.raises(AttributeError, match=r"\.torch_optimizer\.train"):
        optimizer.train()
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_a_lazy_parameter_is_refused_by_name():
    model = torch.nn.Sequential(torch.nn.LazyLinear(3))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"0\.weight.*forward"):
        DataParallelOptimizer(inner, model=model)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (heatopt.broadcast_parameters, 1),
        (heatopt.broadcast_parameters, "x"),
        (heatopt.sync_buffers, "x"),
        (heatopt.broadcast_optimizer_state, "x"),
    ],
)
def test_helpers_refuse_other_types(function, argument):
    with pytest.raises(TypeError, match=r"must be .*, got"):
        function(argument)
