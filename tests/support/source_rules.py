"""Rules about the shape of the package, read from its source alone: who imports whom, how large things may get.

Each rule is a function of sources that returns the violations it finds as readable lines.

How an import counts:

* *module level*: runs when the module is imported. There must be no cycle.
* *lazy*: inside a function. It must respect the layers too, and no cycle may be hidden behind it.
* *type-only*: under ``if TYPE_CHECKING``. It never runs, so it cannot make an import fail, and it may name what it
  likes of other libraries. But it is knowledge of one module about another all the same: it must respect the
  layers, and close no cycle either.

``from package import name`` counts as an import of the module ``package.name`` if there is one, else of ``package``.
That importing a module runs its packages' ``__init__`` first is not counted: it is so for every module.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.support.launch import REPOSITORY

PACKAGE = REPOSITORY / "heatopt"

# From the bottom to the top. A module may import from its own layer and from those below it.
LAYERS = (
    ("heatopt.errors", "heatopt._log", "heatopt._version"),
    ("heatopt.comm",),
    ("heatopt.buckets",),
    ("heatopt.sync",),
    ("heatopt.sharding",),
    ("heatopt.local",),
    ("heatopt.checkpoint",),
    ("heatopt.optim",),
    ("heatopt", "heatopt.lr_scheduler", "heatopt.compat", "heatopt.cli", "heatopt.__main__"),
)

# Libraries that start things or that are optional: for the communicators alone, and not before one is made.
RESTRICTED = ("mpi4py", "torch.distributed")
RESTRICTED_TO = "heatopt.comm."

# State of the process, and the constants that Python can only write as mutable objects.
GLOBALS = {
    ("heatopt.checkpoint._pieces", "STORED_AS"): "constant table: names of dtypes",
    ("heatopt.checkpoint._writing", "_pending"): "weak: the save that a communicator's ranks have not waited for",
    ("heatopt.comm", "_ON_DEMAND"): "constant table: module of each name that is loaded at its first use",
    ("heatopt.comm._cuda_aware", "mpi_reads_cuda_memory"): "cache: the probe costs a process",
    ("heatopt.comm._exit", "_installed"): "sys.excepthook belongs to the process, so it is replaced once",
    ("heatopt.comm._launch", "_lock"): "guards the one world",
    ("heatopt.comm._launch", "_world"): "one world per process, as MPI_COMM_WORLD",
    ("heatopt.comm._mpi", "_OPAQUE"): "constant table: integers by size",
    ("heatopt.comm._torch", "_worlds"): "keys in a store that outlives a communicator must not repeat",
    ("heatopt.comm._watchdog", "_LAST_WORDS"): "constant table: words for messages",
    ("heatopt.comm._work", "COMPLETED"): "stateless",
    ("heatopt.sync._tuning", "DEFAULT"): "a named tuple",
    ("heatopt.sharding._declaration", "_MANNERS"): "constant table: how each algorithm may be sharded",
    ("heatopt.optim._ownership", "_owners"): "weak: finds a second wrapper of the same parameter",
    ("heatopt.sync._header", "_CALL_NAMES"): "constant table: names for messages",
    ("heatopt.sync._coordinator", "_registry"): "weak: optimizers of one communicator share a coordinator",
    ("heatopt.sync._coordinator", "_registry_lock"): "guards the registry: ranks may be threads",
}

MAX_LINES = 400
MAX_BODY = 60
MAX_PARAMETERS = 12
# Above this number a function needs a reason here.
MANY_PARAMETERS = 8
FUNCTIONS_WITH_MANY_PARAMETERS: dict[str, str] = {
    "heatopt.checkpoint._save.save": "what users save, by keyword",
    "heatopt.optim._local_methods.DiLoCo.__init__": "the numbers of two papers, by keyword",
}
# What a method is known by, all by keyword: these may exceed MAX_PARAMETERS too.
METHODS_WITH_MANY_SETTINGS: dict[str, str] = {
    "heatopt.optim._arguments.check_arguments": "the arguments of DataParallelOptimizer, by keyword",
    "heatopt.optim._daso.DASO.__init__": "the arguments of Heat's DASO",
    "heatopt.optim._data_parallel.DataParallelOptimizer.__init__": "what users choose, by keyword",
    "heatopt.optim._periodic.PeriodicOptimizer.__init__": "the settings of all local methods",
}

# Here constructors have the parameters that other systems, or torch, have given them.
FOREIGN_SIGNATURES = ("heatopt.compat.", "heatopt.optim._fused_adam.")

# Parameters of a public constructor that may be given by position.
MAX_POSITIONAL = 2
CONSTRUCTORS_WITH_MORE = {
    "heatopt.comm._communicator.Communicator": "for backends, not for users",
    "heatopt.comm._shared_memory.SharedBlock": "made by NodeMemory alone",
    "heatopt.comm._simulated.SimulatedCommunicator": "made by SimulatedWorld alone",
    "heatopt.comm._threads.ThreadCommunicator": "made by ThreadWorld alone",
    "heatopt.comm._torch.TorchCommunicator": "(store, rank, size), as torch's own process groups take them",
    "heatopt.comm._work.Work": "made by collectives alone",
}


FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Kind(Enum):
    """When an import runs."""

    MODULE = "module"
    LAZY = "lazy"
    TYPE_ONLY = "type-only"


@dataclass(frozen=True)
class Import:
    """One imported name: ``target`` is the module, or ``module.name`` where a name is taken from it."""

    importer: str
    target: str
    kind: Kind
    line: int
    star: bool = False


def module_name(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_package() -> dict[str, str]:
    """Source of each module of heatopt, by name."""
    return {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


SOURCES = read_package()
PACKAGES = frozenset(module_name(path.parent / "__init__.py") for path in PACKAGE.rglob("__init__.py"))


def exported(source: str) -> set[str]:
    """The names in ``__all__``."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


