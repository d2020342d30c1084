"""The first steps try out what the user left open; pure, and the same on all ranks."""

from __future__ import annotations

import pytest

from heatopt.sync._tuning import DEFAULT, Choice, Tuner, candidates


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
    assert candidates(blocking, None, overlaps)[0] == Choice(first, DEFAULT.bucket_mb)


def test_what_the_user_chose_is_not_tried_out() -> None:
    assert candidates(False, 3.0, True) == [Choice(False, 3.0)]
    assert {choice.bucket_mb for choice in candidates(None, 3.0, True)} == {3.0}
    assert {choice.blocking for choice in candidates(True, None, True)} == {True}
    assert Tuner(candidates(False, 3.0, True)).settled


def test_large_buckets_are_not_made_twice() -> None:
    assert candidates(None, None, True, 2**30) == [Choice(False, 8.0), Choice(True, 8.0)]


@pytest.mark.parametrize("best", range(4))
def test_the_fastest_is_chosen_and_kept(best: int) -> None:
    options = candidates(None, None, True)
    assert len(options) == len(set(options)) == 4
    tuner = Tuner(options)
    used = run(tuner, {choice: 1.0 if number == best else 1.5 for number, choice in enumerate(options)})
    assert set(used) == set(options)
    assert tuner.settled
    assert set(used[40:]) == {options[best]}
    assert tuner.report()["blocking"] == options[best].blocking
    assert tuner.report()["trials"][best] == {**options[best]._asdict(), "seconds": 1.0}


def test_noise_does_not_displace_the_default() -> None:
    options = candidates(None, None, True)
    tuner = Tuner(options)
    run(tuner, {choice: 1.0 if number == 0 else 0.99 for number, choice in enumerate(options)})
    assert tuner.choice == options[0]


def test_the_step_of_a_change_does_not_count() -> None:
    options = [Choice(True, 8.0), Choice(True, 2.0)]
    tuner = Tuner(options)
    last = None
    while not tuner.settled:
        changed, last = tuner.choice != last, tuner.choice
        tuner.record(100.0 if changed else {8.0: 2.0, 2.0: 1.0}[tuner.choice.bucket_mb])
    assert tuner.choice == options[1]
    assert [trial["seconds"] for trial in tuner.report()["trials"]] == [2.0, 1.0]
