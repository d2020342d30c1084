"""broadcast_parameters, broadcast_optimizer_state and sync_buffers: for what an optimizer does not own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import heatopt
from tests.ranks._training import (
    ALGORITHMS,
    Algorithm,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    fill,
    generator,
    loss_of,
    net,
    sgd,
    train,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator


class Zoo(nn.Module):
    """Parameters and buffers of every kind that torch has."""

    DTYPES = (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )

    def __init__(self, value: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 2), float(value)))
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).T + value)
        self.scalar = nn.Parameter(torch.tensor(float(value)))
        self.empty = nn.Parameter(torch.empty(0, 4))
        for dtype in self.DTYPES:
            content = torch.full((5,), value % 2 if dtype is torch.bool else value, dtype=dtype)
            self.register_buffer(str(dtype).replace("torch.", "of_"), content)
        self.register_buffer("hidden", torch.tensor([value]), persistent=False)
        self.register_buffer("none", None)


def everything(model: nn.Module) -> list[torch.Tensor]:
    return [t.detach() for t in (*model.parameters(), *model.buffers())]


def test_broadcast_parameters_from_each_rank(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for root in range(comm.size):
            model = Zoo(comm.rank + 1)
            before = [t.data_ptr() for t in everything(model)]
            assert heatopt.broadcast_parameters(model, root, comm) is None
            assert_equal(everything(model), everything(Zoo(root + 1)))
            assert [t.data_ptr() for t in everything(model)] == before
            assert model.turned.stride() == Zoo(0).turned.stride()
        model = Zoo(comm.rank)
        heatopt.broadcast_parameters(model, comm=comm)
        assert_equal(everything(model), everything(Zoo(0)))

    ranks(body)


def test_broadcast_of_a_list_of_tensors(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        tensors = [torch.full((2,), comm.rank), torch.full((3, 3), float(comm.rank), dtype=torch.bfloat16)]
        heatopt.broadcast_parameters(iter(tensors), root=comm.size - 1, comm=comm)
        assert tensors[0].tolist() == [comm.size - 1] * 2
        assert (tensors[1] == comm.size - 1).all()

    ranks(body)


def test_broadcast_keeps_every_bit(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.0])
        model = nn.ParameterList([special if comm.rank == 0 else torch.zeros(5)])
        heatopt.broadcast_parameters(model, comm=comm)
        assert_equal(model[0], special)

    ranks(body)


def test_broadcast_of_many_megabytes(ranks: Ranks) -> None:
    """More than travels at once."""

    def body(comm: Communicator) -> None:
        tensors = [torch.full((700_000,), float(comm.rank + n)) for n in range(3)]
        tensors += [torch.full((5_000_000,), comm.rank, dtype=torch.int32), torch.tensor(comm.rank)]
        heatopt.broadcast_parameters(tensors, comm.size - 1, comm)
        assert [t.flatten()[-1].item() for t in tensors] == [comm.size - 1 + n for n in (0, 1, 2, 0, 0)]
        assert_ranks_equal(comm, tensors)

    ranks(body)


@pytest.mark.parametrize("root", [-1, 99, 0.0, None, "0", True], ids=str)
def test_wrong_root(ranks: Ranks, root: object) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        with pytest.raises((ValueError, TypeError), match="root"):
            heatopt.broadcast_parameters(model, root, comm)  # type: ignore[arg-type]
        with pytest.raises((ValueError, TypeError), match="root"):
            heatopt.broadcast_optimizer_state(sgd(model), root, comm)  # type: ignore[arg-type]

    ranks(body)


def test_different_roots_are_refused(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        with pytest.raises(heatopt.RankMismatchError):
            heatopt.broadcast_parameters(model, comm.rank, comm)
        with pytest.raises(heatopt.RankMismatchError):
            heatopt.broadcast_optimizer_state(sgd(model), comm.rank, comm)
        assert_equal(model, net())

    ranks(body, min_size=2)


def test_different_models_are_refused(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        last = comm.rank == comm.size - 1
        for model in (
            nn.Linear(2, 3 + last),
            nn.Linear(2, 3, bias=last),
            nn.Linear(2, 3).to(torch.float64 if last else None),
        ):
            with pytest.raises(heatopt.RankMismatchError):
                heatopt.broadcast_parameters(model, comm=comm)
        with pytest.raises(heatopt.RankMismatchError):
            heatopt.sync_buffers(nn.BatchNorm1d(3 + last), comm=comm)
        with pytest.raises(heatopt.RankMismatchError):
            heatopt.sync_buffers(nn.BatchNorm1d(3), "broadcast" if last else "mean", comm)
        with pytest.raises(heatopt.RankMismatchError):
            heatopt.broadcast_optimizer_state(adamw(net()) if last else sgd(net()), comm=comm)
        comm.barrier()

    ranks(body, min_size=2)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_broadcast_optimizer_state(ranks: Ranks, algorithm: Algorithm) -> None:
    """Ranks that have trained apart, or not at all, get root's state and options: all go on alike."""

    def body(comm: Communicator) -> None:
        root = comm.size - 1
        for others_have_state in (True, False):
            model = algorithm.model(torch.float32)
            optimizer = algorithm.optimizer(model)
            if comm.rank == root or others_have_state:
                for step in range(2):
                    algorithm.update(optimizer, model, batch(step, comm.rank, dtype=torch.float32))
            if comm.rank == root:
                optimizer.param_groups[0]["lr"] = 0.0625
            expected_model = algorithm.model(torch.float32)
            expected = algorithm.optimizer(expected_model)
            for step in range(2):
                algorithm.update(expected, expected_model, batch(step, root, dtype=torch.float32))
            heatopt.broadcast_parameters(model, root, comm)
            assert heatopt.broadcast_optimizer_state(optimizer, root, comm) is None
            assert optimizer.param_groups[0]["lr"] == 0.0625
            assert_equal(optimizer, expected)
            assert optimizer.state_dict()["state"].keys() == expected.state_dict()["state"].keys()
            algorithm.update(optimizer, model, batch(7, 0, dtype=torch.float32))
            assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_broadcast_state_of_a_wrapper(ranks: Ranks) -> None:
    """State that was loaded on rank 0 alone, after the construction."""

    def body(comm: Communicator) -> None:
        model = net()
        trained = net()
        plain = adamw(trained)
        train(plain, trained, [batch(step, 0) for step in range(2)])
        optimizer = wrap(comm, adamw, model)
        if comm.rank == 0:
            optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
        heatopt.broadcast_optimizer_state(optimizer, comm=comm)
        assert optimizer.state is optimizer.torch_optimizer.state
        assert_equal(optimizer, plain)
        train(optimizer, model, [batch(3, comm.rank)])
        assert_ranks_equal(comm, model, optimizer)

    ranks(body)


