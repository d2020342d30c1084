"""What ranks compare: it differs where the optimizers do, is equal where they are, and the difference gets a name."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heatopt.sync._fingerprint import (
    Fingerprint,
    ParameterPrint,
    first_difference,
    numeric_options,
    options_hash,
    printable_options,
)
from tests.support.launch import REPOSITORY

NUMBERS = st.one_of(st.floats(allow_nan=False), st.integers(-(2**40), 2**40))
VALUES = st.one_of(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=3).map(tuple))


def make_print(**changes: Any) -> Fingerprint:
    """Of an optimizer with two groups."""
    weight = ParameterPrint("weight", (3, 5), "torch.float32", "cpu", 0, "dense")
    bias = ParameterPrint("bias", (3,), "torch.float32", "cpu", 1, "dense")
    found = Fingerprint(
        settings=(("algorithm", "AdamW"), ("bucket_mb", "8.0"), ("accumulation_steps", "1")),
        groups=((("betas", "(0.9, 0.999)"), ("lr", "0.1")), (("betas", "(0.9, 0.999)"), ("lr", "0.2"))),
        parameters=(weight, bias),
    )
    return dataclasses.replace(found, **changes)


def with_parameter(**changes: Any) -> Fingerprint:
    found = make_print()
    return make_print(parameters=(found.parameters[0], dataclasses.replace(found.parameters[1], **changes)))


ORDINARY = make_print()
DIFFERENT = {
    "algorithm": make_print(settings=(("algorithm", "SGD"), *ORDINARY.settings[1:])),
    "bucket size": make_print(settings=(*ORDINARY.settings[:1], ("bucket_mb", "4.0"), *ORDINARY.settings[2:])),
    "learning rate": make_print(groups=(ORDINARY.groups[0], (("betas", "(0.9, 0.999)"), ("lr", "0.3")))),
    "option": make_print(groups=(ORDINARY.groups[0], (("lr", "0.2"),))),
    "group count": make_print(groups=(*ORDINARY.groups, (("lr", "0.2"),))),
    "parameter count": make_print(parameters=ORDINARY.parameters[:1]),
    "parameter order": make_print(parameters=ORDINARY.parameters[::-1]),
    "name": with_parameter(name="offset"),
    "shape": with_parameter(shape=(1, 3)),
    "dtype": with_parameter(dtype="torch.float64"),
    "device": with_parameter(device="cuda"),
    "group": with_parameter(group=0),
    "frozen": with_parameter(synchronised="no"),
}


def test_equal_prints_have_equal_digests() -> None:
    assert make_print().digest() == ORDINARY.digest()
    assert -(2**63) <= ORDINARY.digest() < 2**63


def test_different_prints_have_different_digests() -> None:
    digests = {name: found.digest() for name, found in DIFFERENT.items()} | {"ordinary": ORDINARY.digest()}
    assert len(set(digests.values())) == len(digests)


def test_hashes_are_equal_in_every_process() -> None:
    """Python's own hash of a text is not."""
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": float("nan"), "amsgrad": False, "name": "x"}
    program = (
        "from heatopt.sync._fingerprint import *; nan = float('nan'); "
        f"print(hash('x'), options_hash([{options!r}]), {ORDINARY!r}.digest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, check=True, text=True)
    of_text, *found = map(int, output.stdout.split())
    assert of_text != hash("x")
    assert found == [options_hash([options]), ORDINARY.digest()]


# Options


def test_printable_options_are_sorted_and_without_parameters() -> None:
    group = {"params": [object()], "param_names": ["w"], "lr": 0.1, "foreach": None, "betas": (0.9, 0.99)}
    printed = printable_options(group)
    assert [name for name, _ in printed] == ["betas", "foreach", "lr"]
    assert dict(printed)["lr"] == "0.1"


def test_callables_are_printed_without_address() -> None:
    printed = [dict(printable_options({"f": f}))["f"] for f in (len, lambda x: x, partial(len), torch.nn.Tanh())]
    assert not any("0x" in text for text in printed)
    assert printed[0] == "len"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor(0.1), torch.tensor(0.1 + 1e-6)),
        ((torch.tensor(0.9), torch.tensor(0.999)), (torch.tensor(0.9), torch.tensor(0.9990001))),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002])),
        (0.1, 0.1 + 1e-16),
    ],
    ids=["tensor", "tuple of tensors", "vector", "float"],
)
def test_options_are_compared_to_the_last_bit(one: Any, other: Any) -> None:
    assert printable_options({"lr": one}) != printable_options({"lr": other})
    assert options_hash([{"lr": one}]) != options_hash([{"lr": other}])
    assert numeric_options({"lr": one}) != numeric_options({"lr": other})
    for value in (one, other):
        assert printable_options({"lr": value}) == printable_options({"lr": value})
        assert options_hash([{"lr": value}]) == options_hash([{"lr": value}])


