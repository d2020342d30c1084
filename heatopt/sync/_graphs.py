"""Collectives have no place in a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["never_compiled", "outside_graphs"]

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """Keep a function out of compiled graphs; torch.optim decorates its own methods so."""
    outside: Function = torch._disable_dynamo(function)  # type: ignore[attr-defined, assignment]
    return outside


def never_compiled(function: Function) -> Function:
    """The same at no cost per call, for what autograd calls: dynamo skips the function's code and all that it calls.

    :func:`outside_graphs` switches dynamo off and on again, 2 microseconds for each parameter's hook.
    """
    engine: Any = torch._C._dynamo.eval_frame
    if not hasattr(engine, "_FrameExecStrategy"):
        return outside_graphs(function)
    skip = engine._FrameExecStrategy(engine._FrameAction.SKIP, engine._FrameAction.SKIP)
    engine.set_code_exec_strategy(function.__code__, skip)
    return function
