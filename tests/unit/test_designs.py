"""The choice of combinations and of numbers of ranks: no value is left out, and launches complete each other."""

from __future__ import annotations

from itertools import product

import pytest

from tests.support import ranks
from tests.support.algorithms import Case, covering_cases, option_cases
from tests.support.designs import diagonal

A, B, C = "abc", range(5), ("x", "y")


@pytest.mark.parametrize("shift", range(7))
def test_every_value_is_there(shift: int) -> None:
    rows = diagonal(shift, A, B, C)
    assert len(rows) == 5
    assert [set(column) for column in zip(*rows, strict=True)] == [set(A), set(B), set(C)]


def test_shifts_have_all_pairs_together() -> None:
    rows = [row for shift in (1, 2, 3) for row in diagonal(shift, A, A)]
    assert sorted(rows) == sorted(product(A, A))


def test_covering_options() -> None:
    """Each set of options of each algorithm, and each implementation of it, is among fewer than all."""

    def options(case: Case) -> str:
        return str({name: value for name, value in case.options.items() if name not in ("foreach", "fused")})

    def implementation(case: Case) -> tuple[object, ...]:
        return case.options.get("foreach"), case.options.get("fused")

    found, table = (
        [parameter.values[0] for parameter in parameters if not parameter.marks]
        for parameters in (covering_cases(), option_cases())
    )
    assert len(found) < len(table) / 2
    for what in (options, implementation):
        assert {(case.name, what(case)) for case in found} == {(case.name, what(case)) for case in table}


@pytest.mark.parametrize(("text", "expected"), [("1,3", [1, 3]), ("2, 4", [2, 4]), ("5", [5])])
def test_numbers_of_threads(monkeypatch: pytest.MonkeyPatch, text: str, expected: list[int]) -> None:
    monkeypatch.setattr(ranks, "_THREADS", text)
    assert ranks._thread_numbers() == expected


@pytest.mark.parametrize("text", ["some", "0,2", "1,", "1.5"])
def test_wrong_numbers_of_threads(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(ranks, "_THREADS", text)
    with pytest.raises(pytest.UsageError, match=f"HEATOPT_TEST_THREADS .* not '{text}'"):
        ranks._thread_numbers()