def test_numeric_options_are_the_numbers() -> None:
    group = {"params": [1.0], "lr": 0.5, "betas": (0.9, 0.99), "foreach": None, "nesterov": True, "mode": "fast"}
    assert dict(numeric_options(group)) == {"lr": 0.5, "betas": (0.9, 0.99), "nesterov": True}


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}, {"mode": "fast"}], ids=str)
def test_hash_leaves_out_what_is_no_number(options: dict[str, Any]) -> None:
    more = options | {"params": [torch.ones(2)], "mode": "slow", "foreach": None, "function": len}
    assert options_hash([options]) == options_hash([more])


@given(st.dictionaries(st.text("abcde", min_size=1), VALUES, max_size=5), st.data())
def test_hash_differs_where_one_value_does(options: dict[str, Any], data: st.DataObject) -> None:
    value = data.draw(VALUES)
    for name, old in options.items():
        changed = options | {name: value}
        assert (options_hash([changed]) == options_hash([options])) == (_as_floats(old) == _as_floats(value))


def _as_floats(value: Any) -> Any:
    """Steps are computed in double precision; 0.0 and -0.0 differ there."""
    return tuple(map(_as_floats, value)) if isinstance(value, tuple) else float(value).hex()


@pytest.mark.parametrize(
    ("one", "other"), [(-1.0, -2.0), (float("nan"), 0.0), (float("inf"), float("nan")), (0.1, (0.1,))], ids=str
)
def test_hash_differs(one: Any, other: Any) -> None:
    """Some that Python's hash does not tell apart."""
    assert options_hash([{"lr": one}]) != options_hash([{"lr": other}])


@pytest.mark.parametrize("value", [float("nan"), (0.1, float("nan"))], ids=str)
def test_nan_equals_nan(value: Any) -> None:
    other = tuple(float(str(x)) for x in value) if isinstance(value, tuple) else float("nan")
    assert options_hash([{"lr": value}]) == options_hash([{"lr": other}])


def test_hash_tells_groups_and_names_apart() -> None:
    one, other = {"lr": 0.1}, {"lr": 0.2}
    found = [options_hash(groups) for groups in ([one, other], [other, one], [one], [one, one], [{"eps": 0.1}])]
    assert len(set(found)) == len(found)


def test_order_of_keys_does_not_matter() -> None:
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    backwards = dict(reversed(group.items()))
    assert options_hash([group]) == options_hash([backwards])
    assert numeric_options(group) == numeric_options(backwards)
    assert printable_options(group) == printable_options(backwards)


def test_equal_numbers_of_other_types_are_equal() -> None:
    assert options_hash([{"maximize": True, "lr": 1}]) == options_hash([{"maximize": 1, "lr": 1.0}])


# The difference in words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("algorithm", ["algorithm", "rank 0 has AdamW", "rank 1 has SGD"]),
        ("bucket size", ["bucket_mb", "8.0", "4.0"]),
        ("learning rate", ["'lr'", "group 1", "rank 0 has 0.2", "rank 1 has 0.3"]),
        ("option", ["'betas'", "group 1"]),
        ("group count", ["number of parameter groups", "rank 0 has 2", "rank 1 has 3"]),
        ("parameter count", ["number of parameters", "rank 0 has 2", "rank 1 has 1", "'bias'"]),
        ("parameter order", ["parameter 0", "'weight'", "'bias'", "the same names in another order"]),
        ("name", ["parameter 1", "'bias'", "'offset'"]),
        ("shape", ["parameter 1", "(3,)", "(1, 3)"]),
        ("dtype", ["parameter 1", "torch.float32", "torch.float64"]),
        ("device", ["parameter 1", "cpu", "cuda"]),
        ("group", ["parameter 1", "group 1", "group 0"]),
        ("frozen", ["parameter 1", "dense on rank 0", "no on rank 1"]),
    ],
)
def test_difference_is_named(name: str, words: list[str]) -> None:
    text = first_difference([ORDINARY, DIFFERENT[name]])
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize("name", DIFFERENT)
def test_rank_that_differs_is_named(name: str) -> None:
    """Also where the shorter list, or the option that is missing, is that of rank 0."""
    other = DIFFERENT[name]
    assert "rank 2" in first_difference([ORDINARY, ORDINARY, other, other])
    assert "rank 2" in first_difference([other, other, ORDINARY])


def test_missing_option_is_named_whoever_misses_it() -> None:
    for prints in ([ORDINARY, DIFFERENT["option"]], [DIFFERENT["option"], ORDINARY]):
        assert "'betas'" in first_difference(prints)


def test_equal_prints_do_not_fail() -> None:
    assert first_difference([ORDINARY, make_print()])
