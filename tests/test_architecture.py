"""The package keeps the rules of ``tests/support/source_rules.py``, and each of these can be broken."""

from __future__ import annotations

import re

import pytest

from tests.support.launch import LAUNCH
from tests.support.source_rules import (
    CONSTRUCTORS_WITH_MORE,
    FUNCTIONS_WITH_MANY_PARAMETERS,
    GLOBALS,
    LAYERS,
    MANY_PARAMETERS,
    MAX_BODY,
    MAX_LINES,
    MAX_PARAMETERS,
    MAX_POSITIONAL,
    METHODS_WITH_MANY_SETTINGS,
    SOURCES,
    Kind,
    early_restricted_imports,
    find_cycles,
    functions_of,
    imports_of,
    layer_of,
    layer_violations,
    long_functions,
    long_modules,
    long_signatures,
    module_graph,
    mutable_globals,
    named_parameters,
    positional_constructors,
    prints,
    restricted_uses,
    star_imports,
    unfinished_business,
)

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="reads source files: one process is enough")

# The package keeps the rules


def test_no_import_cycle_at_module_level() -> None:
    assert find_cycles(module_graph(SOURCES, [Kind.MODULE])) == set()


def test_no_import_cycle_hidden_by_lazy_imports() -> None:
    assert find_cycles(module_graph(SOURCES, [Kind.MODULE, Kind.LAZY])) == set()


def test_no_import_cycle_through_type_only_imports() -> None:
    assert find_cycles(module_graph(SOURCES, list(Kind))) == set()


def test_imports_point_down() -> None:
    assert layer_violations(SOURCES) == []


def test_import_of_heatopt_loads_no_restricted_library() -> None:
    assert early_restricted_imports(SOURCES) == []


def test_every_layer_exists() -> None:
    assert [prefix for members in LAYERS for prefix in members if prefix not in SOURCES] == []


PER_MODULE = (
    restricted_uses,
    star_imports,
    long_modules,
    long_functions,
    long_signatures,
    positional_constructors,
    prints,
    unfinished_business,
    mutable_globals,
)


@pytest.mark.parametrize("rule", PER_MODULE, ids=lambda rule: rule.__name__)
def test_every_module(rule: object) -> None:
    assert callable(rule)
    assert [line for module, source in SOURCES.items() for line in rule(module, source)] == []


def test_exceptions_are_still_needed() -> None:
    """An entry in a list of exceptions that nothing needs any more would hide the next violation."""
    functions = {name: (f, m) for module, text in SOURCES.items() for name, f, m in functions_of(module, text)}
    needed = {
        (module, name)
        for module, text in SOURCES.items()
        for module_, name in GLOBALS
        if module_ == module and re.search(rf"^(?:def )?{name}\b", text, flags=re.MULTILINE)
    }
    assert set(GLOBALS) == needed
    for name in FUNCTIONS_WITH_MANY_PARAMETERS:
        assert len(named_parameters(*functions[name])) > MANY_PARAMETERS
    for name in METHODS_WITH_MANY_SETTINGS:
        assert len(named_parameters(*functions[name])) > MAX_PARAMETERS
    for owner in CONSTRUCTORS_WITH_MORE:
        function, _ = functions[f"{owner}.__init__"]
        assert len(named_parameters(function, True)) - len(function.args.kwonlyargs) > MAX_POSITIONAL


# The rules find what they are for


def test_imports_are_classified() -> None:
    source = """
import a.b
from . import sibling
from .other import name
from ..above import thing
try:
    import guarded
except ImportError:
    from fallback import *
if TYPE_CHECKING:
    import typed
else:
    import untyped
def function():
    import lazy
    if typing.TYPE_CHECKING:
        from p import q
"""
    found = {(entry.target, entry.kind, entry.star) for entry in imports_of("top.pkg.mod", source, {"top", "top.pkg"})}
    assert found == {
        ("a.b", Kind.MODULE, False),
        ("top.pkg.sibling", Kind.MODULE, False),
        ("top.pkg.other.name", Kind.MODULE, False),
        ("top.above.thing", Kind.MODULE, False),
        ("guarded", Kind.MODULE, False),
        ("fallback", Kind.MODULE, True),
        ("typed", Kind.TYPE_ONLY, False),
        ("untyped", Kind.MODULE, False),
        ("lazy", Kind.LAZY, False),
        ("p.q", Kind.TYPE_ONLY, False),
    }
    assert [entry.target for entry in imports_of("top.pkg", "from . import mod", {"top", "top.pkg"})] == ["top.pkg.mod"]


@pytest.mark.parametrize(
    ("statement", "module_level", "lazy", "type_only"),
    [
        ("from pkg import a", 1, 1, 1),
        ("from pkg.a import name", 1, 1, 1),
        ("import pkg.a", 1, 1, 1),
        ("def f():\n    from pkg.a import name", 0, 1, 1),
        ("if TYPE_CHECKING:\n    from pkg.a import name", 0, 0, 1),
        ("import elsewhere", 0, 0, 0),
    ],
)
def test_cycles_are_found(statement: str, module_level: int, lazy: int, type_only: int) -> None:
    sources = {"pkg": "", "pkg.a": "import pkg.b", "pkg.b": "from pkg import c", "pkg.c": statement}
    kinds = [Kind.MODULE], [Kind.MODULE, Kind.LAZY], list(Kind)
    cycles = [find_cycles(module_graph(sources, chosen)) for chosen in kinds]
    assert [len(found) for found in cycles] == [module_level, lazy, type_only]
    assert all(found <= {("pkg.a", "pkg.b", "pkg.c")} for found in cycles)


