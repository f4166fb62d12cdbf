"""Random structures are steered into budgets that hardly any random structure meets."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structures import budget_of, names, random_genomes, space_of

from engine.errors import UserError
from engine.sampling import STEPS, along_ray, check_feasible, draw, sample, scale_to_usage
from engine.space.budget import quantities
from engine.space.costs import cost_model

seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
@pytest.mark.parametrize(
    "limits",
    [
        {"flops": "102%"},  # of the least
        {"flops": "49.5%:50%"},
        {"flops": "94.5%:95%"},
        {"flops": "6%:6.1%"},
        {"flops": "45%:50%", "params": "45%:46%"},
        {"flops": "300M", "params": "50%", "memory_peak": "70%"},
    ],
    ids=lambda limits: " ".join(limits.values()),
)
def test_tight_budgets_are_reached_from_random_structures(name: str, limits: dict[str, str]) -> None:
    costs = cost_model(space_of(name))
    if limits["flops"] == "102%":
        limits = {"flops": str(int(1.02 * quantities(costs)["flops"].least))}
    budget = budget_of(costs, **limits)
    genome_KG = sample(0, 256, budget, least_usage=0.8)
    fitting_KG = genome_KG[budget.fits(genome_KG)]
    assert len(fitting_KG) > 50
    # Two per cent above the least there are few structures; everywhere else hardly any two samples are equal.
    assert len(fitting_KG.unique(dim=0)) > (4 if len(limits) == 1 and ":" not in limits["flops"] else 50)


@given(seeds, names)
def test_samples_are_legal_and_use_the_share_of_the_budget_that_is_asked_for(seed: int, name: str) -> None:
    costs = cost_model(space_of(name), 64)
    budget = budget_of(costs, flops="60%", params="70%")
    genome_KG = sample(seed, 64, budget, least_usage=0.8)
    assert torch.equal(costs.space.check_genome(genome_KG), genome_KG)
    usage_K = budget.usage(budget.costs(genome_KG))
    assert usage_K.min() > 0.75
    assert usage_K.max() <= 1
    anywhere_K = budget.usage(budget.costs(sample(seed, 64, budget)))
    assert anywhere_K.min() < 0.3
    assert anywhere_K.max() > 0.7


@given(seeds)
def test_without_a_budget_samples_spread_from_the_smallest_to_the_full_structure(seed: int) -> None:
    costs = cost_model(space_of("mobilenet_v2"), 64)
    share = costs.macs(sample(seed, 400, budget_of(costs))) / quantities(costs)["flops"].full
    assert share.min() < 0.1
    assert share.max() > 0.9
    assert share.quantile(0.25) < share.quantile(0.75) - 0.2


def test_a_ray_leads_from_the_smallest_structure_through_the_genome_to_the_full_one() -> None:
    costs = cost_model(space_of("mobilenet_v1"))
    budget, genome_KG = budget_of(costs), random_genomes(costs.space, 10)
    at = [along_ray(genome_KG, torch.full((10,), step), budget) for step in range(2 * STEPS + 1)]
    assert (at[0] == 0).all()
    assert torch.equal(at[STEPS], genome_KG)
    assert (at[-1] == 30).all()
    assert all((later >= earlier).all() for earlier, later in pairwise(at))


@given(seeds, st.floats(0.05, 1))
def test_scaling_stops_at_the_last_step_of_the_ray_that_fits(seed: int, share: float) -> None:
    costs = cost_model(space_of("mobilenet_v2"), 64)
    budget = budget_of(costs, flops="50%")
    genome_KG = draw(seed, 10, budget)
    scaled_KG = scale_to_usage(genome_KG, torch.full((10,), share), budget)
    for genome, scaled in zip(genome_KG, scaled_KG, strict=True):
        ray = along_ray(genome.expand(2 * STEPS + 1, -1), torch.arange(2 * STEPS + 1), budget)
        fitting = ray[budget.usage(budget.costs(ray)) <= torch.tensor(share)]
        assert scaled.tolist() == fitting[-1].tolist()


# -- budgets that cannot be met ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [
        # Few parameters and many MACs; no structure has this very number of MACs.
        {"flops": "90%:95%", "params": "20%"},
        {"flops": "20%", "params": "80%:90%"},
        {"flops": "284370176:284370177"},
    ],
    ids=str,
)
def test_limits_that_contradict_each_other_are_refused_with_the_closest_structure(limits: dict[str, str]) -> None:
    budget = budget_of(cost_model(space_of("mobilenet_v1")), **limits)
    with pytest.raises(UserError, match=r"--flops .*none of 2048 structures .* the closest has \d"):
        check_feasible(budget)


@pytest.mark.parametrize("limits", [{}, {"flops": "3%"}, {"flops": "49.5%:50%", "params": "45%:50%"}], ids=str)
def test_limits_that_can_be_met_pass(limits: dict[str, str]) -> None:
    check_feasible(budget_of(cost_model(space_of("mobilenet_v1")), **limits))