# What users import from.
PUBLIC = frozenset().union(*(exported(SOURCES[name]) for name in ("heatopt", "heatopt.comm", "heatopt.errors")))


# Imports


def imports_of(module: str, source: str, packages: Iterable[str] = PACKAGES) -> list[Import]:
    """All imports of a module, relative ones resolved."""
    found: list[Import] = []
    base = module if module in packages else module.rpartition(".")[0]

    def visit(node: ast.AST, kind: Kind) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, kind, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = node.module or ""
            if node.level:
                parents = base.split(".")
                prefix = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            found.extend(
                Import(module, f"{prefix}.{alias.name}".removesuffix(".*"), kind, node.lineno, alias.name == "*")
                for alias in node.names
            )
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            kind = Kind.LAZY if kind is Kind.MODULE else kind
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            for guarded in node.body:
                visit(guarded, Kind.TYPE_ONLY)
            for other in node.orelse:
                visit(other, kind)
            return
        for inner in ast.iter_child_nodes(node):
            visit(inner, kind)

    visit(ast.parse(source), Kind.MODULE)
    return found


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def module_graph(sources: Mapping[str, str], kinds: Iterable[Kind]) -> dict[str, set[str]]:
    """Modules that each module imports, among those given."""
    packages = {name for name in sources if any(other.startswith(f"{name}.") for other in sources)}
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for entry in imports_of(name, source, packages):
            target = _module_of(entry.target, sources)
            if target is not None and entry.kind in set(kinds):
                graph[name].add(target)
    return graph


def _module_of(target: str, modules: Iterable[str]) -> str | None:
    """The module that ``target`` is or is taken from; None if it is not among ``modules``."""
    known = set(modules)
    while target:
        if target in known:
            return target
        target = target.rpartition(".")[0]
    return None


