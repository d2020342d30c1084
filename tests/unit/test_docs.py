"""The examples of the documentation work: each Python block of a page runs, after the blocks before it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Literal

import pytest
import torch
from torch import nn

from tests.support.launch import REPOSITORY, child_environment, launch_command
from tests.support.ranks import Ranks

PAGES = ("README.md", *sorted(str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "docs").rglob("*.md")))

# Blocks with one of these titles show how it is done with another library; they are read, not run.
OTHER_LIBRARIES = ("Heat", "Horovod", "DDP", "Hetu", "SINGA", "torch_npu")

_FENCE = re.compile(
    r"^(?P<indent> *)```python(?P<options>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """One fenced Python block of a page."""

    page: str
    line: int
    title: str
    code: str

    @property
    def runs(self) -> bool:
        return self.title not in OTHER_LIBRARIES

    def compiled(self) -> CodeType:
        """The code, with the page's own line numbers."""
        return compile("\n" * self.line + self.code, self.page, "exec")


def blocks_of(page: str) -> list[Block]:
    """The Python blocks of a page, in their order."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', fence["options"])
        code = re.sub(rf"^{fence['indent']}", "", fence["code"], flags=re.MULTILINE)
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, title[1] if title else "", code))
    return found


def stand_ins() -> dict[str, object]:
    """What a page may speak of without making it: a model, data, a loss."""
    torch.manual_seed(0)

    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)

    loader = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(3)]
    return {"__name__": "__main__", "Net": Net, "loader": loader, "loss_fn": nn.functional.mse_loss}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_examples_run(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    blocks = blocks_of(page)
    monkeypatch.chdir(tmp_path)
    names = stand_ins()
    for block in blocks:
        code = block.compiled()
        if block.runs:
            exec(code, names)
    for name, test in list(names.items()):
        if name.startswith("test_"):  # a page about tests has tests as examples
            assert callable(test)
            test(Ranks(2, request))


@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("README.md", 1),
        ("docs/index.md", 7),
        ("docs/coming_from.md", 3),
        ("docs/sharp_bits.md", 5),
        ("docs/coming_from_others.md", 4),
    ],
)
def test_examples_are_found(page: str, least: int) -> None:
    assert sum(block.runs for block in blocks_of(page)) >= least


def test_blocks_are_read_as_they_stand(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('x\n```python title="Heat"\na\n```\n\n  ```python\n  if b:\n      c\n  ```\n```sh\nd\n```\n')
    assert blocks_of(str(page)) == [
        Block(str(page), 2, "Heat", "a\n"),
        Block(str(page), 6, "", "if b:\n    c\n"),
    ]


@pytest.fixture(scope="module")
def quick_start() -> str:
    """The script of the first page."""
    return next(block.code for block in blocks_of("docs/index.md") if block.title == "train.py")


@pytest.fixture(scope="module")
def losses(quick_start: str) -> list[str]:
    """What it prints in one process."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", quick_start], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    return lines


@pytest.mark.parametrize("kind", ["mpi", "torch"], ids=["mpiexec", "torchrun"])
def test_quick_start_prints_the_same_on_two_ranks(
    kind: Literal["mpi", "torch"], quick_start: str, losses: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(quick_start)
    try:
        launcher = launch_command(kind, 2)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [*launcher, str(script)],
        cwd=tmp_path,
        env=child_environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == losses


@pytest.mark.parametrize(
    ("system", "tolerance"),
    # What is sent later is not the same at each step, but comes to the same.
    [("hetu", 1e-4), ("singa", 1e-4), ("singa_sparse", 0.1), ("npu", 1e-4)],
)
def test_scripts_of_other_systems_print_the_same_on_four_ranks(system: str, tolerance: float, tmp_path: Path) -> None:
    (block,) = (b for b in blocks_of("docs/coming_from_others.md") if b.title == f"heatopt: {system}.py")
    script = tmp_path / "script_of_the_page.py"  # not by its own name, which is that of a module that it imports from
    script.write_text(block.code)
    try:
        launcher = launch_command("mpi", 4)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    printed = []
    for command in ([sys.executable], launcher):
        result = subprocess.run(
            [*command, str(script)],
            cwd=tmp_path,
            env=child_environment(PYTHONPATH=path),
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert result.returncode == 0, result.stderr
        printed.append([float(line) for line in result.stdout.split()])
    alone, together = printed
    assert len(alone) >= 6
    assert alone[-1] < alone[0]
    assert together == pytest.approx(alone, rel=tolerance)


# Links and names


def test_readme_points_to_files_that_exist() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert targets
    assert [target for target in targets if not (REPOSITORY / target).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_files_and_targets_that_exist(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    paths = re.findall(r"\b(?:scripts|tests|docs)/[\w./]*\w", shell)
    assert [path for path in paths if not (REPOSITORY / path.partition("::")[0]).exists()] == []
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", shell, flags=re.MULTILINE):
        assert re.search(rf"^(?:{target}|{target.partition('-')[0]}-%):", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES)
def test_environment_variables_are_those_of_the_code(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("heatopt", "tests/support")
        for path in (REPOSITORY / folder).rglob("*.py")
    )
    assert [name for name in set(re.findall(r"\bHEATOPT_[A-Z_]+\b", text)) if name not in code] == []


def test_tour_has_every_module_and_no_other() -> None:
    tour = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = REPOSITORY / "heatopt"
    modules = {str(path.relative_to(package)) for path in package.glob("*/_*.py") if path.name != "__init__.py"}
    assert set(re.findall(r"`(\w+/_\w+\.py)`", tour)) == modules
