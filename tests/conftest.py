"""Few, unhurried hypothesis examples, the same ones every time; benchmarks chosen by option, not listed as skipped.

With ``pytest -n`` every worker has one core: threads of several processes wait for each other's turns of a core.
"""

import os

import pytest
from hypothesis import Phase, settings

# Explaining a failure traces every line of every example: Triton's interpreter runs ten times longer under it.
PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("metaprune", max_examples=30, deadline=None, derandomize=True, phases=PHASES)
settings.load_profile("metaprune")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A plain run leaves benchmarks out; ``--benchmark-only`` leaves tests out."""
    only = config.getoption("benchmark_only")
    if not only and not config.getoption("benchmark_skip"):
        return
    kept, left_out = [], []
    for item in items:
        is_benchmark = "benchmark" in getattr(item, "fixturenames", ())
        (kept if is_benchmark == only else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
