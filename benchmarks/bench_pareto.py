"""Sorting a population into fronts, against pymoo.

    python -m pytest benchmarks/bench_pareto.py --benchmark-only

pymoo sorts in compiled code (moocore) on one core and computes crowding with NumPy; neither knows another device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.pareto import crowding_distance, non_dominated_rank

ROUNDS = 5


def random_objectives(population: int, count: int) -> torch.Tensor:
    """Float64 ``[P, M]``: as many fronts as chance makes of independent objectives."""
    return torch.rand(population, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def median_seconds(run: Callable[[], object]) -> float:
    """Of as many runs as are timed here, after one that is not."""
    run()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("population", [1000, 4000])
def test_sort_into_fronts(benchmark: Any, population: int, objectives: int) -> None:
    nds = pytest.importorskip("pymoo.util.nds.non_dominated_sorting", reason="pymoo, the baseline, is not installed")
    objective_PM = random_objectives(population, objectives)
    array_PM = objective_PM.numpy()

    def pymoo() -> Any:
        return nds.NonDominatedSorting().do(array_PM, return_rank=True)[1]

    rank_P = non_dominated_rank(objective_PM)
    assert rank_P.tolist() == pymoo().tolist()
    baseline = median_seconds(pymoo)
    benchmark.pedantic(non_dominated_rank, (objective_PM,), rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        fronts=int(rank_P.max()) + 1, pymoo_ms=baseline * 1e3, speedup=baseline / benchmark.stats.stats.median
    )


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("population", [1000, 4000])
def test_crowding_on_every_front(benchmark: Any, population: int, objectives: int) -> None:
    metrics = pytest.importorskip(
        "pymoo.operators.survival.rank_and_crowding.metrics", reason="pymoo, the baseline, is not installed"
    )
    objective_PM = random_objectives(population, objectives)
    array_PM, rank_P = objective_PM.numpy(), non_dominated_rank(objective_PM)
    members = [(rank_P == front).numpy().nonzero()[0] for front in range(int(rank_P.max()) + 1)]
    crowding = metrics.get_crowding_function("cd")

    def pymoo() -> Any:
        distance_P = np.empty(population)
        for front in members:
            distance_P[front] = crowding.do(array_PM[front])
        return distance_P

    torch.testing.assert_close(crowding_distance(objective_PM, rank_P), torch.from_numpy(pymoo()), rtol=1e-12, atol=0)
    baseline = median_seconds(pymoo)
    benchmark.pedantic(crowding_distance, (objective_PM, rank_P), rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(pymoo_ms=baseline * 1e3, speedup=baseline / benchmark.stats.stats.median)
