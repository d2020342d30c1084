"""Gradients that backward adds to what lies in the bucket already; see [Note: Preset gradients]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from heatopt.buckets import Bucket, ParameterSpec, plan_buckets

SHAPES = ((2, 3), (), (0, 4), (5,))


class Pass:
    """Stands for a backward pass that is running."""


def reduced(*shapes: tuple[int, ...]) -> tuple[list[Parameter], Bucket]:
    """Parameters, and their bucket after a reduction that has left a gradient of each, which has been cleared."""
    parameters = [Parameter(torch.zeros(shape)) for shape in shapes]
    specs = [ParameterSpec(i, f"p{i}", tuple(p.shape), p.dtype, p.device) for i, p in enumerate(parameters)]
    (plan,) = plan_buckets(specs, 2**30)
    bucket = Bucket(plan, torch.zeros(plan.numel), [parameters[slot.index] for slot in plan.slots])
    reduce(parameters, bucket, 3.0)
    return parameters, bucket


def reduce(parameters: Sequence[Parameter], bucket: Bucket, value: float) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)
    finish(bucket)
    clear(parameters)


def finish(bucket: Bucket) -> None:
    bucket.pack(detach=False)
    bucket.reveal()


def clear(parameters: Sequence[Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def grads(parameters: Sequence[Parameter]) -> list[list[float] | None]:
    return [None if p.grad is None else p.grad.flatten().tolist() for p in parameters]


def on_each_gradient(parameter: Parameter, hook: Callable[[Parameter], object]) -> Any:
    register: Any = parameter.register_post_accumulate_grad_hook
    return register(hook)


def preset_by_backward(bucket: Bucket, running: Pass, parameters: Sequence[Parameter], *factors: float) -> None:
    """Multiply some parameters' gradients of a real backward; its first gradient presets the others."""
    hooks = [on_each_gradient(p, lambda _: bucket.preset(running)) for p in parameters]
    sum(factor * p.sum() for factor, p in zip(factors, parameters, strict=True)).backward()  # type: ignore[union-attr]
    for hook in hooks:
        hook.remove()


def test_backward_adds_to_zeros_in_the_bucket() -> None:
    parameters, bucket = reduced(*SHAPES)
    running = Pass()
    preset_by_backward(bucket, running, parameters, 1.0, 2.0, 3.0, 4.0)
    start, end = bucket.memory.data_ptr(), bucket.memory.data_ptr() + bucket.memory.nbytes
    assert all(p.grad is not None and start <= p.grad.data_ptr() < end for p in parameters if p.numel())
    assert bucket.release()
    assert not bucket.release()
    assert not bucket.is_aliased()
    assert bucket._may_preset
    finish(bucket)
    assert grads(parameters) == [[1.0] * 6, [2.0], [], [4.0] * 5]
    assert bucket.present == [True] * 4


def test_what_backward_does_not_reach_has_no_gradient() -> None:
    parameters, bucket = reduced(*SHAPES)
    running = Pass()
    preset_by_backward(bucket, running, parameters[1:3], 2.0, 3.0)
    assert grads(parameters) == [[0.0] * 6, [2.0], [], [0.0] * 5]  # until the end
    finish(bucket)
    assert grads(parameters) == [None, [2.0], [], None]
    order = [next(k for k, p in enumerate(parameters) if p is own) for own in bucket.parameters]
    assert [order[k] for k, present in enumerate(bucket.present) if present] == [k for k in order if k in (1, 2)]


def test_a_pass_that_ends_otherwise_leaves_what_it_has_made() -> None:
    parameters, bucket = reduced(*SHAPES)
    running = Pass()
    preset_by_backward(bucket, running, parameters[:2], 2.0, 3.0)
    del running
    assert grads(parameters) == [[2.0] * 6, [3.0], None, None]
    parameters[3].grad = torch.full((5,), 7.0)  # set by hand: stays
    assert bucket.release()
    assert grads(parameters) == [[2.0] * 6, [3.0], None, [7.0] * 5]


def test_a_gradient_that_is_exchanged_meanwhile_stays() -> None:
    parameters, bucket = reduced(*SHAPES)
    running = Pass()
    preset_by_backward(bucket, running, parameters[:1], 2.0)
    parameters[1].grad = torch.zeros(())
    parameters[3].grad = None
    finish(bucket)
    assert grads(parameters) == [[2.0] * 6, [0.0], None, None]


@pytest.mark.parametrize(
    "why",
    ["one had none", "accumulating", "kept", "kept view", "sparse", "another dtype", "exchanged storage", "graph"],
)
def test_where_backward_must_not_add_in_place(why: str) -> None:
    parameters, bucket = reduced((2, 3), (4,), (5,))
    kept: list[torch.Tensor] = []
    if why == "one had none":
        parameters[0].grad = torch.ones(2, 3)
        finish(bucket)
        clear(parameters)
    elif why == "accumulating":
        parameters[2].grad = torch.ones(5)
    elif why in ("kept", "kept view", "exchanged storage"):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        finish(bucket)
        grad = parameters[1].grad
        assert grad is not None
        if why == "exchanged storage":
            grad.data = torch.zeros(4)
        else:
            kept.append(grad if why == "kept" else grad[1:])
        clear(parameters)
    first = torch.full((2, 3), 5.0)
    if why == "sparse":
        first = first.to_sparse()
    elif why == "graph":
        first.requires_grad_()
    if why == "another dtype":
        parameters[2].data = parameters[2].data.double()
    parameters[0].grad = first
    before = bucket.memory.clone()
    running = Pass()
    bucket.preset(running)
    assert parameters[0].grad is first
    assert [p.grad is None for p in parameters] == [False, True, why != "accumulating"]
    assert not bucket.release()
    assert [tensor.tolist() for tensor in kept] == [[1.0] * tensor.numel() for tensor in kept]
    if why != "another dtype":  # which is found out last
        assert torch.equal(bucket.memory, before)


def test_kept_gradients_are_those_of_the_pass() -> None:
    """They stay what they were when a hook saw them, and no more are preset."""
    parameters, bucket = reduced(*SHAPES)
    kept: list[torch.Tensor] = []
    hook = on_each_gradient(parameters[3], lambda p: kept.append(p.grad))  # type: ignore[arg-type]
    running = Pass()
    preset_by_backward(bucket, running, parameters[2:], 2.0, 3.0)
    hook.remove()
    assert bucket.release()
    finish(bucket)
    assert not bucket.is_aliased()
    bucket.memory.fill_(9.0)
    assert grads(parameters) == [None, None, [], [9.0] * 5]
    assert kept[0].tolist() == [3.0] * 5
    clear(parameters)
    parameters[0].grad = torch.ones(2, 3)
    bucket.preset(running)
    assert not bucket.release()


def test_larger_gradients_are_not_preset() -> None:
    """On average 32 KiB."""
    for numel, preset in ((8 * 1024 - 1024, True), (8 * 1024 + 1024, False)):
        parameters, bucket = reduced((numel,), (numel,))
        parameters[0].grad = torch.ones(numel)
        running = Pass()
        bucket.preset(running)
        assert (parameters[1].grad is not None) is preset
        assert bucket.release() is preset