def test_import_of_itself_is_a_cycle() -> None:
    assert find_cycles(module_graph({"pkg.a": "import pkg.a"}, [Kind.MODULE])) == {("pkg.a",)}


@pytest.mark.parametrize(
    ("module", "statement", "bad"),
    [
        ("heatopt.comm._mpi", "from heatopt.sync import Call", True),
        ("heatopt.comm._mpi", "def f():\n    import heatopt.sync._plan", True),
        ("heatopt.buckets._layout", "if TYPE_CHECKING:\n    from heatopt.optim import GradScaler", True),
        ("heatopt.errors", "from heatopt.comm import world", True),
        ("heatopt.optim._clip", "import heatopt", True),
        ("heatopt.sync._plan", "from heatopt import lr_scheduler", True),
        ("heatopt.sync._plan", "from heatopt.comm import world", False),
        ("heatopt.sync._plan", "from heatopt.sync._settings import SyncSettings", False),
        ("heatopt.comm._mpi", "from heatopt.errors import HeatoptError", False),
        ("heatopt", "from heatopt.optim import GradScaler", False),
    ],
)
def test_upward_imports_are_found(module: str, statement: str, bad: bool) -> None:
    assert bool(layer_violations(dict.fromkeys(SOURCES, "") | {module: statement})) is bad


def test_module_of_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"heatopt\.strange is in no layer"):
        layer_of("heatopt.strange")


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("heatopt.sync._plan", "import mpi4py", True),
        ("heatopt.sync._plan", "def f():\n    from mpi4py import MPI", True),
        ("heatopt.optim._clip", "import torch.distributed as dist", True),
        ("heatopt.optim._clip", "from torch import distributed", True),
        ("heatopt.optim._clip", "import torch\ntorch.distributed.barrier()", True),
        ("heatopt.optim._clip", "importlib.import_module('mpi4py.MPI')", True),
        ("heatopt.comm._launch", "def f():\n    from mpi4py import MPI", False),
        ("heatopt.comm._mpi", "from mpi4py import MPI", False),
        ("heatopt.sync._plan", "if TYPE_CHECKING:\n    from mpi4py import MPI", False),
        ("heatopt.sync._plan", "import torch.distributions", False),
    ],
)
def test_restricted_uses_are_found(module: str, source: str, bad: bool) -> None:
    assert bool(restricted_uses(module, source)) is bad


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("from heatopt.comm import _mpi", True),
        ("def f():\n    from heatopt.comm import _mpi", False),
        ("if TYPE_CHECKING:\n    from heatopt.comm import _mpi", False),
    ],
)
def test_early_restricted_imports_are_found(source: str, bad: bool) -> None:
    sources = {"heatopt": "import heatopt.comm", "heatopt.comm": source, "heatopt.comm._mpi": "from mpi4py import MPI"}
    assert early_restricted_imports(sources) == (
        ["heatopt.comm._mpi:1 imports mpi4py.MPI, and heatopt loads it"] if bad else []
    )


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (star_imports, "from torch.optim import *", "from torch.optim import SGD"),
        (long_modules, "x = 1\n" * (MAX_LINES + 1), "x = 1\n" * MAX_LINES),
        (
            long_functions,
            "class A:\n    def f(self):\n" + "        x = 1\n" * (MAX_BODY + 1),
            "def f():\n" + f"    '''{'doc' + chr(10) * 40}'''\n" + "    x = 1\n" * MAX_BODY,
        ),
        (
            long_signatures,
            "class A:\n    def f(self, a, b, c, d, e, f, g, *, h, i): ...",
            "class A:\n    def f(self, a, b, c, d, e, f, g, *, h): ...",
        ),
        (
            long_signatures,
            "@staticmethod\ndef f(a, b, c, d, e, f, g, h, i, j, k): ...",
            "class A:\n    @staticmethod\n    def f(a, b, c, d, e, f, g, h): ...",
        ),
        (
            positional_constructors,
            "class GradScaler:\n    def __init__(self, a, b, c): ...",
            "class GradScaler:\n    def __init__(self, a, b, *, c): ...\nclass _A:\n    def __init__(self, a, b, c): 1",
        ),
        (prints, "def f():\n    print('x')", "def f():\n    logger.info('print()')"),
        (unfinished_business, "x = 1  # TODO: better", "todo = 1  # done"),
        (unfinished_business, "'''Adds.\n\nFIXME overflow\n'''", "'''Adds hackles.'''"),
        (mutable_globals, "cache = {}", "NAMES = ('a', 'b')"),
        (mutable_globals, "cache: list[int] = []", "__all__ = ['f']"),
        (mutable_globals, "registry = WeakKeyDictionary()", "T = TypeVar('T')"),
        (mutable_globals, "names = [x for x in y]", "def f():\n    names = []"),
        (mutable_globals, "if x:\n    lock = threading.Lock()", "if x:\n    LIMIT = 3"),
        (mutable_globals, "count = 0\ndef f():\n    global count\n    count += 1", "count = 0"),
        (mutable_globals, "@functools.lru_cache(maxsize=None)\ndef f(): ...", "@property\ndef f(): ..."),
    ],
)
def test_violations_are_found(rule: object, bad: str, good: str) -> None:
    assert callable(rule)
    assert len(rule("heatopt.snippet", bad)) == 1
    assert rule("heatopt.snippet", good) == []


def test_more_parameters_than_ever_allowed() -> None:
    source = f"def f({', '.join(f'p{i}' for i in range(MAX_PARAMETERS + 1))}): ..."
    (found,) = long_signatures("m", source)
    assert found == f"m.f has {MAX_PARAMETERS + 1} parameters, at most {MAX_PARAMETERS} are allowed"
