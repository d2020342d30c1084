"""The memory of a bucket: gradients go in, averages come out as views of it. The reduction is played by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn import Parameter

from heatopt.buckets import Bucket, ParameterSpec, plan_buckets


def make_bucket(parameters: Sequence[Parameter]) -> Bucket:
    """The one bucket of the parameters, in the memory an ordinary communicator gives."""
    specs = [ParameterSpec(i, f"p{i}", tuple(p.shape), p.dtype, p.device) for i, p in enumerate(parameters)]
    (plan,) = plan_buckets(specs, 2**30)
    memory = torch.zeros(plan.numel, dtype=plan.dtype)
    return Bucket(plan, memory, [parameters[slot.index] for slot in plan.slots])


def zeros(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def fill(parameters: Sequence[Parameter], *values: float | None) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = None if value is None else torch.full_like(parameter, value)


def grads(parameters: Sequence[Parameter]) -> list[list[float] | None]:
    return [None if p.grad is None else p.grad.flatten().tolist() for p in parameters]


def reduce_with(*others: Bucket) -> Callable[[Bucket], None]:
    """What a reduction over ranks does to the memory."""

    def reduce(bucket: Bucket) -> None:
        for other in others:
            bucket.memory += other.memory
        bucket.memory /= 1 + len(others)

    return reduce


def test_alone_gradients_come_out_as_they_went_in() -> None:
    parameters = zeros((2, 3), (), (0, 4), (5,))
    bucket = make_bucket(parameters)
    fill(parameters, 1.0, 2.0, 3.0, 4.0)
    bucket.pack(detach=True)
    bucket.reveal()
    assert grads(parameters) == [[1.0] * 6, [2.0], [], [4.0] * 5]
    assert [p.grad.shape for p in parameters if p.grad is not None] == [p.shape for p in parameters]


def test_gradients_are_views_of_the_memory() -> None:
    parameters = zeros((2, 3), (), (5,))
    bucket = make_bucket(parameters)
    fill(parameters, 1.0, 2.0, 3.0)
    bucket.pack(detach=True)
    bucket.reveal()
    bucket.memory.fill_(7.0)
    assert grads(parameters) == [[7.0] * 6, [7.0], [7.0] * 5]


def test_mean_of_two_ranks() -> None:
    ours, theirs = zeros((3,), (2,)), zeros((3,), (2,))
    bucket, other = make_bucket(ours), make_bucket(theirs)
    fill(ours, 1.0, 2.0)
    fill(theirs, 3.0, 6.0)
    bucket.pack(detach=True)
    other.pack(detach=True)
    reduce_with(other)(bucket)
    bucket.reveal()
    assert grads(ours) == [[2.0] * 3, [4.0] * 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("count", [2, 3, 1024])
def test_gradient_of_one_rank_reaches_those_without(dtype: torch.dtype, count: int) -> None:
    """The flag of one rank among many is still there after the division; that of none is not."""
    parameters = zeros((3,), (3,), (3,), dtype=dtype)
    bucket = make_bucket(parameters)
    fill(parameters, 1.0, None, None)
    other_parameters = zeros((3,), (3,), (3,), dtype=dtype)
    other = make_bucket(other_parameters)
    fill(other_parameters, None, 1.0, None)
    bucket.pack(detach=True)
    other.pack(detach=True)
    bucket.memory += other.memory
    bucket.memory /= count
    bucket.reveal()
    mean = torch.tensor(1 / count, dtype=dtype).item()
    assert grads(parameters) == [[mean] * 3, [mean] * 3, None]


def test_rank_without_any_gradient() -> None:
    ours, theirs = zeros((3,), (2,)), zeros((3,), (2,))
    bucket, other = make_bucket(ours), make_bucket(theirs)
    fill(theirs, 3.0, None)
    bucket.memory.fill_(99.0)  # left over from an earlier step
    bucket.pack(detach=True)
    other.pack(detach=True)
    reduce_with(other)(bucket)
    bucket.reveal()
    assert grads(ours) == [[1.5] * 3, None]


def test_leftovers_of_an_earlier_step_do_not_count() -> None:
    parameters = zeros((3,), (2,))
    bucket = make_bucket(parameters)
    for values, expected in (((1.0, 2.0), [[1.0] * 3, [2.0] * 2]), ((None, 5.0), [None, [5.0] * 2])):
        fill(parameters, *values)
        bucket.pack(detach=True)
        bucket.reveal()
        assert grads(parameters) == expected
    fill(parameters, None, None)
    bucket.pack(detach=True)
    assert bucket.memory.count_nonzero() == 0
    bucket.reveal()
    assert grads(parameters) == [None, None]


def test_rank_without_data_contributes_nothing() -> None:
    parameters = zeros((3,))
    bucket = make_bucket(parameters)
    fill(parameters, 4.0)
    bucket.pack_nothing()
    assert bucket.memory.count_nonzero() == 0
    assert grads(parameters) == [[4.0] * 3]


def test_nothing_accumulates_into_memory_on_the_wire() -> None:
    """Between pack and reveal parameters have no gradient; what arrives meanwhile is added to the average."""
    parameters = zeros((3,), (2,))
    bucket = make_bucket(parameters)
    fill(parameters, 1.0, 1.0)
    bucket.pack(detach=True)
    bucket.reveal()
    bucket.pack(detach=True)
    assert grads(parameters) == [None, None]
    (parameters[0] * 2.0).sum().backward()
    bucket.memory *= 10.0
    bucket.reveal()
    assert grads(parameters) == [[12.0] * 3, [10.0] * 2]


def test_late_gradient_of_a_parameter_without_average_is_kept() -> None:
    parameters = zeros((3,))
    bucket = make_bucket(parameters)
    bucket.pack(detach=True)
    (parameters[0] * 2.0).sum().backward()
    bucket.reveal()
    assert grads(parameters) == [[2.0] * 3]


def test_gradient_is_not_copied_twice() -> None:
    """Backward accumulates into the views, so from the second step on nothing is copied."""
    parameters = zeros((3,), (2, 2))
    bucket = make_bucket(parameters)
    fill(parameters, 1.0, 1.0)
    bucket.pack(detach=True)
    bucket.reveal()
    views = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.zero_()
        (parameter * 3.0).sum().backward()
    bucket.pack(detach=True)
    bucket.reveal()
    assert all(parameter.grad is view for parameter, view in zip(parameters, views, strict=True))
    assert grads(parameters) == [[3.0] * 3, [3.0] * 4]


@pytest.mark.parametrize(
    "parameter",
    [
        pytest.param(torch.zeros(4, 3).t(), id="transposed"),
        pytest.param(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(torch.zeros(5, 1, 3).permute(2, 1, 0), id="with a dimension of 1"),
        pytest.param(torch.zeros(()), id="no dimension"),
        pytest.param(torch.zeros(3, 0), id="empty"),
    ],
)
def test_gradient_has_the_strides_of_the_parameter(parameter: torch.Tensor) -> None:
    """As torch itself gives them: optimizers are fast on equal strides."""
    parameters = [Parameter(parameter)]
    bucket = make_bucket(parameters)
    values = torch.arange(float(parameter.numel())).view(parameter.shape)
    parameters[0].grad = values.clone()
    bucket.pack(detach=True)
    bucket.reveal()
    assert parameters[0].grad is not None
    assert parameters[0].grad.stride() == parameters[0].stride()
    assert torch.equal(parameters[0].grad, values)


@pytest.mark.parametrize(
    "parameter",
    [
        pytest.param(torch.zeros(3, 8)[:, ::2], id="with gaps"),
        pytest.param(torch.zeros(3, 1).expand(3, 4), id="expanded"),
        pytest.param(torch.zeros(8).as_strided((3, 4), (1, 1)), id="overlapping"),
    ],
)
def test_strides_that_do_not_cover_memory_are_not_taken_over(parameter: torch.Tensor) -> None:
    parameters = [Parameter(parameter)]
    bucket = make_bucket(parameters)
    values = torch.arange(12.0).view(3, 4)
    parameters[0].grad = values.clone()
    bucket.pack(detach=True)
    bucket.reveal()
    assert parameters[0].grad is not None
    assert parameters[0].grad.is_contiguous()
    assert torch.equal(parameters[0].grad, values)


@pytest.mark.parametrize(
    "gradient",
    [
        pytest.param(lambda: torch.arange(12.0).view(4, 3).t(), id="transposed"),
        pytest.param(lambda: torch.ones(1).expand(3, 4), id="expanded"),
        pytest.param(lambda: torch.arange(24.0).view(3, 8)[:, ::2], id="with gaps"),
        pytest.param(lambda: torch.ones(3, 4, requires_grad=True) * 2.0, id="with a graph"),
    ],
)
def test_gradient_of_any_kind_is_packed(gradient: Callable[[], torch.Tensor]) -> None:
    parameters = zeros((3, 4))
    bucket = make_bucket(parameters)
    parameters[0].grad = gradient()
    expected = parameters[0].grad.detach().clone()
    bucket.pack(detach=True)
    bucket.reveal()
    assert parameters[0].grad is not None
    assert torch.equal(parameters[0].grad, expected)
    assert not parameters[0].grad.requires_grad


def test_sparse_gradient_is_left_alone() -> None:
    parameters = zeros((3, 2), (2,))
    bucket = make_bucket(parameters)
    sparse = torch.eye(3, 2).to_sparse(1)
    parameters[0].grad = sparse
    parameters[1].grad = torch.ones(2)
    bucket.pack(detach=True)
    assert parameters[0].grad is sparse
    bucket.reveal()
    assert parameters[0].grad is sparse
    assert grads(parameters[1:]) == [[1.0, 1.0]]


def test_parameter_of_another_dtype_now_is_left_alone() -> None:
    """The model was converted; a new plan follows."""
    parameters = zeros((3,), (2,))
    bucket = make_bucket(parameters)
    fill(parameters, 1.0, 2.0)
    module = torch.nn.ParameterList(parameters[:1]).double()
    assert module[0] is parameters[0]
    bucket.pack(detach=True)
    bucket.reveal()
    assert parameters[0].grad is not None
    assert parameters[0].grad.dtype is torch.float64
    assert grads(parameters) == [[1.0] * 3, [2.0] * 2]


def test_exchanged_storage_of_a_view_is_noticed() -> None:
    parameters = zeros((3,))
    bucket = make_bucket(parameters)
    fill(parameters, 1.0)
    bucket.pack(detach=True)
    bucket.reveal()
    assert parameters[0].grad is not None
    parameters[0].grad.data = torch.full((3,), 5.0)
    bucket.pack(detach=True)
    bucket.memory *= 2.0
    bucket.reveal()
    assert grads(parameters) == [[10.0] * 3]


class TestForeignGradients:
    """A gradient is foreign if it is not what the last reduction left."""

    def reduced(self) -> tuple[Bucket, list[Parameter]]:
        parameters = zeros((3,), (2,), (2,))
        bucket = make_bucket(parameters)
        fill(parameters, 1.0, 2.0, None)
        bucket.pack(detach=True)
        bucket.reveal()
        return bucket, parameters

    def test_none_at_first(self) -> None:
        assert not make_bucket(zeros((3,))).has_foreign_gradients()

    def test_set_by_hand_at_first(self) -> None:
        parameters = zeros((3,))
        bucket = make_bucket(parameters)
        fill(parameters, 1.0)
        assert bucket.has_foreign_gradients()

    def test_none_after_a_reduction(self) -> None:
        bucket, _ = self.reduced()
        assert not bucket.has_foreign_gradients()

    def test_changing_averages_in_place_is_the_user_s_right(self) -> None:
        """Clipping, unscaling, zeroing."""
        bucket, parameters = self.reduced()
        for parameter in parameters[:2]:
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)
        assert not bucket.has_foreign_gradients()

    def test_cleared(self) -> None:
        bucket, parameters = self.reduced()
        parameters[0].grad = None
        assert not bucket.has_foreign_gradients()

    @pytest.mark.parametrize("position", [0, 2], ids=["had one", "had none"])
    def test_replaced(self, position: int) -> None:
        bucket, parameters = self.reduced()
        parameters[position].grad = torch.ones_like(parameters[position])
        assert bucket.has_foreign_gradients()

    def test_told(self) -> None:
        bucket, _ = self.reduced()
        bucket.changed = True
        assert bucket.has_foreign_gradients()
