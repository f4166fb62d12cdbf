"""What a million proposals cost: drawn, mutated or crossed, costed, held to a budget and rid of duplicates.

    python -m pytest benchmarks/bench_proposals.py --benchmark-only

The baseline does what follows the drawing one proposal after another, in Python: counts MACs layer by layer, compares
with the budget, looks the genome up in a set.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.evolution import cross, draw, mutate
from engine.random import stream_key
from engine.rows import group_rows
from engine.space import architecture
from engine.space.costs import CostModel, cost_model, macs_per_conv

PROPOSALS = 1_000_000
BASELINE_PROPOSALS = 600
PARENTS, VISITED = 10, 1000
MUTATION_PROBABILITY = 0.1


def proposed(key: int, parents_PG: Tensor, count: int, costs: CostModel) -> Tensor:
    """Genomes ``[K, G]``: a third random, a third mutants, a third crossovers of the parents."""
    third = count // 3
    return torch.cat(
        [
            draw(stream_key(key, "random"), count - 2 * third, costs),
            mutate(stream_key(key, "mutation"), parents_PG, third, costs, MUTATION_PROBABILITY),
            cross(stream_key(key, "crossover"), parents_PG, third),
        ]
    )


def kept(genome_KG: Tensor, visited_VG: Tensor, costs: CostModel, budget: int) -> tuple[Tensor, Tensor]:
    """The genomes within ``budget`` MACs that are new, in order, and their parameters."""
    fits_K, parameters_K = costs.macs(genome_KG) <= budget, costs.parameters(genome_KG)
    genome_KG, parameters_K = genome_KG[fits_K], parameters_K[fits_K]
    group, first = group_rows(torch.cat([visited_VG, genome_KG]))
    is_first_K = (first[group] == torch.arange(len(group)))[len(visited_VG) :]
    return genome_KG[is_first_K], parameters_K[is_first_K]


def kept_one_by_one(genome_KG: Tensor, visited_VG: Tensor, costs: CostModel, budget: int) -> list[tuple[int, ...]]:
    """The same genomes by plain Python."""
    seen, new = set(map(tuple, visited_VG.tolist())), []
    for genome_G in genome_KG:
        genome = tuple(genome_G.tolist())
        if sum(macs_per_conv(costs, genome_G)) <= budget and genome not in seen:
            seen.add(genome)
            new.append(genome)
    return new


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
def test_a_million_proposals(benchmark: Any, name: str) -> None:
    costs = cost_model(architecture(name).build(1000))
    visited_VG = draw(stream_key("visited"), VISITED, costs)
    parents_PG = visited_VG[:PARENTS]
    budget = int(costs.macs(visited_VG).median())

    sample_KG = torch.cat([proposed(0, parents_PG[:3], BASELINE_PROPOSALS, costs), visited_VG[:50]])
    began = time.perf_counter()
    expected = kept_one_by_one(sample_KG, visited_VG, costs, budget)
    baseline_rate = len(sample_KG) / (time.perf_counter() - began)
    genome_KG, parameters = kept(sample_KG, visited_VG, costs, budget)
    assert list(map(tuple, genome_KG.tolist())) == expected
    assert 0 < len(expected) < len(sample_KG)
    assert torch.equal(parameters, costs.parameters(genome_KG))

    def round_of_proposals(key: int = 0) -> tuple[Tensor, Tensor]:
        return kept(proposed(key, parents_PG, PROPOSALS, costs), visited_VG, costs, budget)

    genome_KG, _ = benchmark.pedantic(round_of_proposals, rounds=3, warmup_rounds=1)
    rate = PROPOSALS / benchmark.stats.stats.median
    benchmark.extra_info.update(
        proposals_per_second=round(rate),
        kept=len(genome_KG),
        one_by_one_per_second=round(baseline_rate, 1),
        speedup=round(rate / baseline_rate),
    )
