"""Sparse gradients (T4): indices and values travel, and the averages are those of one process."""

from __future__ import annotations

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
    loss_of,
    reference,
    train,
    whole,
    words,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

# torch's Adagrad and SGD make sparse tensors of their own without checks, and say so once.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")

Indices = Callable[[int, int], list[int]]

INDEX_SETS: dict[str, Indices] = {
    "disjoint": lambda rank, size: [2 * rank, 2 * rank + 1],
    "overlapping": lambda rank, size: [rank, rank + 1, 3],
    "equal": lambda rank, size: [5, 1],
    "repeated": lambda rank, size: [4, 4, rank, 4],
    "empty on the first": lambda rank, size: [] if rank == 0 else [rank, 2],
    "empty on the last": lambda rank, size: [1, 2] if rank < size - 1 else [],
    "empty on all": lambda rank, size: [],
    "unequal lengths": lambda rank, size: list(range(rank + 1)),
}

MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
    "SparseAdam": lambda model: torch.optim.SparseAdam(model.parameters(), lr=0.1),
}


def embedding() -> nn.Module:
    return fill(nn.Embedding(10, 3, sparse=True, dtype=torch.float64))


def backward(model: nn.Module, indices: list[int], weight: float) -> None:
    (model(torch.tensor(indices, dtype=torch.int64)).square().sum() * weight).backward()


@pytest.mark.parametrize("with_model", [True, False], ids=["model", "no-model"])
@pytest.mark.parametrize("name", INDEX_SETS)
def test_t04_index_sets(ranks: Ranks, name: str, with_model: bool) -> None:
    """Without ``model=`` the wrapper learns only at the first backward that the gradients are sparse."""
    indices = INDEX_SETS[name]

    def body(comm: Communicator) -> None:
        for algorithm, make in MAKERS.items():
            model, expected = embedding(), embedding()
            optimizer = wrap(comm, make, model, **({} if with_model else {"model": None}))
            plain = make(expected)
            for _ in range(3):
                optimizer.zero_grad()
                plain.zero_grad()
                backward(model, indices(comm.rank, comm.size), comm.rank + 1.0)
                for rank in range(comm.size):
                    backward(expected, indices(rank, comm.size), (rank + 1.0) / comm.size)
                gradient = model.weight.grad
                assert gradient.is_sparse
                assert_close(gradient.to_dense(), expected.weight.grad.to_dense())
                assert_ranks_equal(comm, gradient)
                optimizer.step()
                plain.step()
            assert_close(model, expected)
            assert_ranks_equal(comm, model, optimizer)
            assert set(comm.all_gather_object(algorithm)) == {algorithm}
            del optimizer

    ranks(body)


@pytest.mark.parametrize("name", MAKERS)
def test_t04_training(ranks: Ranks, name: str) -> None:
    make = MAKERS[name]

    def body(comm: Communicator) -> None:
        model, expected = words(), words()
        optimizer = wrap(comm, make, model)
        train(optimizer, model, [batch(step, comm.rank) for step in range(4)])
        plain = reference(make, expected, comm.size, 4)
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("name", MAKERS)
def test_t04_existing_state(ranks: Ranks, name: str) -> None:
    """SGD's momentum of sparse gradients is sparse itself; it is kept, and becomes that of rank 0."""
    make = MAKERS[name]

    def body(comm: Communicator) -> None:
        model, expected = words(), words()
        inner, plain = make(model), make(expected)
        train(inner, model, [batch(comm.rank, comm.rank)])  # the ranks have trained apart
        train(plain, expected, [batch(0, 0)])
        optimizer = heatopt.DataParallelOptimizer(inner, model=model, comm=comm)
        assert_equal(model, expected)
        train(optimizer, model, [batch(step, comm.rank) for step in range(1, 3)])
        train(plain, expected, [whole(step, comm.size) for step in range(1, 3)])
        assert_close(model, expected)
        assert_close(optimizer, plain)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