def test_broadcast_state_removes_what_root_has_not(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = adamw(model)
        if comm.rank:
            train(optimizer, model, [batch(0, comm.rank)])
        heatopt.broadcast_optimizer_state(optimizer, comm=comm)
        assert not optimizer.state

    ranks(body)


def test_broadcast_state_of_any_kind(ranks: Ranks) -> None:
    """What optimizers outside torch keep: nested lists, dictionaries, numbers, text, None."""

    def body(comm: Communicator) -> None:
        parameter = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        value = float(comm.rank)
        optimizer.state[parameter] = {
            "history": [torch.full((2,), value), {"deep": (torch.full((1,), value), comm.rank)}],
            "name": f"rank {comm.rank}",
            "none": None,
            "integers": torch.tensor([comm.rank]),
        }
        heatopt.broadcast_optimizer_state(optimizer, comm=comm)
        found = optimizer.state[parameter]
        assert found["history"][0].tolist() == [0.0, 0.0]
        assert found["history"][1]["deep"][0].tolist() == [0.0]
        assert found["history"][1]["deep"][1] == 0
        assert isinstance(found["history"][1]["deep"], tuple)
        assert found["name"] == "rank 0"
        assert found["none"] is None
        assert found["integers"].tolist() == [0]

    ranks(body)


def test_broadcast_state_that_refers_to_tensors_in_options(ranks: Ranks) -> None:
    """A learning rate that is a tensor keeps its identity: schedulers write into it."""

    def body(comm: Communicator) -> None:
        rate = torch.tensor(0.1 * (comm.rank + 1))
        optimizer = torch.optim.Adam(net().parameters(), lr=rate, foreach=False)
        heatopt.broadcast_optimizer_state(optimizer, comm=comm)
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(0.1)

    ranks(body)


# Buffers


def with_batchnorm() -> nn.Module:
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)]
    return fill(nn.Sequential(*layers).double())


