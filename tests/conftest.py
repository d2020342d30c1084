"""Settings of all tests. How they run on several ranks is in ``tests/support``."""

from __future__ import annotations

import os

# Before torch is imported: ranks share the cores, be they threads or processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Below the limit of a test (HEATOPT_TEST_TIMEOUT), so that heatopt itself tells what it waited for.
os.environ.setdefault("HEATOPT_TIMEOUT", "60")

import hypothesis

from tests.support.launch import LAUNCH

pytest_plugins = ["tests.support.rank_plugin", "tests.support.rank_options", "tests.support.ranks"]

# The same examples in every run; under a launcher also on every rank, so nothing that depends on one rank's luck:
# no database of earlier failures, and no search for a smaller example, which would run on one rank alone.
hypothesis.settings.register_profile("one-process", deadline=None, derandomize=True)
hypothesis.settings.register_profile(
    "ranks",
    deadline=None,
    derandomize=True,
    database=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
hypothesis.settings.load_profile("ranks" if LAUNCH.launched else "one-process")