class Mixed(nn.Module):
    """Sparse and dense parameters, of which not all are used on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(6, 3, sparse=True)
        self.dense = nn.Linear(3, 3)
        self.bag = nn.EmbeddingBag(6, 3, sparse=True, mode="sum")
        self.unused = nn.Embedding(4, 3, sparse=True)
        fill(self.double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = (x * 10).long().remainder(6)
        return self.dense(self.first(tokens).mean(1)) + self.bag(tokens)


@pytest.mark.parametrize("bucket_mb", [TINY, 8], ids=["many-buckets", "one-bucket"])
def test_t04_sparse_beside_dense(ranks: Ranks, bucket_mb: float) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(model.parameters(), lr=0.1)

    def body(comm: Communicator) -> None:
        for with_model in (True, False):
            model, expected = Mixed(), Mixed()
            options: dict[str, Any] = {"bucket_mb": bucket_mb} | ({} if with_model else {"model": None})
            optimizer = wrap(comm, make, model, **options)
            train(optimizer, model, [batch(step, comm.rank) for step in range(3)])
            plain = reference(make, expected, comm.size, 3)
            assert_close(model, expected)
            assert_close(optimizer, plain)
            assert model.unused.weight.grad is None
            assert_ranks_equal(comm, model, optimizer)
            del optimizer

    ranks(body)


def test_t04_some_ranks_have_no_gradient(ranks: Ranks) -> None:
    """None on a rank is a zero there, None on all ranks stays None."""

    def body(comm: Communicator) -> None:
        for with_model in (True, False):
            model, expected = embedding(), embedding()
            optimizer = wrap(comm, MAKERS["SGD"], model, **({} if with_model else {"model": None}))
            optimizer.step()
            assert model.weight.grad is None
            if comm.rank == comm.size - 1:
                backward(model, [1, 2], 1.0)
            optimizer.step()
            backward(expected, [1, 2], 1.0 / comm.size)
            MAKERS["SGD"](expected).step()
            assert_close(model, expected)
            assert model.weight.grad.is_sparse
            assert_ranks_equal(comm, model)
            del optimizer

    ranks(body)


def test_t04_accumulation(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = words(), words()
        optimizer, plain = wrap(comm, MAKERS["SGD"], model), MAKERS["SGD"](expected)
        for step in range(2):
            optimizer.zero_grad()
            plain.zero_grad()
            with optimizer.no_sync():
                loss_of(model, batch(10 * step, comm.rank)).backward()
            loss_of(model, batch(10 * step + 1, comm.rank)).backward()
            loss_of(model, batch(10 * step + 2, comm.rank)).backward()
            for number in range(3):
                loss_of(expected, whole(10 * step + number, comm.size)).backward()
            optimizer.step()
            plain.step()
        assert_close(model, expected)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t04_set_by_hand(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = embedding()
        optimizer = wrap(comm, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), model)
        indices = torch.tensor([[comm.rank, comm.rank]])  # twice the same: not coalesced
        values = torch.full((2, 3), 0.5, dtype=torch.float64)
        model.weight.grad = torch.sparse_coo_tensor(indices, values, (10, 3), check_invariants=True)
        optimizer.step()
        wanted = embedding().weight.detach()
        wanted[: comm.size] -= 1.0 / comm.size
        assert_close(model.weight, wanted)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t04_dense_on_one_rank_sparse_on_another(ranks: Ranks) -> None:
    """Some ranks compute the same parameter's gradient in another way."""

    def body(comm: Communicator) -> None:
        for with_model in (True, False):
            model = embedding()
            optimizer = wrap(
                comm,
                lambda m: torch.optim.SGD(m.parameters(), lr=1.0),
                model,
                **({} if with_model else {"model": None}),
            )
            if comm.rank == 0:
                model.weight.sum().backward()
            else:
                model(torch.tensor([1])).sum().backward()
            optimizer.step()
            wanted = embedding().weight.detach() - 1.0 / comm.size
            wanted[1] -= (comm.size - 1) / comm.size
            assert_close(model.weight, wanted)
            assert_ranks_equal(comm, model)
            del optimizer

    ranks(body)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Muon"])
def test_t04_algorithms_that_refuse_sparse_gradients(ranks: Ranks, name: str) -> None:
    """They refuse them as in one process, on all ranks."""

    def body(comm: Communicator) -> None:
        model = embedding()
        optimizer = wrap(comm, lambda m: getattr(heatopt, name)(m.parameters(), lr=0.1), model)
        backward(model, [comm.rank], 1.0)
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
        assert_equal(model, embedding())

    ranks(body)


def test_t04_dense_gradient_for_sparse_adam(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        plain_model = embedding()
        plain = torch.optim.SparseAdam(plain_model.parameters())
        plain_model.weight.sum().backward()
        with pytest.raises(RuntimeError, match="dense"):
            plain.step()
        model = embedding()
        optimizer = wrap(comm, lambda m: torch.optim.SparseAdam(m.parameters()), model)
        model.weight.sum().backward()
        if comm.size == 1:
            with pytest.raises(RuntimeError, match="dense"):
                optimizer.step()
        else:  # averages of parameters known as sparse are sparse: nothing is lost
            optimizer.step()
            assert_ranks_equal(comm, model)

    ranks(body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_t04_dtypes(ranks: Ranks, dtype: torch.dtype) -> None:
    """Values are summed in single precision and rounded once."""

    def body(comm: Communicator) -> None:
        model = nn.Embedding(4, 2, sparse=True, dtype=dtype)
        fill(model)
        optimizer = wrap(comm, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), model)
        value = 1.0 if comm.rank == 0 else 2.0**-9
        (model(torch.tensor([1])) * value).sum().backward()
        exact = (1 + (comm.size - 1) * 2.0**-9) / comm.size
        wanted = torch.zeros(4, 2, dtype=dtype)
        wanted[1] = torch.tensor(exact, dtype=torch.float32).to(dtype)
        assert model.weight.grad.dtype is dtype
        assert_equal(model.weight.grad.to_dense(), wanted)
        optimizer.step()
        assert_ranks_equal(comm, model)

    ranks(body)
