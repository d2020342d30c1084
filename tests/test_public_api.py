"""What users see of heatopt: its names, their documentation, and that importing it does nothing else."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import heatopt
from heatopt import comm, compat, errors, lr_scheduler
from tests.support.launch import LAUNCH, REPOSITORY
from tests.support.source_rules import SOURCES, exported

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="about names: one process is enough")

# A name comes or goes here only together with its place in docs/api.md.
OWN_NAMES = {
    "CO2",
    "DASO",
    "CheckpointError",
    "CollectiveTimeoutError",
    "Communicator",
    "Compression",
    "DataParallelOptimizer",
    "DetectMetricPlateau",
    "DiLoCo",
    "FusedAdam",
    "GradScaler",
    "HeatoptError",
    "LocalSGD",
    "NoCheckpointError",
    "RankFailedError",
    "RankMismatchError",
    "ResumableSampler",
    "SlowMo",
    "Threshold",
    "TopK",
    "__version__",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "comm",
    "compat",
    "errors",
    "load",
    "lr_scheduler",
    "reduce_metric",
    "save",
    "sync_buffers",
    "world",
}
COMM_NAMES = {
    "BucketMemory",
    "Communicator",
    "Handle",
    "MPICommunicator",
    "NodeGroups",
    "Passage",
    "ReduceOptions",
    "SharedBlock",
    "SimulatedCommunicator",
    "SimulatedWorld",
    "SingleCommunicator",
    "ThreadCommunicator",
    "ThreadWorld",
    "Topology",
    "TorchCommunicator",
    "VirtualNetwork",
    "Work",
    "check_timeout",
    "detect_launch",
    "rendezvous_store",
    "world",
}
SCHEDULER_NAMES = {
    "Constant",
    "ExponentialDecay",
    "LinearScaling",
    "Milestones",
    "ParamScheduler",
    "Ramp",
    "Rounded",
    "Scaled",
    "Schedule",
    "WarmupDecay",
    "goyal_lr",
    "megatron_lr",
    "megatron_weight_decay",
}
# These live in a module that starts MPI when it is imported.
STARTS_MPI = {"MPICommunicator"}

MODULES = (heatopt, comm, errors, lr_scheduler)
COMPAT = (compat.hetu, compat.npu, compat.singa)


def module_id(module: ModuleType) -> str:
    return module.__name__


# Names


@pytest.mark.parametrize("module", MODULES, ids=module_id)
def test_all_is_sorted_and_without_repetition(module: ModuleType) -> None:
    assert module.__all__ == sorted(set(module.__all__))


@pytest.mark.parametrize("module", [*MODULES, compat, *COMPAT], ids=module_id)
def test_dir_has_the_public_names_and_no_other(module: ModuleType) -> None:
    # `from __future__ import annotations` leaves a name behind.
    public = {name for name in dir(module) if not name.startswith("_")} - {"annotations"}
    assert public == {name for name in module.__all__ if not name.startswith("_")}


def test_names_of_heatopt() -> None:
    assert set(heatopt.__all__) == OWN_NAMES | set(torch.optim.__all__)


def test_names_of_comm() -> None:
    assert set(comm.__all__) == COMM_NAMES


def test_names_of_lr_scheduler() -> None:
    assert set(lr_scheduler.__all__) == SCHEDULER_NAMES | set(torch.optim.lr_scheduler.__all__)


def test_names_of_compat() -> None:
    assert set(compat.hetu.__all__) == {"AdamOptimizer", "GradScaler", "SGDOptimizer"}
    assert compat.npu.NpuFusedAdam is heatopt.FusedAdam
    algorithms = {"AdaGrad", "Adam", "RMSProp", "SGD"}
    assert set(compat.singa.__all__) == algorithms | {"Constant", "DistOpt", "ExponentialDecay", "Model"}
    for name in ("Constant", "ExponentialDecay"):
        assert getattr(compat.singa, name) is getattr(lr_scheduler, name)


def test_names_of_errors() -> None:
    assert {f"heatopt.errors.{name}" for name in errors.__all__} == {
        f"{kind.__module__}.{name}" for name, kind in inspect.getmembers(errors, inspect.isclass)
    }


@pytest.mark.parametrize("name", sorted(set(torch.optim.__all__) - {"lr_scheduler"}))
def test_torch_optim_is_here_itself(name: str) -> None:
    assert getattr(heatopt, name) is getattr(torch.optim, name)
    assert name in dir(heatopt)
    assert name in heatopt.__all__


def test_lr_scheduler_is_heatopts_own() -> None:
    assert heatopt.lr_scheduler is lr_scheduler
    assert heatopt.lr_scheduler.__name__ == "heatopt.lr_scheduler"


@pytest.mark.parametrize("name", torch.optim.lr_scheduler.__all__)
def test_torch_lr_scheduler_is_here_itself(name: str) -> None:
    assert getattr(lr_scheduler, name) is getattr(torch.optim.lr_scheduler, name)
    assert name in dir(lr_scheduler)
    assert name in lr_scheduler.__all__


@pytest.mark.parametrize("module", MODULES, ids=module_id)
def test_unknown_name(module: ModuleType) -> None:
    with pytest.raises(AttributeError, match=rf"'{re.escape(module.__name__)}' has no attribute 'Adan'"):
        _ = module.Adan


def test_names_are_the_same_from_both_places() -> None:
    assert heatopt.world is comm.world
    assert heatopt.Communicator is comm.Communicator
    assert all(getattr(heatopt, name) is getattr(errors, name) for name in errors.__all__)


def test_version_is_that_of_the_project() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert f'\nversion = "{heatopt.__version__}"\n' in text


# Types


def test_type_checkers_see_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy")
    from mypy import api

    expected = {
        "heatopt.Adam": "-> torch.optim.adam.Adam",
        "heatopt.lr_scheduler.StepLR": "-> torch.optim.lr_scheduler.StepLR",
        "heatopt.lr_scheduler.ParamScheduler": "-> heatopt.lr_scheduler._param_scheduler.ParamScheduler",
        "heatopt.reduce_metric(1)": "float",
        "heatopt.reduce_metric(torch.ones(1))": "torch._tensor.Tensor",
        "heatopt.world().allreduce": "def (tensor: torch._tensor.Tensor, op: str =) -> torch._tensor.Tensor",
        "heatopt.comm.MPICommunicator": "-> heatopt.comm._mpi.MPICommunicator",
        "heatopt.DataParallelOptimizer": "-> heatopt.optim._data_parallel.DataParallelOptimizer",
    }
    snippet = tmp_path / "snippet.py"
    snippet.write_text("import heatopt, torch\n" + "".join(f"reveal_type({expression})\n" for expression in expected))
    monkeypatch.setenv("MYPYPATH", str(REPOSITORY))
    # The cache of `make types`: with it this takes a second.
    options = ["--config-file", str(REPOSITORY / "pyproject.toml"), "--cache-dir", str(REPOSITORY / ".mypy_cache")]
    report, problems, _ = api.run([*options, str(snippet)])
    assert problems == ""
    revealed = re.findall(r'Revealed type is "(.*)"', report)
    assert len(revealed) == len(expected), report
    assert [type_ for type_, end in zip(revealed, expected.values(), strict=True) if not type_.endswith(end)] == []


# Import

_SIDE_EFFECTS = """
import json, random, sys, threading
import numpy, torch, torch.optim
def rng():
    return [torch.get_rng_state().tolist(), random.getstate()[1], numpy.random.get_state()[1].tolist()]
