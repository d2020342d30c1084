"""Collectives have no place in a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["outside_graphs"]

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """Keep a function out of compiled graphs; torch.optim decorates its own methods so."""
    outside: Function = torch._disable_dynamo(function)  # type: ignore[attr-defined, assignment]
    return outside
