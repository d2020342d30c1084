"""Every algorithm of torch.optim with the options of torch's own table of test cases, read from the torch installed."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# What the algorithms do not take, measured on torch itself: these raise where the gradient or parameter is of the kind.
_NO_EMPTY = ("Adafactor", "LBFGS")
_MATRICES_ONLY = ("Muon",)
_NO_PARAM_GROUPS = ("LBFGS",)

# The switches between implementations of the same formula. "differentiable" is left out: its parameters are no leaves
# of a graph, so nothing accumulates a gradient that could be averaged.
_IMPLEMENTATIONS = ("foreach", "fused")


@dataclass(frozen=True)
class Case:
    """One algorithm with some options."""

    algorithm: type[torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def name(self) -> str:
        """The algorithm's."""
        return self.algorithm.__name__

    @property
    def takes_empty(self) -> bool:
        """Whether parameters may have no element."""
        return self.name not in _NO_EMPTY

    @property
    def matrices_only(self) -> bool:
        """Whether every parameter must have two dimensions."""
        return self.name in _MATRICES_ONLY

    @property
    def takes_groups(self) -> bool:
        """Whether several parameter groups are allowed."""
        return self.name not in _NO_PARAM_GROUPS

    @property
    def takes_complex(self) -> bool:
        """Whether parameters may be complex."""
        # torch's table says that Muon takes them, but its constructor refuses.
        return bool(_row(self.algorithm).supports_complex) and not self.matrices_only

    @property
    def needs_closure(self) -> bool:
        """Whether ``step`` evaluates the loss itself."""
        return bool(_row(self.algorithm).step_requires_closure)

    @property
    def takes_sparse(self) -> bool:
        """Whether gradients may be sparse."""
        row = _row(self.algorithm)
        return bool(row.supports_sparse or row.only_supports_sparse_grads)

    @property
    def takes_dense(self) -> bool:
        """Whether gradients may be dense."""
        return not _row(self.algorithm).only_supports_sparse_grads

    def optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """A new optimizer; nothing in it is shared with another one."""
        return self.algorithm(parameters, **copy.deepcopy(dict(self.options)))  # type: ignore[call-arg]


def algorithms() -> list[type[torch.optim.Optimizer]]:
    """The algorithms that torch.optim offers."""
    offered = [getattr(torch.optim, name) for name in torch.optim.__all__]
    optimizers = [thing for thing in offered if isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer)]
    return [optimizer for optimizer in optimizers if optimizer is not torch.optim.Optimizer]


def known_algorithms() -> list[type[torch.optim.Optimizer]]:
    """The algorithms of which torch's table has options."""
    return [row.optim_cls for row in _table()]


def default_cases() -> list[Case]:
    """Each algorithm with options under which few steps show whatever goes wrong."""
    telling: dict[str, dict[str, Any]] = {
        "SGD": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1},
        "LBFGS": {"max_iter": 4},
    }
    return [Case(algorithm, telling.get(algorithm.__name__, {})) for algorithm in known_algorithms()]


def option_cases(thorough: bool = True) -> list[Any]:
    """The whole table x (for-loop, foreach, fused), as parameters of a test.

    Args:
        thorough: False for foreach and fused with the first options of each algorithm alone, and without the cases that
            this machine cannot run.
    """
    found = [parameter for row in _table() for parameter in _parameters(row, thorough)]
    return [parameter for parameter in found if thorough or not parameter.marks]


def covering_cases() -> list[Any]:
    """Each set of options in the table and each implementation of each algorithm at least once, but not each pair."""
    found = []
    for row in _table():
        inputs, implementations = row.optim_inputs_func(device="cpu"), _implementations(row)
        for number in range(max(len(inputs), len(implementations))):
            found.append(_case(row, inputs[number % len(inputs)], *implementations[number % len(implementations)]))
    return found


def _parameters(row: Any, thorough: bool) -> Iterator[Any]:
    on_cpu = row.optim_inputs_func(device="cpu")
    for inputs in on_cpu:
        for implementation, switches in _implementations(row):
            if thorough or implementation == "forloop" or inputs is on_cpu[0]:
                yield _case(row, inputs, implementation, switches)
    seen = {_text(inputs) for inputs in on_cpu}
    for inputs in row.optim_inputs_func(device="cuda"):
        if _text(inputs) not in seen:
            seen.add(_text(inputs))
            reason = None if torch.cuda.is_available() else "needs CUDA: capturable optimizers refuse CPU tensors"
            yield _parameter(Case(row.optim_cls, inputs.kwargs, "cuda"), f"{inputs.desc} cuda", reason)


def _case(row: Any, inputs: Any, implementation: str, switches: Mapping[str, bool]) -> Any:
    case = Case(row.optim_cls, _fewer_iterations(row, inputs.kwargs) | switches)
    return _parameter(case, f"{inputs.desc} {implementation}", None)


def _text(inputs: Any) -> str:
    return f"{inputs.desc} {inputs.kwargs}"


def _implementations(row: Any) -> list[tuple[str, dict[str, bool]]]:
    """Name and switches of each implementation for CPU tensors."""
    found = [name for name in _IMPLEMENTATIONS if name in row.supported_impls]
    if "cpu" not in row.supports_fused_on and "fused" in found:
        found.remove("fused")
    off = dict.fromkeys(found, False)
    return [("forloop", off), *((name, off | {name: True}) for name in found)]


def _fewer_iterations(row: Any, options: dict[str, Any]) -> dict[str, Any]:
    # 20 iterations in each step would magnify the last bits of the first one, and take long.
    return {"max_iter": 4} | options if row.step_requires_closure else dict(options)


def _parameter(case: Case, description: str, reason: str | None) -> Any:
    words = re.findall(r"[A-Za-z0-9_]+", description)
    marks = [pytest.mark.skip(reason=reason)] if reason else []
    return pytest.param(case, id="-".join([case.name, *words]), marks=marks)


def _row(algorithm: type[torch.optim.Optimizer]) -> Any:
    return next(row for row in _table() if row.optim_cls is algorithm)


@cache
def _table() -> list[Any]:
    """``torch.testing._internal.common_optimizers.optim_db``.

    The module is loaded apart from the modules beside it that it imports decorators from: those define the tests of all
    operators (seconds), need packages that come with no torch, and freeze torch's global flags.
    """
    path = Path(torch.__file__).parent / "testing" / "_internal" / "common_optimizers.py"
    spec = importlib.util.spec_from_file_location("tests.support._common_optimizers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _without_decorators(("common_device_type", "common_methods_invocations", "common_utils")):
        spec.loader.exec_module(module)
    return list(module.optim_db)


class _Decorator:
    """Stands for a decorator, its factory and its base class: of a table, nothing is run."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, thing: object) -> object:
        return thing


class _Decorators(ModuleType):
    def __getattr__(self, name: str) -> type[_Decorator]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Decorator


@contextmanager
def _without_decorators(names: Iterable[str]) -> Iterator[None]:
    modules = [f"torch.testing._internal.{name}" for name in names]
    loaded = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update({name: _Decorators(name) for name in modules})
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(loaded)
