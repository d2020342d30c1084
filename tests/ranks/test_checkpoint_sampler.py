"""ResumableSampler: every sample of an epoch once, whoever stops and at whatever number of ranks it goes on."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import heatopt
from heatopt.comm import SingleCommunicator, ThreadWorld
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

one_process = pytest.mark.skipif(LAUNCH.launched, reason="makes its own ranks")
ALONE = SingleCommunicator()


def draw(comm: Communicator, state: dict[str, Any] | None, length: int, count: int, drop_last: bool) -> Any:
    """Draw ``count`` samples, or as many as there are; the samples and the state after that."""
    sampler = heatopt.ResumableSampler(length, seed=4, drop_last=drop_last, comm=comm)
    sampler.set_epoch(3)
    if state is not None:
        sampler.load_state_dict(state)
        sampler.set_epoch(3)
    drawing = iter(sampler)
    found = list(itertools.islice(drawing, count))
    if len(found) < count:
        assert next(drawing, None) is None
    return found, sampler.state_dict()


@one_process
@given(
    length=st.integers(0, 30),
    parts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=4),
    last=st.integers(1, 4),
    drop_last=st.booleans(),
)
def test_each_sample_once(length: int, parts: list[tuple[int, int]], last: int, drop_last: bool) -> None:
    state = None
    drawn: list[int] = []
    for size, count in [*parts, (last, 1000)]:

        def body(comm: Communicator, state: Any = state, count: int = count) -> Any:
            return draw(comm, state, length, count, drop_last)

        results = ThreadWorld(size).run(body)
        drawn += [index for found, _ in results for index in found]
        state = results[0][1]
        longest = max(len(found) for found, _ in results)
        # Ranks that have done equally many steps agree, also where some had one sample less.
        assert all(each == state for found, each in results if len(found) == longest or count > longest)
    assert len(drawn) == len(set(drawn))
    if drop_last:
        assert set(drawn) <= set(range(length))
        assert len(drawn) > length - last - sum(size for size, _ in parts)
    else:
        assert sorted(drawn) == list(range(length))


def test_shares(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        for drop_last in (False, True):
            sampler = heatopt.ResumableSampler(range(23), drop_last=drop_last, comm=comm)
            own = list(sampler)
            assert len(own) == len(sampler)
            found = comm.all_gather_object(own)
            everything = sorted(index for part in found for index in part)
            assert len(set(everything)) == len(everything)
            if drop_last:
                assert {len(part) for part in found} == {23 // comm.size}
            else:
                assert everything == list(range(23))
            sampler.set_epoch(1)
            assert comm.size > 20 or list(sampler) != own
            sampler.set_epoch(0)
            assert list(sampler) == own
            assert list(sampler) == own

    ranks(body)


def test_order_without_shuffle(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        sampler = heatopt.ResumableSampler(10, shuffle=False, comm=comm)
        assert list(sampler) == list(range(10))[comm.rank :: comm.size]

    ranks(body)


def test_loader_stops_between_batches(ranks: Ranks) -> None:
    """The state is that of the batch in hand, at each of an epoch's batches."""

    def body(comm: Communicator) -> None:
        data = torch.utils.data.TensorDataset(torch.arange(22))
        for stop in range(1, 4):
            sampler = heatopt.ResumableSampler(data, comm=comm)
            found: list[int] = []
            for number, (batch,) in enumerate(torch.utils.data.DataLoader(data, batch_size=2, sampler=sampler), 1):
                found += batch.tolist()
                if number == stop:
                    break
            again = heatopt.ResumableSampler(data, comm=comm)
            again.load_state_dict(comm.broadcast_object(sampler.state_dict()))
            again.set_epoch(0)
            for (batch,) in torch.utils.data.DataLoader(data, batch_size=2, sampler=again):
                found += batch.tolist()
            everything = sorted(index for part in comm.all_gather_object(found) for index in part)
            assert everything == list(range(22))

    ranks(body)


def test_workers_draw_ahead() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(20))
    sampler = heatopt.ResumableSampler(data, comm=ALONE)
    drawing = iter(sampler)
    ahead = list(itertools.islice(drawing, 9))
    sampler.set_drawn(4)
    again = heatopt.ResumableSampler(data, comm=ALONE)
    again.load_state_dict(sampler.state_dict())
    assert list(again)[:5] == ahead[4:]
    with pytest.raises(ValueError, match="samples must be at most 20"):
        sampler.set_drawn(21)


@pytest.mark.parametrize("change", ["load_state_dict", "set_epoch"])
def test_a_pass_that_goes_on_after_a_change_does_not_count(change: str) -> None:
    sampler = heatopt.ResumableSampler(10, shuffle=False, comm=ALONE)
    passing = iter(sampler)
    assert list(itertools.islice(passing, 5)) == [0, 1, 2, 3, 4]
    if change == "load_state_dict":
        sampler.load_state_dict(sampler.state_dict() | {"position": 2})
    else:
        sampler.set_epoch(3)
    before = sampler.state_dict()
    assert list(passing) == [5, 6, 7, 8, 9]
    assert sampler.state_dict() == before
    assert list(sampler) == list(range(before["position"], 10))


def test_end_of_an_epoch() -> None:
    sampler = heatopt.ResumableSampler(6, comm=ALONE)
    first = list(sampler)
    again = heatopt.ResumableSampler(6, comm=ALONE)
    again.load_state_dict(sampler.state_dict())
    again.set_epoch(0)
    assert len(again) == 0
    assert list(again) == []
    again.set_epoch(1)
    assert sorted(again) == sorted(first)
    assert again.epoch == 1


@one_process
def test_ranks_at_different_places(tmp_path: Any) -> None:
    def write(comm: Communicator) -> None:
        sampler = heatopt.ResumableSampler(20, comm=comm)
        next(itertools.islice(iter(sampler), comm.rank, None))
        heatopt.save(tmp_path / "c", sampler=sampler, comm=comm)

    def read(comm: Communicator) -> int:
        sampler = heatopt.ResumableSampler(20, comm=comm)
        heatopt.load(tmp_path / "c", sampler=sampler, comm=comm)
        return len(sampler)

    ThreadWorld(2).run(write)
    assert ThreadWorld(2).run(read) == [9, 8]
    with pytest.raises(heatopt.CheckpointError, match="only with 2 ranks, not with 1"):
        ThreadWorld(1).run(read)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataset_or_length": 2.5}, TypeError, "dataset_or_length must have a length"),
        ({"dataset_or_length": True}, TypeError, "dataset_or_length must have a length"),
        ({"dataset_or_length": -1}, ValueError, "dataset_or_length must be an integer >= 0"),
        ({"seed": 1.0}, TypeError, "seed must be an integer"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"shuffle": 1}, TypeError, "shuffle must be True or False"),
        ({"drop_last": None}, TypeError, "drop_last must be True or False"),
        ({"comm": "world"}, TypeError, "comm must be"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        heatopt.ResumableSampler(**{"dataset_or_length": 3, "comm": ALONE} | arguments)


def test_wrong_states() -> None:
    sampler = heatopt.ResumableSampler(5, comm=ALONE)
    with pytest.raises(ValueError, match="must have the keys"):
        sampler.load_state_dict({})
    for other in (heatopt.ResumableSampler(6, comm=ALONE), heatopt.ResumableSampler(5, seed=1, comm=ALONE)):
        with pytest.raises(ValueError, match="the state has"):
            sampler.load_state_dict(other.state_dict())
    with pytest.raises(TypeError, match="epoch must be an integer"):
        sampler.set_epoch(0.5)  # type: ignore[arg-type]
