"""What pytest does differently under a launcher: which tests it runs, and where the ranks but the first write."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import pytest
from _pytest.terminal import TerminalReporter  # no public name, but its constructor takes the file to write to

from tests.support.launch import LAUNCH
from tests.support.rank_plugin import RankSession

_TESTS = Path(__file__).resolve().parents[1]
_UNDER_A_LAUNCHER = ("ranks", "gpu", "support")
_report = pytest.StashKey[TextIO]()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "launched: needs mpiexec or torchrun; skipped without")
    config.addinivalue_line("markers", "every_size: on 1 to 4 threads, for no launcher runs it; others are on 1 and 3")
    if LAUNCH.kind == "mpi":
        # Set after pytest-mpi was configured: its tests run, but its page about the MPI library is not printed.
        config.option.with_mpi = True
    session = config.pluginmanager.get_plugin(RankSession.__name__)
    if session is not None and session.ranks.rank > 0:
        file = (session.folder / f"rank{session.ranks.rank}.log").open("w", buffering=1)
        config.stash[_report] = file
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(TerminalReporter(config, file), "terminalreporter")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _report in config.stash:
        config.stash[_report].close()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under a launcher run the tests of several ranks alone, and what was asked for by name."""
    if not LAUNCH.launched or collection_path.parent != _TESTS or collection_path.name in _UNDER_A_LAUNCHER:
        return None
    asked = [(config.invocation_params.dir / arg.partition("::")[0]).resolve() for arg in config.args]
    return None if any(path.is_relative_to(collection_path) for path in asked) else True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under a launcher leave out what is skipped for sure: the ranks would have to agree on each skip."""
    if not LAUNCH.launched:
        return
    skipped = {item for item in items if any(mark.args[:1] == (True,) for mark in item.iter_markers("skipif"))}
    if skipped:
        config.hook.pytest_deselected(items=list(skipped))
        items[:] = [item for item in items if item not in skipped]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("launched") and not LAUNCH.launched:
        pytest.skip("needs several processes: run it under mpiexec or torchrun")