def test_t11_mean_of_batchnorms_statistics(ranks: Ranks) -> None:
    def statistics(rank: int) -> nn.Module:
        model = with_batchnorm()
        for step in range(rank + 1):
            model(batch(step, rank)[0])
        return model[1]

    def body(comm: Communicator) -> None:
        model = with_batchnorm()
        optimizer = wrap(comm, sgd, model)
        for step in range(comm.rank + 1):
            model(batch(step, comm.rank)[0])
        assert model[1].num_batches_tracked.item() == comm.rank + 1
        heatopt.sync_buffers(model, comm=comm)
        parts = [statistics(rank) for rank in range(comm.size)]
        assert_close(model[1].running_mean, torch.stack([part.running_mean for part in parts]).mean(0))
        assert_close(model[1].running_var, torch.stack([part.running_var for part in parts]).mean(0))
        assert model[1].num_batches_tracked.dtype is torch.int64
        assert model[1].num_batches_tracked.item() == 1  # rank 0's
        assert_ranks_equal(comm, model)
        del optimizer

    ranks(body)


def test_t11_broadcast_of_buffers(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = with_batchnorm()
        model(batch(0, comm.rank)[0])
        heatopt.sync_buffers(model, "broadcast", comm)
        expected = with_batchnorm()
        expected(batch(0, 0)[0])
        assert_equal(model[1], expected[1])

    ranks(body)


def test_t11_optimizer_leaves_buffers_alone(ranks: Ranks) -> None:
    """After the construction, which makes them equal, each rank has its own statistics until it asks for others."""

    def body(comm: Communicator) -> None:
        model = with_batchnorm()
        model[1].running_mean.fill_(comm.rank)
        optimizer = wrap(comm, sgd, model)
        assert not model[1].running_mean.any()
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, batch(step, comm.rank)).backward()
            optimizer.step()
        found = comm.all_gather_object(model[1].running_mean.tolist())
        assert len({tuple(one) for one in found}) == comm.size
        heatopt.sync_buffers(model, comm=comm)
        assert_ranks_equal(comm, model)

    ranks(body)


def test_t11_every_dtype(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for mode in ("mean", "broadcast"):
            model = Zoo(2 * comm.rank)
            before = {name: t.data_ptr() for name, t in model.named_buffers()}
            heatopt.sync_buffers(model, mode, comm)
            for name, buffer in model.named_buffers():
                averaged = mode == "mean" and (buffer.is_floating_point() or buffer.is_complex())
                wanted = comm.size - 1 if averaged else 0
                assert buffer.dtype is getattr(Zoo(0), name).dtype
                assert (buffer == wanted).all(), f"{mode}: {name} is {buffer}"
                assert buffer.data_ptr() == before[name]
            assert model.weight.flatten()[0].item() == 2 * comm.rank  # parameters are the optimizer's

    ranks(body)


def test_t11_nothing_to_do_and_wrong_mode(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        heatopt.sync_buffers(net(), comm=comm)
        for wrong in ("sum", "", None, 1):
            with pytest.raises(ValueError, match="mode"):
                heatopt.sync_buffers(net(), wrong, comm)  # type: ignore[arg-type]

    ranks(body)


def test_helpers_leave_the_random_state_alone(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = with_batchnorm()
        optimizer = adamw(model)
        comm.barrier()  # the threads share the generator
        before = torch.get_rng_state()
        heatopt.broadcast_parameters(model, comm=comm)
        heatopt.broadcast_optimizer_state(optimizer, comm=comm)
        heatopt.sync_buffers(model, comm=comm)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.rand(1, generator=generator(0)).item() >= 0
        comm.barrier()

    ranks(body)


def test_default_communicator_is_the_world(ranks: Ranks) -> None:
    """Threads have no world of their own: there, each is alone."""
    if ranks.size > 1 and heatopt.world().size == 1:
        pytest.skip("ranks are threads")

    def body(comm: Communicator) -> None:
        model = net(seed=comm.rank)
        heatopt.broadcast_parameters(model)
        assert_equal(model, net(seed=0))
        heatopt.broadcast_optimizer_state(sgd(model))
        heatopt.sync_buffers(model)

    ranks(body)