def find_cycles(graph: Mapping[str, set[str]]) -> set[tuple[str, ...]]:
    """Groups of modules that reach each other, each group sorted (strongly connected components)."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting.extend(graph[name])
        reach[start] = seen
    return {tuple(sorted(b for b in graph if a in reach[b] and b in reach[a])) for a in graph if a in reach[a]}


def layer_of(module: str) -> int:
    """Number of the layer that ``module`` is in, by the longest prefix. The top package stands for itself alone."""
    best = max(
        (
            (len(prefix), number)
            for number, members in enumerate(LAYERS)
            for prefix in members
            if module == prefix or (prefix != "heatopt" and module.startswith(f"{prefix}."))
        ),
        default=None,
    )
    if best is None:
        raise ValueError(f"{module} is in no layer: add it to LAYERS")
    return best[1]


def layer_violations(sources: Mapping[str, str]) -> list[str]:
    """Imports that point up, whatever their kind."""
    found = []
    for name, source in sources.items():
        for entry in imports_of(name, source):
            target = _module_of(entry.target, sources)
            if target is None and entry.target.split(".")[0] == "heatopt":
                target = entry.target
            if target is not None and layer_of(target) > layer_of(name):
                found.append(f"{name}:{entry.line} imports {entry.target}, which is above it ({entry.kind.value})")
    return found


def restricted_uses(module: str, source: str) -> list[str]:
    """Uses of a restricted library outside its place: by import, by its dotted name or through importlib."""
    if module.startswith(RESTRICTED_TO):
        return []
    found = []
    for entry in imports_of(module, source):
        if entry.kind is not Kind.TYPE_ONLY and (library := _restricted(entry.target)):
            found.append(f"{module}:{entry.line} imports {library} ({entry.kind.value})")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in RESTRICTED:
            found.append(f"{module}:{node.lineno} uses {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            names = [_restricted(str(a.value)) for a in node.args if isinstance(a, ast.Constant)]
            found.extend(f"{module}:{node.lineno} imports {name} by its name" for name in names if name)
    return found


def _last_name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _restricted(target: str) -> str | None:
    return next((library for library in RESTRICTED if f"{target}.".startswith(f"{library}.")), None)


def loaded_with(start: str, sources: Mapping[str, str]) -> set[str]:
    """The modules that are loaded when ``start`` is imported."""
    graph = module_graph(sources, [Kind.MODULE])
    loaded: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in loaded:
            loaded.add(name)
            waiting.extend(graph[name])
    return loaded


def early_restricted_imports(sources: Mapping[str, str]) -> list[str]:
    """Restricted libraries that ``import heatopt`` itself would import."""
    return [
        f"{name}:{entry.line} imports {entry.target}, and heatopt loads it"
        for name in sorted(loaded_with("heatopt", sources))
        for entry in imports_of(name, sources[name])
        if entry.kind is Kind.MODULE and _restricted(entry.target)
    ]


def star_imports(module: str, source: str) -> list[str]:
    """Lines with ``from x import *``."""
    return [f"{module}:{e.line} imports * from {e.target}" for e in imports_of(module, source) if e.star]


# Sizes and signatures


def functions_of(module: str, source: str) -> Iterator[tuple[str, FunctionNode, bool]]:
    """Each function with its dotted name and whether it is a method."""

    def visit(node: ast.AST, prefix: str, in_class: bool) -> Iterator[tuple[str, FunctionNode, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{prefix}.{child.name}", child, in_class
                yield from visit(child, f"{prefix}.{child.name}", False)
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}.{child.name}", True)
            else:
                yield from visit(child, prefix, in_class)

    yield from visit(ast.parse(source), module, False)


def long_modules(module: str, source: str) -> list[str]:
    """The module itself, if it has too many lines."""
    lines = len(source.splitlines())
    return [f"{module} has {lines} lines, at most {MAX_LINES} are allowed"] if lines > MAX_LINES else []


def body_lines(function: FunctionNode) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def long_functions(module: str, source: str) -> list[str]:
    """Functions with too long a body."""
    return [
        f"{name} has a body of {body_lines(function)} lines, at most {MAX_BODY} are allowed"
        for name, function, _ in functions_of(module, source)
        if body_lines(function) > MAX_BODY
    ]


def named_parameters(function: FunctionNode, is_method: bool) -> list[str]:
    a = function.args
    positional = [p.arg for p in (*a.posonlyargs, *a.args)]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
    if is_method and not static:
        positional = positional[1:]
    return [*positional, *(p.arg for p in a.kwonlyargs)]


def long_signatures(module: str, source: str) -> list[str]:
    """Functions with too many parameters, or with many and no reason."""
    found = []
    for name, function, is_method in functions_of(module, source):
        if function.name == "__init__" and name.startswith(FOREIGN_SIGNATURES):
            continue
        count = len(named_parameters(function, is_method))
        if name in METHODS_WITH_MANY_SETTINGS:
            continue
        if count > MAX_PARAMETERS:
            found.append(f"{name} has {count} parameters, at most {MAX_PARAMETERS} are allowed")
        elif count > MANY_PARAMETERS and name not in FUNCTIONS_WITH_MANY_PARAMETERS:
            found.append(f"{name} has {count} parameters: give the reason in FUNCTIONS_WITH_MANY_PARAMETERS")
    return found


def positional_constructors(module: str, source: str, public: Iterable[str] = PUBLIC) -> list[str]:
    """Constructors of public classes with more than two parameters that may be given by position."""
    found = []
    for name, function, is_method in functions_of(module, source):
        owner = name.rpartition(".")[0]
        if function.name != "__init__" or not is_method or owner.rpartition(".")[2] not in public:
            continue
        if name.startswith(FOREIGN_SIGNATURES):
            continue
        count = len(named_parameters(function, True)) - len(function.args.kwonlyargs)
        if count > MAX_POSITIONAL and owner not in CONSTRUCTORS_WITH_MORE:
            found.append(f"{owner} takes {count} parameters by position, at most {MAX_POSITIONAL} are allowed")
    return found


# Habits


def prints(module: str, source: str) -> list[str]:
    """Calls of print()."""
    return [
        f"{module}:{node.lineno} calls print()"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def unfinished_business(module: str, source: str) -> list[str]:
    """Marks of work left for later, in comments and strings."""
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [
        f"{module}:{token.start[0]} says {found[0]}"
        for token in tokens
        if token.type in (tokenize.COMMENT, tokenize.STRING) and (found := mark.search(token.string))
    ]


_IMMUTABLE_CALLS = {
    *("TypeVar", "NewType", "ParamSpec", "namedtuple"),
    *("frozenset", "tuple", "getLogger", "compile", "attrgetter", "itemgetter"),
}
_MUTABLE_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


def mutable_globals(module: str, source: str) -> list[str]:
    """Module-level names whose value can change: containers, objects, ``global`` statements, caches."""
    tree = ast.parse(source)
    names: dict[str, int] = {}
    for node in _module_level(tree.body):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            targets = [node.target]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and target.id != "__all__" and _is_mutable(value):
                names.setdefault(target.id, node.lineno)
    for found in ast.walk(tree):
        if isinstance(found, ast.Global):
            names.update({name: names.get(name, found.lineno) for name in found.names})
        if isinstance(found, ast.FunctionDef) and any(_is_cache(d) for d in found.decorator_list):
            names[found.name] = found.lineno
    return [
        f"{module}:{line} has the mutable global {name}: give the reason in GLOBALS"
        for name, line in names.items()
        if (module, name) not in GLOBALS
    ]


def _module_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, those inside ``if``, ``for``, ``try`` and ``with`` included."""
    for node in body:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _module_level(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return _last_name(value.func) not in _IMMUTABLE_CALLS
    return isinstance(value, _MUTABLE_NODES)


def _is_cache(decorator: ast.expr) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return _last_name(function) in ("cache", "lru_cache")