hook, threads, states = sys.excepthook, threading.active_count(), json.dumps(rng())
options = [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()]
import heatopt
print(json.dumps({
    "mpi4py": "mpi4py" in sys.modules,
    "torch.distributed": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "excepthook": sys.excepthook is not hook,
    "random numbers": json.dumps(rng()) != states,
    "threads": threading.active_count() != threads,
    "torch options": options != [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()],
    "demo libraries": any(name in sys.modules for name in ("rich", "matplotlib", "sklearn")),
}))
"""


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )


def test_import_has_no_side_effect() -> None:
    result = run_python(_SIDE_EFFECTS)
    assert (result.returncode, result.stderr) == (0, "")
    effects = json.loads(result.stdout)
    assert effects == dict.fromkeys(effects, False)


def test_one_process_starts_no_communication() -> None:
    result = run_python(
        "import sys, threading, torch, heatopt\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = heatopt.DataParallelOptimizer(heatopt.SGD(model.parameters()), model=model)\n"
        "model(torch.ones(4, 2)).sum().backward()\n"
        "optimizer.step()\n"
        "assert heatopt.reduce_metric(0.5) == 0.5\n"
        "assert 'mpi4py' not in sys.modules\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert sys.excepthook is sys.__excepthook__\n"
        "assert not [t for t in threading.enumerate() if 'heatopt' in t.name]\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py")
def test_communicators_are_loaded_at_first_use() -> None:
    result = run_python(
        "import sys, heatopt.comm as comm\n"
        "assert 'mpi4py' not in sys.modules\n"
        "print(*(getattr(comm, name).__name__ for name in comm.__all__))\n"
        "assert 'mpi4py.MPI' in sys.modules\n"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == comm.__all__


# Documentation


def api_page() -> str:
    return (REPOSITORY / "docs" / "api.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        *(f"heatopt.{name}" for name in sorted(OWN_NAMES - set(errors.__all__))),
        *(f"heatopt.errors.{name}" for name in errors.__all__),
        *(f"heatopt.comm.{name}" for name in sorted(COMM_NAMES - {"Communicator", "world"})),
        *(f"heatopt.lr_scheduler.{name}" for name in sorted(SCHEDULER_NAMES)),
        *(f"heatopt.compat.hetu.{name}" for name in compat.hetu.__all__),
        *(f"heatopt.compat.singa.{name}" for name in sorted(set(compat.singa.__all__) - SCHEDULER_NAMES)),
    ],
)
def test_own_name_is_documented(name: str) -> None:
    lines = api_page().splitlines()
    # A module is a heading with text under it; everything else comes from its docstring.
    assert f"::: {name}" in lines or any(line.startswith("## ") and f"`{name}`" in line for line in lines)


@pytest.mark.parametrize(
    "name",
    sorted(exported(SOURCES["heatopt"]) - OWN_NAMES)
    + sorted(exported(SOURCES["heatopt.lr_scheduler"]) - SCHEDULER_NAMES),
)
def test_torch_name_is_listed_with_a_link(name: str) -> None:
    assert re.search(rf"\[`{name}`\]\(https://docs\.pytorch\.org/docs/stable/[\w./#-]+\)", api_page())


def test_api_page_has_no_name_that_does_not_exist() -> None:
    for name in re.findall(r"^::: (\S+)$", api_page(), flags=re.MULTILINE):
        module_, _, attribute = name.rpartition(".")
        module = {m.__name__: m for m in (*MODULES, *COMPAT)}[module_]
        assert attribute in module.__all__


def own_objects() -> Iterator[tuple[str, Any]]:
    """Every public object of heatopt and the public members of its classes."""
    for module in (*MODULES, compat, *COMPAT):
        yield module.__name__, module
        for name in module.__all__:
            if name in STARTS_MPI or name.startswith("_"):
                continue
            thing = getattr(module, name)
            if not getattr(thing, "__module__", "").startswith("heatopt"):
                continue
            yield f"{module.__name__}.{name}", thing
            for member, value in vars(thing).items() if inspect.isclass(thing) else ():
                if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                    yield f"{module.__name__}.{name}.{member}", getattr(thing, member)


def test_everything_public_has_a_docstring() -> None:
    found = dict(own_objects())
    assert len(found) > 50
    # For a class its own; for a method the one of the base class will do.
    docs = {name: thing.__doc__ if inspect.isclass(thing) else inspect.getdoc(thing) for name, thing in found.items()}
    bare = [name for name, text in docs.items() if not text]
    assert bare == []


def test_public_functions_are_annotated() -> None:
    missing = []
    for name, thing in own_objects():
        if inspect.isfunction(thing):
            parameters = [p for p in inspect.signature(thing).parameters.values() if p.name not in ("self", "cls")]
            if any(p.annotation is p.empty for p in parameters) or "return" not in thing.__annotations__:
                missing.append(name)
    assert missing == []


# Errors


def test_hierarchy_of_errors() -> None:
    assert heatopt.HeatoptError.__bases__ == (RuntimeError,)
    assert heatopt.NoCheckpointError.__bases__ == (heatopt.CheckpointError,)
    for name in set(errors.__all__) - {"HeatoptError", "NoCheckpointError"}:
        assert getattr(errors, name).__bases__ == (heatopt.HeatoptError,)


@pytest.fixture
def plain() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


@pytest.mark.parametrize("keyword", ["buckets", "sharded", "fused"])
def test_unknown_keyword(plain: torch.optim.Optimizer, keyword: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        heatopt.DataParallelOptimizer(plain, **{keyword: None})  # type: ignore[arg-type]


def test_only_two_arguments_by_position(plain: torch.optim.Optimizer) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        heatopt.DataParallelOptimizer(plain, True, None)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocking": 1}, TypeError, "blocking must be True, False or None, got 1"),
        ({"model": "net"}, TypeError, r"model must be a torch\.nn\.Module or None, got str"),
        ({"comm": "world"}, TypeError, r"comm must be a heatopt\.comm\.Communicator or None, got str"),
        ({"bucket_mb": "8"}, TypeError, "bucket_mb must be a number of MiB or None, got '8'"),
        ({"bucket_mb": True}, TypeError, "bucket_mb must be a number of MiB or None, got True"),
        ({"bucket_mb": 0}, ValueError, "bucket_mb must be a positive, finite number of MiB, got 0"),
        ({"bucket_mb": float("nan")}, ValueError, "bucket_mb must be a positive, finite number of MiB, got nan"),
        ({"bucket_mb": float("inf")}, ValueError, "bucket_mb must be a positive, finite number of MiB, got inf"),
        ({"accumulation_steps": 2.0}, TypeError, r"accumulation_steps must be an integer >= 1, got 2\.0"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be an integer >= 1, got 0"),
        ({"wire_dtype": "bf16"}, TypeError, r"wire_dtype must be torch\.bfloat16, torch\.float16 or None, got 'bf16'"),
        ({"wire_dtype": torch.float32}, ValueError, r"wire_dtype must be .* or None, got torch\.float32"),
        ({"reproducible": 1}, TypeError, "reproducible must be True or False, got 1"),
        ({"wire_dtype": torch.bfloat16, "reproducible": True}, ValueError, "wire_dtype rounds .* choose one of them"),
        ({"timeout": "1"}, TypeError, "timeout must be a number of seconds, got '1'"),
        ({"timeout": -1}, ValueError, "timeout must be >= 0 seconds .*, got -1"),
    ],
)
def test_wrong_arguments(
    plain: torch.optim.Optimizer, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        heatopt.DataParallelOptimizer(plain, **arguments)


def test_not_an_optimizer() -> None:
    with pytest.raises(TypeError, match=r"torch_optimizer must be a torch\.optim\.Optimizer, got list"):
        heatopt.DataParallelOptimizer([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the class: make an instance of it first"):
        heatopt.DataParallelOptimizer(torch.optim.SGD)  # type: ignore[arg-type]
