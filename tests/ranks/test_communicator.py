"""The contract of a communicator, the same for threads, MPI, torch.distributed and one process: what comes out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.tensors import (
    DTYPES,
    LARGE,
    OPS_AND_DTYPES,
    SHAPES,
    all_values,
    assert_same,
    assert_usable,
    name_of,
    reduced,
    values,
)

if TYPE_CHECKING:
    from heatopt.comm import Communicator
    from tests.support.ranks import Ranks


# Reductions


@pytest.mark.parametrize(("op", "dtype"), OPS_AND_DTYPES, ids=name_of)
def test_allreduce(ranks: Ranks, op: str, dtype: torch.dtype) -> None:
    def body(comm: Communicator) -> None:
        for salt, shape in enumerate(SHAPES):
            parts = all_values(comm, shape, dtype, salt)
            own = parts[comm.rank].clone()
            address = own.data_ptr()
            assert comm.allreduce(own, op) is own
            assert own.data_ptr() == address
            assert_same(own, reduced(parts, op))

    ranks(body)


@pytest.mark.parametrize(("dtype", "count"), LARGE.items(), ids=name_of)
def test_allreduce_of_several_pieces(ranks: Ranks, dtype: torch.dtype, count: int) -> None:
    def body(comm: Communicator) -> None:
        parts = all_values(comm, (count,), dtype)
        own = parts[comm.rank].clone()
        comm.allreduce(own, "sum")
        assert_same(own, reduced(parts, "sum"))

    ranks(body)


def test_allreduce_sums_unless_told_otherwise(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        assert comm.allreduce(torch.tensor(3.0)).item() == 3.0 * comm.size
        assert comm.allreduce_async(torch.tensor(3.0)).wait().item() == 3.0 * comm.size
        assert comm.reduce_scatter(torch.full((comm.size,), 3.0)).item() == 3.0 * comm.size

    ranks(body)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("count", [5, 9000])
def test_half_types_add_up_in_single_precision(ranks: Ranks, dtype: torch.dtype, count: int) -> None:
    half_unit = torch.finfo(dtype).eps / 2

    def body(comm: Communicator) -> None:
        # Each addition of half a unit in the last place would be rounded away; together they are not.
        own = torch.full((count,), 1.0 if comm.rank == 0 else half_unit, dtype=dtype)
        exact = torch.full((count,), 1.0 + (comm.size - 1) * half_unit)
        comm.allreduce(own)
        assert_same(own, exact.to(dtype))

    ranks(body)


@pytest.mark.parametrize("count", [3, 9000])
def test_mean_of_half_types_does_not_overflow(ranks: Ranks, count: int) -> None:
    def body(comm: Communicator) -> None:
        own = torch.full((count,), 60000.0, dtype=torch.float16)  # the sum of two is beyond the largest float16
        assert_same(comm.allreduce(own.clone(), "mean"), own)
        rows = own.repeat(comm.size, 1)
        assert_same(comm.reduce_scatter(rows, "mean")[0], own)

    ranks(body)


def test_sums_depend_neither_on_length_nor_on_position(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        long = values(comm.rank, (20_000,), torch.float32)
        pieces = [long[start : start + 1000].clone() for start in range(0, 20_000, 1000)]
        comm.allreduce(long)
        for number, piece in enumerate(pieces):
            assert_same(comm.allreduce(piece), long[1000 * number : 1000 * (number + 1)])

    ranks(body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("op", ["sum", "mean", "max", "min"])
def test_nan_and_infinity_reach_all_ranks(ranks: Ranks, dtype: torch.dtype, op: str) -> None:
    def body(comm: Communicator) -> None:
        last = comm.rank == comm.size - 1
        own = torch.tensor([math.nan, math.inf, -math.inf] if last else [1.0, 1.0, 1.0], dtype=dtype)
        nan, high, low = comm.allreduce(own, op).tolist()
        assert math.isnan(nan)
        alone = comm.size == 1
        assert high == (1.0 if op == "min" and not alone else math.inf)
        assert low == (1.0 if op == "max" and not alone else -math.inf)

    ranks(body)


def test_all_ranks_get_the_same_bits(ranks: Ranks) -> None:
    def body(comm: Communicator) -> bytes:
        floats = comm.allreduce(values(comm.rank, (30_011,), torch.float32), "mean")
        halves = comm.allreduce(values(comm.rank, (30_011,), torch.bfloat16), "mean")
        return floats.numpy().tobytes() + halves.view(torch.int16).numpy().tobytes()

    assert len(set(ranks(body))) == 1


# Memory layouts


def strided(base: torch.Tensor, kind: str) -> torch.Tensor:
    views: dict[str, Callable[[], torch.Tensor]] = {
        "transposed": lambda: base.permute(3, 0, 2, 1),
        "every other": lambda: base[:, ::2],
        "column": lambda: base[..., 1],
        "one element": lambda: base[1, 2, 3, 1],
        "channels last": lambda: base.contiguous(memory_format=torch.channels_last),
        "offset": lambda: base.view(-1)[3:],
        "parameter": lambda: torch.nn.Parameter(base, requires_grad=base.dtype.is_floating_point),
    }
    return views[kind]()


STRIDED = ("transposed", "every other", "column", "one element", "channels last", "offset", "parameter")


@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool], ids=name_of)
def test_any_strides(ranks: Ranks, kind: str, dtype: torch.dtype) -> None:
    shape = (2, 6, 20, 30)

    def body(comm: Communicator) -> None:
        bases = all_values(comm, shape, dtype)
        parts = [strided(base.clone(), kind) for base in bases]
        for name in ("allreduce", "broadcast"):
            memory = bases[comm.rank].clone()
            own = strided(memory, kind)
            strides = own.stride()
            wanted = reduced(parts, "sum") if name == "allreduce" else parts[-1]
            found = comm.allreduce(own) if name == "allreduce" else comm.broadcast(own, comm.size - 1)
            assert found is own
            assert own.stride() == strides
            assert_same(own, wanted)
            if kind != "channels last":  # that one is a copy
                beside = strided(memory.fill_(True), kind).detach().zero_()
                assert not beside.any()
                assert memory.sum() == memory.numel() - beside.numel()
        for gathered, part in zip(comm.all_gather(parts[comm.rank]), parts, strict=True):
            assert_same(gathered, part)

    ranks(body)


def test_memory_beside_a_view_is_left_alone(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        memory = torch.full((6, 8), 7.0)
        comm.allreduce(memory[1:5, 2:6:2].fill_(1.0))
        assert (memory[1:5, 2:6:2] == comm.size).all()
        assert memory.sum() == 7.0 * (48 - 8) + 8 * comm.size
        comm.broadcast(memory.t()[3].fill_(comm.rank), comm.size - 1)
        assert memory[:, 3].tolist() == [comm.size - 1.0] * 6
        assert memory[:, 5].tolist() == [7.0] * 6

    ranks(body)


@pytest.mark.parametrize("name", ["allreduce", "broadcast"])
def test_expanded_tensor_cannot_be_written(ranks: Ranks, name: str) -> None:
    def body(comm: Communicator) -> None:
        memory = torch.tensor([2.0])
        call = getattr(comm, name)
        with pytest.raises((RuntimeError, ValueError), match=r"single memory location|overlap|expanded"):
            call(memory.expand(4))
        assert memory.item() == 2.0
        with pytest.raises((RuntimeError, ValueError), match=r"single memory location|overlap|expanded"):
            getattr(comm, f"{name}_async")(memory.expand(3, 2)).wait()
        assert_usable(comm)

    ranks(body)


def test_expanded_tensor_can_be_read(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        own = torch.tensor([comm.rank + 1.0]).expand(comm.size * 2)
        assert [found.tolist() for found in comm.all_gather(own)] == [
            [rank + 1.0] * comm.size * 2 for rank in range(comm.size)
        ]
        assert comm.reduce_scatter(own).tolist() == [comm.size * (comm.size + 1) / 2] * 2

    ranks(body)


def test_conjugate_and_negative_views(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        plain = all_values(comm, (40,), torch.complex64)
        for name in ("allreduce", "broadcast", "all_gather", "reduce_scatter"):
            lazy = [part.clone().conj() for part in plain]
            own = lazy[comm.rank] if name != "reduce_scatter" else torch.cat([lazy[comm.rank]] * comm.size)
            found = getattr(comm, name)(own)
            solid = [part.conj().resolve_conj() for part in plain]
            if name in ("allreduce", "reduce_scatter"):
                assert_same(found, reduced(solid, "sum"))
            elif name == "broadcast":
                assert_same(found, solid[0])
            else:
                assert_same(found[-1], solid[-1])
        negative = torch._neg_view(values(comm.rank, (40,), torch.float32))
        plain = all_values(comm, (40,), torch.float32)
        assert_same(comm.allreduce(negative), reduced([-part for part in plain], "sum"))

    ranks(body)


def test_tensors_that_require_gradients(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        leaf = torch.full((4, 2), comm.rank + 1.0, requires_grad=True)
        inner = leaf * 1.0
        total = comm.size * (comm.size + 1) / 2
        assert comm.allreduce(leaf) is leaf
        assert leaf.is_leaf
        assert leaf.requires_grad
        assert (leaf == total).all()
        assert (comm.allreduce(inner) == total).all()
        assert inner.requires_grad
        for rank, found in enumerate(comm.all_gather(inner + comm.rank)):
            assert (found == total + rank).all()
            assert not found.requires_grad
        assert not comm.reduce_scatter(inner.expand(comm.size, 4, 2)).requires_grad
        assert comm.broadcast(leaf) is leaf
        assert leaf.requires_grad
        with torch.no_grad():
            assert comm.allreduce_async(leaf).wait() is leaf

    ranks(body)


def test_inference_tensors(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        with torch.inference_mode():
            own = torch.full((3,), comm.rank + 1.0)
            assert comm.allreduce(own).tolist() == [comm.size * (comm.size + 1) / 2] * 3
            assert comm.all_gather(own)[-1].tolist() == own.tolist()

    ranks(body)


# Other collectives


@pytest.mark.parametrize(("op", "dtype"), OPS_AND_DTYPES, ids=name_of)
def test_reduce_scatter(ranks: Ranks, op: str, dtype: torch.dtype) -> None:
    def body(comm: Communicator) -> None:
        for salt, trailing in enumerate([(), (3,), (0,), (2, 4001)]):
            shape = (2 * comm.size, *trailing)
            parts = all_values(comm, shape, dtype, salt)
            own = parts[comm.rank].clone()
            found = comm.reduce_scatter(own, op)
            assert_same(found, reduced(parts, op)[2 * comm.rank : 2 * comm.rank + 2])
            assert_same(own, parts[comm.rank])  # not changed
        assert comm.reduce_scatter(values(0, (0, 5), dtype), op).shape == (0, 5)

    ranks(body)


def test_reduce_scatter_of_strided_tensor(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        parts = [part.t() for part in all_values(comm, (3, 4 * comm.size), torch.float32)]
        found = comm.reduce_scatter(parts[comm.rank])
        assert_same(found, reduced(parts, "sum")[4 * comm.rank : 4 * comm.rank + 4])

    ranks(body)


def test_reduce_scatter_needs_rows_for_all_ranks(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for tensor in (torch.ones(comm.size + 1, 2), torch.tensor(1.0)):
            if tensor.dim() and tensor.shape[0] % comm.size == 0:
                continue  # one rank takes any number of rows
            with pytest.raises(ValueError, match=r"divisible by the number of ranks"):
                comm.reduce_scatter(tensor)
        assert_usable(comm)

    ranks(body)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_all_gather(ranks: Ranks, dtype: torch.dtype) -> None:
    def body(comm: Communicator) -> None:
        for salt, shape in enumerate(SHAPES):
            parts = all_values(comm, shape, dtype, salt)
            own = parts[comm.rank].clone()
            found = comm.all_gather(own)
            assert isinstance(found, list)
            assert len(found) == comm.size
            for tensor, part in zip(found, parts, strict=True):
                assert_same(tensor, part)
            found[comm.rank].zero_()  # a new tensor
            assert_same(own, parts[comm.rank])
            assert_same(found[comm.rank - 1], parts[comm.rank - 1] if comm.size > 1 else torch.zeros_like(own))

    ranks(body)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_broadcast_from_every_root(ranks: Ranks, dtype: torch.dtype) -> None:
    def body(comm: Communicator) -> None:
        for root in range(comm.size):
            for salt, shape in enumerate(SHAPES):
                own = values(comm.rank, shape, dtype, salt)
                assert comm.broadcast(own, root) is own
                assert_same(own, values(root, shape, dtype, salt))

    ranks(body)


def test_broadcast_moves_bits(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        odd = torch.tensor([0x7FC00123, -0x7FFFFFFF, 1, -0x80000000], dtype=torch.int32).view(torch.float32)
        own = odd.clone() if comm.rank == comm.size - 1 else torch.zeros(4)
        assert_same(comm.broadcast(own, comm.size - 1), odd)  # NaN's payload, subnormals, -0.0
        large = values(comm.rank, (2**19 + 77,), torch.float64)
        assert_same(comm.broadcast(large), values(0, (2**19 + 77,), torch.float64))
        assert comm.broadcast(torch.tensor(float(comm.rank))).item() == 0.0  # root 0 unless told otherwise

    ranks(body)


def test_objects(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        own = {"rank": comm.rank, "list": [1, None, "ä" * (1 + 70_000 * comm.rank)], "tensor": torch.full((2,), 1.5)}
        found = comm.all_gather_object(own)
        assert [entry["rank"] for entry in found] == list(range(comm.size))
        assert [len(entry["list"][2]) for entry in found] == [1 + 70_000 * rank for rank in range(comm.size)]
        assert all((entry["tensor"] == 1.5).all() for entry in found)
        assert comm.all_gather_object(None) == [None] * comm.size

    ranks(body)


def test_broadcast_object_from_every_root(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for root in range(comm.size):
            found = comm.broadcast_object(["of", comm.rank, b"\x00" * 100_000 * comm.rank], root)
            assert found == ["of", root, b"\x00" * 100_000 * root]
        # What the others pass does not travel, so it may be anything.
        assert comm.broadcast_object("text" if comm.rank == 0 else lambda: None) == "text"

    ranks(body)


def test_objects_are_not_shared_between_ranks(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        found = comm.broadcast_object([0])
        found.append(comm.rank)
        comm.barrier()
        assert found == [0, comm.rank]

    ranks(body)


def test_nobody_leaves_a_barrier_before_all_have_come(ranks: Ranks) -> None:
    def body(comm: Communicator) -> tuple[float, float]:
        time.sleep(0.05 * (comm.rank + 1))
        before = time.monotonic()
        comm.barrier()
        return before, time.monotonic()

    times = ranks(body)
    assert max(before for before, _ in times) <= min(after for _, after in times)


def test_a_rank_may_come_late(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for late in range(comm.size):
            if comm.rank == late:
                time.sleep(0.05)
            assert comm.allreduce(torch.ones(3))[0].item() == comm.size

    ranks(body)
