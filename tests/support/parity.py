"""Comparisons of models, optimizer states and ranks: within a tolerance, or bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from heatopt.comm import Communicator

EXACT = 1e-9
"""Absolute and relative: what the order of a sum in double precision, and three steps, make of the last bits."""


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What training has made: the parameters, and the optimizer's state_dict."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"parameters": parameters, "optimizer": optimizer.state_dict()}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor, number or text inside dictionaries and lists, with its place."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield f"len{path}", len(value)
        for position, item in enumerate(value):
            yield from leaves(item, f"{path}[{position}]")
    else:
        yield path, value


def assert_close(actual: Any, expected: Any, tolerance: float, who: str) -> None:
    """Assert that two structures have the same places, types, shapes and dtypes, and almost the same numbers."""
    found, wanted = dict(leaves(actual)), dict(leaves(expected))
    assert list(found) == list(wanted), f"{who} has other contents"
    for path, value in wanted.items():
        assert type(found[path]) is type(value), f"{path} of {who} is {found[path]!r}, expected {value!r}"
        if isinstance(value, torch.Tensor):
            _assert_close_tensors(found[path], value, tolerance, f"{path} of {who}")
        elif isinstance(value, float):
            error = abs(found[path] - value)
            assert error <= tolerance * (1 + abs(value)), f"{path} of {who} is {found[path]}, expected {value}"
        else:
            assert found[path] == value, f"{path} of {who} is {found[path]!r}, expected {value!r}"


def _assert_close_tensors(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, where: str) -> None:
    same_kind = (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    assert same_kind, f"{where} is of {actual.shape}, {actual.dtype}, expected {expected.shape}, {expected.dtype}"
    assert bool(torch.isfinite(expected).all()), f"{where} is not finite, so it shows nothing"
    if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
        difference = (actual - expected).abs().max().item()
        raise AssertionError(f"{where} differs by up to {difference:.3g}: {actual}, expected {expected}")


def assert_same_bits(actual: Any, expected: Any, who: str) -> None:
    """Assert that two structures are equal to the last bit."""
    found, wanted = dict(leaves(actual)), dict(leaves(expected))
    assert list(found) == list(wanted), f"{who} has other contents"
    for path, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert _kind(found[path]) == _kind(value), f"{path} of {who} has another shape or dtype"
            same = torch.equal(_bytes(found[path]), _bytes(value))
            assert same, f"{path} of {who} has other bits: {found[path]}, expected {value}"
        else:
            assert repr(found[path]) == repr(value), f"{path} of {who} is {found[path]!r}, expected {value!r}"


def assert_ranks_equal(comm: Communicator, value: Any) -> None:
    """Assert that a structure is equal on all ranks, to the last bit. Collective.

    Everything travels through one ``comm.all_gather``; each rank compares what all ranks have with its own. Where even
    the length differs, ``all_gather`` itself raises.
    """
    found = dict(leaves(value))
    text = repr([(path, _kind(leaf)) for path, leaf in found.items()]).encode()
    pieces = {"the contents": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    pieces |= {path: _bytes(leaf) for path, leaf in found.items() if isinstance(leaf, torch.Tensor)}
    gathered = comm.all_gather(torch.cat(list(pieces.values())))
    assert len(gathered) == comm.size
    for rank, row in enumerate(gathered):
        theirs = row.split([len(piece) for piece in pieces.values()])
        different = [path for path, other in zip(pieces, theirs, strict=True) if not torch.equal(other, pieces[path])]
        assert not different, f"rank {rank} and rank {comm.rank} differ in {different}"


def _kind(leaf: Any) -> str:
    """What must agree beside the bytes of a tensor; of anything else, all of it."""
    return f"{tuple(leaf.shape)}, {leaf.dtype}" if isinstance(leaf, torch.Tensor) else repr(leaf)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor, so that -0.0 is not 0.0 and NaN is NaN."""
    tensor = tensor.detach().cpu()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(-1).view(torch.uint8)


def mean_in_rank_order(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The slow and obvious average: one after the other, then divided; half types in single precision, rounded once.

    A rank without a gradient counts as zero; where none has one there is no average.
    """
    given = next((gradient for gradient in gradients if gradient is not None), None)
    if given is None:
        return None
    if given.is_complex():  # parts are divided, not complex numbers, whose division rounds more than once
        mean = mean_in_rank_order(
            [None if gradient is None else torch.view_as_real(gradient) for gradient in gradients]
        )
        return None if mean is None else torch.view_as_complex(mean)
    wide = torch.float32 if given.dtype in (torch.float16, torch.bfloat16) else given.dtype
    total = torch.zeros_like(given, dtype=wide) if gradients[0] is None else gradients[0].to(wide, copy=True)
    for gradient in gradients[1:]:
        total += 0 if gradient is None else gradient.to(wide)
    return (total / len(gradients)).to(given.dtype)
