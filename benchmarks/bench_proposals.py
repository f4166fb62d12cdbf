"""What a million proposals cost: drawn, mutated or crossed, costed, held to a budget and rid of duplicates.

    python -m pytest benchmarks/bench_proposals.py --benchmark-only

The baseline does what follows the drawing one proposal after another, in Python: counts MACs layer by layer, compares
with the budget, looks the genome up in a set. The first generation of a search in a tight budget is timed, too.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.evolution import Parents, SearchSettings, ask, cross, initial_state, is_new, mutate
from engine.random import stream_key
from engine.sampling import draw
from engine.space import architecture
from engine.space.budget import Budget, parse_limit, quantities
from engine.space.costs import CostModel, cost_model, macs_per_conv

PROPOSALS = RANDOM_GENOMES = 1_000_000
BASELINE_PROPOSALS = 600
PARENTS, VISITED = 10, 1000
MUTATION_PROBABILITY = 0.1


def proposed(key: int, parents: Parents, count: int, budget: Budget) -> Tensor:
    """Genomes ``[K, G]``: a third random, a third mutants, a third crossovers of the parents."""
    third = count // 3
    return torch.cat(
        [
            draw(stream_key(key, "random"), count - 2 * third, budget),
            mutate(stream_key(key, "mutation"), parents, third, budget, MUTATION_PROBABILITY)[0],
            cross(stream_key(key, "crossover"), parents, third)[0],
        ]
    )


def kept(genome_KG: Tensor, visited_VG: Tensor, costs: CostModel, budget: Budget) -> tuple[Tensor, Tensor]:
    """The genomes within ``budget`` that are new, in order, and their parameters."""
    parameters_K, fits_K = costs.parameters(genome_KG), budget.fits(genome_KG).nonzero()[:, 0]
    genome_KG, parameters_K = genome_KG.index_select(0, fits_K), parameters_K.index_select(0, fits_K)
    new_K = is_new(visited_VG, genome_KG, budget.space.choices).nonzero()[:, 0]
    return genome_KG.index_select(0, new_K), parameters_K.index_select(0, new_K)


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
    anything = Budget(costs.space, torch.device("cpu"))
    visited_VG = draw(stream_key("visited"), VISITED, anything)
    parents = Parents(visited_VG[:PARENTS], torch.arange(PARENTS))
    macs = int(costs.macs(visited_VG).median())
    budget = Budget(costs.space, torch.device("cpu"), (parse_limit(str(macs), quantities(costs)["flops"]),))

    few = Parents(visited_VG[:3], torch.arange(3))
    sample_KG = torch.cat([proposed(0, few, BASELINE_PROPOSALS, anything), visited_VG[:50]])
    began = time.perf_counter()
    expected = kept_one_by_one(sample_KG, visited_VG, costs, macs)
    baseline_rate = len(sample_KG) / (time.perf_counter() - began)
    genome_KG, parameters = kept(sample_KG, visited_VG, costs, budget)
    assert list(map(tuple, genome_KG.tolist())) == expected
    assert 0 < len(expected) < len(sample_KG)
    assert torch.equal(parameters, costs.parameters(genome_KG))

    def round_of_proposals(key: int = 0) -> tuple[Tensor, Tensor]:
        return kept(proposed(key, parents, PROPOSALS, budget), visited_VG, costs, budget)

    genome_KG, _ = benchmark.pedantic(round_of_proposals, rounds=3, warmup_rounds=1)
    rate = PROPOSALS / benchmark.stats.stats.median
    benchmark.extra_info.update(
        proposals_per_second=round(rate),
        kept=len(genome_KG),
        one_by_one_per_second=round(baseline_rate, 1),
        speedup=round(rate / baseline_rate),
    )


TIGHT = {
    "2 % above the least": lambda flops: str(int(1.02 * flops.least)),
    "a band of 0.5 %": lambda flops: f"{0.995 * flops.full / 2:.0f}:{flops.full / 2:.0f}",
}


@pytest.mark.parametrize("tight", TIGHT)
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
def test_the_first_generation_of_a_tight_budget(benchmark: Any, name: str, tight: str) -> None:
    costs = cost_model(architecture(name).build(1000))
    flops = quantities(costs)["flops"]
    budget = Budget(costs.space, torch.device("cpu"), (parse_limit(TIGHT[tight](flops), flops),))
    genes = len(costs.space.genes)
    uniform_KG = draw(0, RANDOM_GENOMES, budget)
    state = benchmark.pedantic(
        lambda: ask(initial_state(genes, 0), SearchSettings(), budget), rounds=5, warmup_rounds=1
    )
    assert budget.fits(state.genome_VG).all()
    assert len(state.genome_VG.unique(dim=0)) == len(state.genome_VG)
    benchmark.extra_info.update(
        structures=len(state.pending),
        of_a_million_uniformly_random_ones_fit=int(budget.fits(uniform_KG).sum()),
    )
