"""The contract of a communicator, the same for threads, MPI, torch.distributed and a single process."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from heatopt.comm import Communicator, NodeGroups
from heatopt.errors import RankMismatchError
from tests.support.launch import LAUNCH

if TYPE_CHECKING:
    from tests.support.ranks import Ranks

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
DISCRETE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (*FLOATING, *COMPLEX, *DISCRETE)
OPS_AND_DTYPES = [
    *(("sum", dtype) for dtype in DTYPES),
    *(("mean", dtype) for dtype in (*FLOATING, *COMPLEX)),
    *((op, dtype) for op in ("max", "min") for dtype in (*FLOATING, *DISCRETE)),
]

# No elements, no dimension, odd lengths, and on both sides of 16 KiB, where reductions take another way.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (2, 0, 3), (1,), (7,), (5, 3), (1031,), (3, 5001))
# In elements, by dtype: more than 2 MiB, so that blocking reductions travel in several pieces, the last one odd.
LARGE = {
    torch.bool: 2**21 + 77,
    torch.bfloat16: 2**20 + 77,
    torch.float32: 2**19 + 77,
    torch.float64: 2**19 + 77,
    torch.complex64: 2**18 + 77,
    torch.int16: 2**20 + 77,
}


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture(autouse=True)
def _nodes_as_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEATOPT_RANKS_PER_NODE", raising=False)


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """What ``rank`` contributes; every rank can make the values of all others."""
    generator = torch.Generator().manual_seed(7919 * salt + rank)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    # Sums of these leave the range of 8 bits: they wrap around, as torch's own addition does.
    return torch.randint(0 if dtype in (torch.bool, torch.uint8) else -100, 100, shape, generator=generator).to(dtype)


def reduced(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """The sum in rank order, in at least single precision, divided and then rounded once."""
    dtype, shape = parts[0].dtype, parts[0].shape
    if dtype == torch.bool:
        stacked = torch.stack(parts)
        return stacked.all(0) if op == "min" else stacked.any(0)
    if dtype.is_complex:
        return torch.view_as_complex(reduced([torch.view_as_real(part) for part in parts], op))
    if op in ("max", "min"):
        return torch.stack(parts).amax(0) if op == "max" else torch.stack(parts).amin(0)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return (total / len(parts) if op == "mean" else total).to(dtype).view(shape)


def all_values(comm: Communicator, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> list[torch.Tensor]:
    return [values(rank, shape, dtype, salt) for rank in range(comm.size)]


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to the last bit, NaN and the sign of zero included."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    left, right = (t.detach().resolve_conj().resolve_neg().contiguous().view(-1) for t in (found, wanted))
    assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def assert_usable(comm: Communicator) -> None:
    """Traffic of this communicator is in step on all ranks."""
    assert comm.all_gather_object(("in step", comm.rank)) == [("in step", rank) for rank in range(comm.size)]
    total = comm.allreduce(torch.tensor([comm.rank + 1.0]))
    assert total.item() == comm.size * (comm.size + 1) / 2


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


# Handles


SIZES = (1, 40_000, 3, 0, 5001, 70_001)  # one and two stages in flight side by side


def launch_all(comm: Communicator, dtype: torch.dtype) -> tuple[list, list[torch.Tensor], list[torch.Tensor]]:
    """Handles, the tensors that they were given, and what is to come out."""
    own = [values(comm.rank, (size,), dtype, salt) for salt, size in enumerate(SIZES)]
    wanted = [reduced(all_values(comm, (size,), dtype, salt), "sum") for salt, size in enumerate(SIZES)]
    return [comm.allreduce_async(tensor) for tensor in own], own, wanted


def assert_reduced(works: list, own: list[torch.Tensor], wanted: list[torch.Tensor], order: list[int]) -> None:
    for number in order:
        assert works[number].wait() is own[number]
        assert works[number].done()
        assert works[number].wait() is own[number]
    for found, expected in zip(own, wanted, strict=True):
        assert_same(found, expected)


def order_of(comm: Communicator, kind: str) -> list[int]:
    numbers = list(range(len(SIZES)))
    if kind == "backwards":
        numbers.reverse()
    elif kind == "ranks differ":
        random.Random(comm.rank).shuffle(numbers)
    return numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool], ids=name_of)
@pytest.mark.parametrize("kind", ["in order", "backwards", "ranks differ"])
def test_wait_in_any_order(ranks: Ranks, dtype: torch.dtype, kind: str) -> None:
    def body(comm: Communicator) -> None:
        works, own, wanted = launch_all(comm, dtype)
        assert_reduced(works, own, wanted, order_of(comm, kind))
        assert_usable(comm)

    ranks(body)


def poll(work: object, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not work.done():  # type: ignore[attr-defined]
        assert time.monotonic() < deadline, "done() does not come true"
        time.sleep(0.0005)


@pytest.mark.parametrize("kind", ["in order", "backwards", "ranks differ"])
def test_polling_alone_completes(ranks: Ranks, kind: str) -> None:
    def body(comm: Communicator) -> None:
        works, own, wanted = launch_all(comm, torch.bfloat16)
        for number in order_of(comm, kind):
            poll(works[number])
        # Nothing is left to wait for: all is there, also before the first wait().
        for found, expected in zip(own, wanted, strict=True):
            assert_same(found, expected)
        assert_reduced(works, own, wanted, order_of(comm, kind))

    ranks(body)


def test_some_ranks_poll_and_others_wait(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for turn in range(4):
            works, own, wanted = launch_all(comm, torch.float32)
            if (comm.rank + turn) % 2:
                for work in works[::2]:
                    poll(work)
            assert_reduced(works, own, wanted, order_of(comm, "ranks differ"))

    ranks(body)


def test_done_is_false_until_all_ranks_have_come(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        first = comm.split(0)
        if comm.rank == 0:
            # The announcement of the call waits for the others, so only what follows it can be seen to be open.
            work = first.all_gather_async(torch.zeros(3))
            polled = work.done()
            assert polled in (True, False)
        else:
            work = first.all_gather_async(torch.full((3,), float(comm.rank)))
        assert work.wait()[-1].tolist() == [comm.size - 1.0] * 3
        assert work.done()

    ranks(body)


def test_blocking_calls_between_launch_and_wait(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        works, own, wanted = launch_all(comm, torch.float32)
        assert comm.allreduce(torch.ones(50_000))[0].item() == comm.size
        assert comm.all_gather_object(comm.rank) == list(range(comm.size))
        comm.barrier()
        more, more_own, more_wanted = launch_all(comm, torch.int32)
        assert comm.broadcast(torch.tensor(float(comm.rank)), comm.size - 1).item() == comm.size - 1
        assert_reduced(more, more_own, more_wanted, order_of(comm, "backwards"))
        assert_reduced(works, own, wanted, order_of(comm, "in order"))

    ranks(body)


def test_a_single_rank_may_wait_while_the_others_go_on(ranks: Ranks) -> None:
    """``if rank == 0: print(work.wait())``, before a call of another group."""

    def body(comm: Communicator) -> None:
        twin = comm.duplicate()
        for count in (3, 40_000):
            own = torch.full((count,), comm.rank + 1.0)
            work = comm.allreduce_async(own)
            if comm.rank == 0:
                work.wait()
            twin.barrier()
            assert (work.wait() == comm.size * (comm.size + 1) / 2).all()

    ranks(body)


def test_all_collectives_as_handles(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        last = comm.size - 1
        rows = (3 * comm.size, 3001)
        source = values(comm.rank, rows, torch.float32)
        kept = source.clone()
        sent = torch.full((5,), float(comm.rank), dtype=torch.float64)
        scattered = comm.reduce_scatter_async(source, "mean")
        gathered = comm.all_gather_async(values(comm.rank, (11,), torch.int16))
        copied = comm.broadcast_async(sent, last)
        largest = comm.allreduce_async(torch.tensor(comm.rank), "max")
        assert copied.wait() is sent
        assert sent.tolist() == [float(last)] * 5
        mean = reduced(all_values(comm, rows, torch.float32), "mean")
        assert_same(scattered.wait(), mean[3 * comm.rank : 3 * comm.rank + 3])
        assert_same(source, kept)
        assert largest.wait().item() == last
        for rank, found in enumerate(gathered.wait()):
            assert_same(found, values(rank, (11,), torch.int16))

    ranks(body)


def test_handle_owns_its_buffers(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        count = 60_000

        def launch() -> Iterator[object]:
            for turn in range(8):
                yield comm.allreduce_async(torch.full((count,), float(turn)))
                yield comm.all_gather_async(torch.full((count,), float(turn), dtype=torch.bfloat16).t())
                yield comm.broadcast_async(torch.full((count,), float(turn + comm.rank)))

        works = list(launch())
        gc.collect()
        # What was freed would be used again here, and overwritten.
        rubbish = [torch.full((count,), -1.0) for _ in range(8)]
        for turn in range(8):
            total, gathered, copied = (work.wait() for work in works[3 * turn : 3 * turn + 3])  # type: ignore[attr-defined]
            assert (total == turn * comm.size).all()
            assert all((found == turn).all() for found in gathered)
            assert (copied == turn).all()
        assert all((piece == -1.0).all() for piece in rubbish)

    ranks(body)


def test_dropped_handles_are_completed_by_the_next_call(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        kept = [torch.full((30_000,), float(turn)) for turn in range(3)]
        for tensor in kept:
            comm.allreduce_async(tensor)
        gc.collect()
        comm.barrier()
        comm.allreduce(torch.ones(1))
        for turn, tensor in enumerate(kept):
            assert (tensor == turn * comm.size).all()

    ranks(body)


@pytest.mark.parametrize("seed", range(3))
def test_random_programs(ranks: Ranks, seed: int) -> None:
    """The same calls on all ranks in the same order; each rank waits and polls when it likes."""

    def body(comm: Communicator) -> None:
        shared, own = random.Random(seed), random.Random(100 * seed + comm.rank)
        comms = [comm, comm.split(0, -comm.rank), comm.duplicate()]
        channel = comm
        pending: list[tuple[object, torch.Tensor, torch.Tensor]] = []
        for salt in range(40):
            # One group's handles are complete before another group is used, as with MPI's own.
            if not pending:
                channel = comms[shared.randrange(3)]
            dtype = shared.choice((torch.float32, torch.bfloat16, torch.int64, torch.complex64))
            shape = (shared.choice((1, 33, 9001)),)
            parts = all_values(channel, shape, dtype, salt)
            mine = parts[channel.rank].clone()
            kind = shared.choice(("allreduce", "broadcast"))
            root = shared.randrange(comm.size)
            wanted = reduced(parts, "sum") if kind == "allreduce" else parts[root]
            arguments = ("sum",) if kind == "allreduce" else (root,)
            if shared.random() < 0.7:
                pending.append((getattr(channel, f"{kind}_async")(mine, *arguments), mine, wanted))
            else:
                assert_same(getattr(channel, kind)(mine, *arguments), wanted)
            if pending and own.random() < 0.4:
                own.choice(pending)[0].done()  # type: ignore[attr-defined]
            if shared.random() < 0.2 or salt == 39:
                own.shuffle(pending)
                for work, found, expected in pending:
                    assert work.wait() is found  # type: ignore[attr-defined]
                    assert_same(found, expected)
                pending.clear()

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


# Groups


def test_ranks_are_numbered(ranks: Ranks) -> None:
    def body(comm: Communicator) -> tuple[int, int]:
        assert comm.timeout > 0
        assert 0 <= comm.node_rank < comm.node_size <= comm.size
        assert 0 <= comm.node_index < comm.num_nodes
        return comm.rank, comm.size

    assert ranks(body) == [(rank, ranks.size) for rank in range(ranks.size)]


def members_of(group: Communicator, comm: Communicator) -> list[int]:
    """Ranks in ``comm`` of the ranks of ``group``, found out through ``group``."""
    assert_usable(group)
    members = group.all_gather_object(comm.rank)
    assert members[group.rank] == comm.rank
    assert len(members) == group.size
    return members


def test_split_by_color(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(comm.rank % 2)
        mine = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
        assert members_of(group, comm) == mine
        assert group.allreduce(torch.tensor(float(comm.rank))).item() == sum(mine)
        assert group.broadcast(torch.tensor(float(comm.rank)), group.size - 1).item() == mine[-1]
        assert members_of(comm.split(-(10**12) if comm.rank else 0), comm) == ([0] if comm.rank == 0 else
                                                                             list(range(1, comm.size)))  # fmt: skip
        assert members_of(comm.split(5), comm) == list(range(comm.size))
        assert group.timeout == comm.timeout

    ranks(body)


def test_split_without_color_gives_a_group_of_its_own(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(None if comm.rank < 2 else 0)
        assert members_of(group, comm) == ([comm.rank] if comm.rank < 2 else list(range(2, comm.size)))
        assert members_of(comm.split(None), comm) == [comm.rank]

    ranks(body)


def test_split_orders_by_key_then_rank(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        assert members_of(comm.split(0, -comm.rank), comm) == list(reversed(range(comm.size)))
        even_first = sorted(range(comm.size), key=lambda rank: (rank % 2, rank))
        assert members_of(comm.split(0, comm.rank % 2), comm) == even_first

    ranks(body)


def test_nested_groups(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        backwards = comm.split(0, -comm.rank)
        pairs = backwards.split(backwards.rank // 2)
        inner = pairs.split(0, -pairs.rank)
        wanted = [rank for rank in range(comm.size) if (comm.size - 1 - rank) // 2 == (comm.size - 1 - comm.rank) // 2]
        assert members_of(inner, comm) == wanted
        assert members_of(pairs, comm) == wanted[::-1]
        assert_usable(comm)

    ranks(body)


def test_traffic_of_groups_never_meets(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        twin, half = comm.duplicate(), comm.split(comm.rank % 2)
        assert members_of(twin, comm) == list(range(comm.size))
        works = [
            group.allreduce_async(torch.full((5000,), float(number + 1)))
            for number, group in enumerate((comm, twin, half, comm, twin))
        ]
        sizes = (comm.size, twin.size, half.size, comm.size, twin.size)
        for number in (1, 0, 2, 4, 3):
            assert (works[number].wait() == (number + 1) * sizes[number]).all()

    ranks(body)


def test_groups_of_different_ranks_work_at_their_own_pace(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(comm.rank % 2)
        for turn in range(3 + 5 * (comm.rank % 2)):
            assert group.allreduce(torch.tensor(turn)).item() == turn * group.size
        assert_usable(comm)

    ranks(body)


def test_split_refuses_what_is_no_color(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for color in ("left", 1.5, True):
            with pytest.raises(TypeError, match="color must be an int or None"):
                comm.split(color)  # type: ignore[arg-type]
        assert_usable(comm)

    ranks(body)


def test_close_leaves_the_parent_alone(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(0)
        tensor = torch.ones(20_000)
        group.allreduce_async(tensor)
        group.close()
        assert (tensor == comm.size).all()  # what was in flight is complete
        group.close()
        assert_usable(comm)

    ranks(body)


def choose_nodes(monkeypatch: pytest.MonkeyPatch, per_node: int) -> None:
    if LAUNCH.launched:
        pytest.skip("the world has been made, with the environment of the launch")
    monkeypatch.setenv("HEATOPT_RANKS_PER_NODE", str(per_node))


@pytest.mark.parametrize("per_node", [1, 2, 3, 4])
def test_nodes_of_chosen_size(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, per_node: int) -> None:
    choose_nodes(monkeypatch, per_node)

    def body(comm: Communicator) -> None:
        size, rank = comm.size, comm.rank
        nodes = [list(range(start, min(start + per_node, size))) for start in range(0, size, per_node)]
        node = rank // per_node
        assert (comm.num_nodes, comm.node_index) == (len(nodes), node)
        assert (comm.node_size, comm.node_rank) == (len(nodes[node]), rank % per_node)
        groups = comm.by_node()
        assert isinstance(groups, NodeGroups)
        assert members_of(groups.within, comm) == nodes[node]
        wanted = [members[rank % per_node] for members in nodes if rank % per_node < len(members)]
        assert members_of(groups.across, comm) == wanted
        # Two stages give what one gives, where all nodes have as many ranks.
        if size % per_node == 0:
            value = groups.across.allreduce(groups.within.allreduce(torch.tensor([rank + 1.0])))
            assert value.item() == size * (size + 1) / 2

    ranks(body)


def test_groups_keep_the_nodes_of_their_ranks(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_nodes(monkeypatch, 2)

    def body(comm: Communicator) -> None:
        within, across = comm.by_node()
        assert (within.num_nodes, within.node_size) == (1, within.size)
        assert (across.num_nodes, across.node_size) == (across.size, 1)
        backwards = comm.split(0, -comm.rank)
        nodes = backwards.all_gather_object(comm.node_index)
        assert backwards.num_nodes == comm.num_nodes
        assert backwards.node_size == nodes.count(nodes[backwards.rank])
        middle = comm.split(0 if comm.rank in (1, 2) else 1)  # ranks 1 and 2 are on different nodes
        if comm.size >= 3 and comm.rank in (1, 2):
            assert (middle.num_nodes, middle.node_size) == (2, 1)

    ranks(body)


# Disagreement


MISMATCHES: dict[str, tuple[Callable[[Communicator], object], Callable[[Communicator], object]]] = {
    "op": (lambda c: c.allreduce(torch.ones(3), "sum"), lambda c: c.allreduce(torch.ones(3), "mean")),
    "shape": (lambda c: c.allreduce(torch.ones(4)), lambda c: c.allreduce(torch.ones(6))),
    "dimensions": (lambda c: c.allreduce(torch.ones(4)), lambda c: c.allreduce(torch.ones(2, 2))),
    "empty": (lambda c: c.allreduce(torch.ones(4)), lambda c: c.allreduce(torch.ones(0))),
    "dtype": (lambda c: c.allreduce(torch.ones(4)), lambda c: c.allreduce(torch.ones(4).int())),
    "half type": (lambda c: c.allreduce(torch.ones(4).half()), lambda c: c.allreduce(torch.ones(4).bfloat16())),
    "root": (lambda c: c.broadcast(torch.ones(4), 0), lambda c: c.broadcast(torch.ones(4), 1)),
    "object root": (lambda c: c.broadcast_object(1, 0), lambda c: c.broadcast_object(1, 1)),
    "gathered shape": (lambda c: c.all_gather(torch.ones(4)), lambda c: c.all_gather(torch.ones(5))),
    "scattered op": (
        lambda c: c.reduce_scatter(torch.ones(c.size), "max"),
        lambda c: c.reduce_scatter(torch.ones(c.size), "min"),
    ),
    "call": (lambda c: c.allreduce(torch.ones(4)), lambda c: c.all_gather(torch.ones(4))),
    "handle": (lambda c: c.allreduce_async(torch.ones(4)).wait(), lambda c: c.broadcast_async(torch.ones(4)).wait()),
    "barrier": (lambda c: c.barrier(), lambda c: c.all_gather_object(1)),
    "split": (lambda c: c.split(0), lambda c: c.barrier()),
    "split and tensor": (lambda c: c.allreduce(torch.ones(1)), lambda c: c.split(0)),
    "duplicate": (lambda c: c.duplicate(), lambda c: c.barrier()),
    "agreement": (lambda c: c.agree_on([1, 2], "load()"), lambda c: c.agree_on([1, 3], "load()")),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_disagreement_is_named_on_all_ranks(ranks: Ranks, kind: str) -> None:
    usual, other = MISMATCHES[kind]

    def body(comm: Communicator) -> str:
        # One rank differs: each of them in turn, so that rank 0 may be the odd one.
        messages = []
        for odd in range(comm.size):
            with pytest.raises(RankMismatchError) as caught:
                (other if comm.rank == odd else usual)(comm)
            message = str(caught.value)
            assert "rank 0" in message
            assert f"rank {odd or 1}" in message
            messages.append(message)
            assert_usable(comm)
        return "\n".join(messages)

    assert len(set(ranks(body, min_size=2))) == 1


def test_disagreement_says_what_differs(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        own = torch.ones(2, 3 if comm.rank else 4, dtype=torch.float64)
        with pytest.raises(RankMismatchError, match=r"rank 0 .*\(2, 4\).*float64.*rank 1 .*\(2, 3\).*float64"):
            comm.allreduce(own, "max")
        with pytest.raises(RankMismatchError, match=r"rank 0 .*broadcast.*rank 1 .*allreduce"):
            comm.allreduce(own) if comm.rank else comm.broadcast(own)

    ranks(body, min_size=2)


@pytest.mark.parametrize("count", [4, 2**19 + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_handle_on_one_rank_and_blocking_call_on_another(ranks: Ranks, count: int, dtype: torch.dtype) -> None:
    """Right or refused on all ranks, never a wrong number."""

    def body(comm: Communicator) -> str:
        own = torch.full((count,), comm.rank + 1.0, dtype=dtype)
        try:
            comm.allreduce_async(own).wait() if comm.rank == 0 else comm.allreduce(own)
        except RankMismatchError:
            outcome = "refused"
        else:
            assert (own == comm.size * (comm.size + 1) / 2).all()
            outcome = "right"
        assert_usable(comm)
        return outcome

    assert len(set(ranks(body, min_size=2))) == 1


# Wrong arguments, found before anything travels


def _sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


WRONG_TYPES: dict[str, Callable[[Communicator], object]] = {
    "list": lambda c: c.allreduce([1.0]),  # type: ignore[arg-type]
    "number": lambda c: c.allreduce(1.0),  # type: ignore[arg-type]
    "gathered list": lambda c: c.all_gather([1.0]),  # type: ignore[arg-type]
    "broadcast list": lambda c: c.broadcast([1.0]),  # type: ignore[arg-type]
    "scattered list": lambda c: c.reduce_scatter([1.0]),  # type: ignore[arg-type]
    "sparse": lambda c: c.allreduce(_sparse()),
    "gathered sparse": lambda c: c.all_gather(_sparse()),
    "broadcast sparse": lambda c: c.broadcast(_sparse()),
    "handle of sparse": lambda c: c.allreduce_async(_sparse()),
    "unsigned": lambda c: c.allreduce(torch.ones(3).to(torch.uint16)),
    "eight bits": lambda c: c.allreduce(torch.ones(3).to(torch.float8_e4m3fn)),
    "mean of integers": lambda c: c.allreduce(torch.ones(3).int(), "mean"),
    "mean of bools": lambda c: c.allreduce(torch.ones(3).bool(), "mean"),
    "scattered mean of integers": lambda c: c.reduce_scatter(torch.ones(c.size).int(), "mean"),
    "largest complex": lambda c: c.allreduce(torch.ones(3) + 0j, "max"),
    "smallest complex": lambda c: c.allreduce(torch.ones(3) + 0j, "min"),
}
WRONG_VALUES: dict[str, Callable[[Communicator], object]] = {
    "op": lambda c: c.allreduce(torch.ones(3), "product"),
    "handle's op": lambda c: c.allreduce_async(torch.ones(3), "avg"),
    "scattered op": lambda c: c.reduce_scatter(torch.ones(c.size), "SUM"),
    "no op": lambda c: c.allreduce(torch.ones(3), None),  # type: ignore[arg-type]
    "root beyond": lambda c: c.broadcast(torch.ones(3), c.size),
    "root below": lambda c: c.broadcast(torch.ones(3), -1),
    "handle's root": lambda c: c.broadcast_async(torch.ones(3), c.size),
    "object's root": lambda c: c.broadcast_object(1, c.size),
}


@pytest.mark.parametrize("kind", WRONG_TYPES)
def test_wrong_type(ranks: Ranks, kind: str) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(TypeError) as caught:
            WRONG_TYPES[kind](comm)
        assert str(caught.value)
        assert_usable(comm)

    ranks(body)


@pytest.mark.parametrize("kind", WRONG_VALUES)
def test_wrong_value(ranks: Ranks, kind: str) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="must be"):
            WRONG_VALUES[kind](comm)
        assert_usable(comm)

    ranks(body)


# Copies


def test_a_copy_talks_to_the_same_ranks(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        group = comm.split(0)
        for original in (comm, group):
            assert copy.deepcopy(original) is original
            assert copy.deepcopy({"comm": original})["comm"] is original
            with pytest.raises(TypeError, match=r"heatopt\.world\(\)"):
                pickle.dumps(original)

    ranks(body)
