"""Tensors of another kind are noticed, and the loop in C++ that looks for them may be missing."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from heatopt.optim._flat_kinds import SameKind, kinds_of


def tensors() -> list[Tensor]:
    return [nn.Parameter(torch.ones(6)), torch.ones(()), torch.ones(0, 3), torch.ones(4, 4), torch.ones(2).half()]


def test_the_same_and_others_of_their_kind() -> None:
    same_kind = SameKind(tensors())
    assert same_kind(tensors())
    assert same_kind([2 * tensor if number else nn.Parameter(tensor) for number, tensor in enumerate(tensors())])
    assert kinds_of(tensors()) == kinds_of([2 * tensor for tensor in tensors()])


@pytest.mark.parametrize(
    ("position", "change"),
    [
        (0, lambda tensor: nn.Parameter(tensor[:3])),
        (0, lambda tensor: nn.Parameter(tensor.detach().view(2, 3))),
        (0, lambda tensor: nn.Parameter(tensor.double())),
        (1, lambda tensor: tensor.view(1)),
        (2, lambda tensor: tensor.view(3, 0)),
        (3, lambda tensor: tensor.t()),
        (3, lambda tensor: torch.ones(4, 8)[:, ::2]),
        (4, lambda tensor: tensor.bfloat16()),
        (4, lambda tensor: tensor.to("meta")),
        (4, lambda tensor: tensor.to_sparse()),
        (4, lambda tensor: None),
    ],
)
def test_another_kind(position: int, change: Callable[[Tensor], Tensor | None]) -> None:
    same_kind, others = SameKind(tensors()), tensors()
    changed = change(others[position])
    others[position] = changed  # type: ignore[call-overload]
    assert not same_kind(others)
    if changed is not None and changed.layout is torch.strided:
        assert kinds_of(others) != kinds_of(tensors())


def test_fewer_and_more() -> None:
    same_kind = SameKind(tensors())
    assert not same_kind(tensors()[:-1])
    assert not same_kind([*tensors(), torch.ones(1)])
    assert not SameKind([])([])


def test_what_it_does_not_know() -> None:
    for odd in ([None], [torch.ones(2), None]):
        assert not SameKind(odd)(odd)


def test_torch_without_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    assert not SameKind(tensors())(tensors())


def test_keeps_no_tensor() -> None:
    tensor = torch.ones(3)
    gone = weakref.ref(tensor)
    same_kind = SameKind([tensor])
    del tensor
    assert gone() is None
    assert same_kind([torch.zeros(3)])
