"""The first steps try out what the user left open; pure, and the same on all ranks."""

from __future__ import annotations

import pytest

from heatopt.sync._tuning import DEFAULT, Choice, Tuner, candidates

_BYTES = 100 * 2**20


def run(tuner: Tuner, seconds: dict[Choice, float], steps: int = 200) -> list[Choice]:
    """Feed the tuner with what each choice costs; return the choice of each step."""
    used = []
    for _ in range(steps):
        used.append(tuner.choice)
        before = tuner.choice
        assert tuner.record(seconds[before]) == (tuner.choice != before)
    return used


@pytest.mark.parametrize(
    ("blocking", "overlaps", "first"), [(None, True, False), (None, False, True), (True, True, True)]
)
def test_the_default_comes_first(blocking: bool | None, overlaps: bool, first: bool) -> None:
    assert candidates(blocking, None, overlaps, _BYTES)[0] == Choice(first, DEFAULT.bucket_mb)


def test_what_the_user_chose_is_not_tried_out() -> None:
    assert candidates(False, 3.0, True, _BYTES) == [Choice(False, 3.0)]
    assert {choice.bucket_mb for choice in candidates(None, 3.0, True, _BYTES)} == {3.0}
    assert {choice.blocking for choice in candidates(True, None, True, _BYTES)} == {True}
    assert Tuner(candidates(False, 3.0, True, _BYTES)).settled


def test_large_buckets_are_not_made_twice() -> None:
    assert candidates(None, None, True, 2**30) == [Choice(False, 8.0), Choice(True, 8.0)]


@pytest.mark.parametrize(
    ("mebibytes", "sizes"), [(1, {8.0}), (2, {8.0}), (3, {2.0, 8.0}), (8, {2.0, 8.0}), (9, {2.0, 8.0, 32.0})]
)
def test_sizes_that_make_the_same_bucket_are_not_tried_out(mebibytes: int, sizes: set[float]) -> None:
    assert {choice.bucket_mb for choice in candidates(None, None, True, mebibytes * 2**20)} == sizes


@pytest.mark.parametrize("best", range(4))
def test_the_fastest_is_chosen_and_kept(best: int) -> None:
    options = candidates(None, None, True, _BYTES)
    assert len(options) == len(set(options)) == 4
    tuner = Tuner(options)
    used = run(tuner, {choice: 1.0 if number == best else 1.5 for number, choice in enumerate(options)})
    assert set(used) == set(options)
    assert tuner.settled
    assert set(used[40:]) == {options[best]}
    assert tuner.report()["blocking"] == options[best].blocking
    assert tuner.report()["trials"][best] == {**options[best]._asdict(), "seconds": 1.0}


def test_noise_does_not_displace_the_default() -> None:
    options = candidates(None, None, True, _BYTES)
    tuner = Tuner(options)
    run(tuner, {choice: 1.0 if number == 0 else 0.99 for number, choice in enumerate(options)})
    assert tuner.choice == options[0]


@pytest.mark.parametrize("lucky", [0, 1], ids=["first turn", "second turn"])
def test_one_lucky_turn_does_not_displace_the_default(lucky: int) -> None:
    """Also if it makes the median of both turns the best."""
    options = [Choice(True, 8.0), Choice(True, 2.0)]
    tuner = Tuner(options)
    turn, last = -1, None
    while not tuner.settled:
        turn += tuner.choice != last and tuner.choice == options[0]
        last = tuner.choice
        tuner.record(0.5 if last == options[1] and turn == lucky else 1.0)
    assert turn == 1
    assert tuner.choice == options[0]
    assert tuner.report()["trials"][1]["seconds"] == 0.75


def test_a_machine_that_drifts_does_not_hide_the_fastest() -> None:
    options = [Choice(True, 8.0), Choice(True, 2.0)]
    tuner = Tuner(options)
    steps = 0
    while not tuner.settled:
        steps += 1
        tuner.record((1.0 if steps < 12 else 3.0) * (1.0 if tuner.choice == options[0] else 0.9))
    assert tuner.choice == options[1]


def test_the_step_of_a_change_does_not_count() -> None:
    options = [Choice(True, 8.0), Choice(True, 2.0)]
    tuner = Tuner(options)
    last = None
    while not tuner.settled:
        changed, last = tuner.choice != last, tuner.choice
        tuner.record(100.0 if changed else {8.0: 2.0, 2.0: 1.0}[tuner.choice.bucket_mb])
    assert tuner.choice == options[1]
    assert [trial["seconds"] for trial in tuner.report()["trials"]] == [2.0, 1.0]
