import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import random_genomes, space_of
from torch import Tensor

from engine.evolution import (
    Origin,
    SearchSettings,
    SearchState,
    ask,
    cross,
    draw,
    initial_state,
    mutate,
    ranking,
    shrink_to_budget,
    tell,
)
from engine.space import IMAGE, IMAGE_CHANNELS, Conv, Space, gene
from engine.space.costs import CostModel, cost_model

STEM, LAST = gene("stem", 40), gene("last", 60)
# Two genes: all 961 genomes can be listed.
SMALL = Space(
    "small",
    4,
    (STEM, LAST),
    (
        Conv("stem", IMAGE, IMAGE_CHANNELS, STEM, 3, 2, False, "relu", None, (STEM,), 4),
        Conv("last", "stem", STEM, LAST, 1, 1, False, "relu", None, (STEM, LAST), 4),
    ),
)
SMALL_COSTS = cost_model(SMALL, 8)
ALL_SMALL = torch.tensor(list(itertools.product(range(31), repeat=2)))
COSTS = cost_model(space_of("mobilenet_v2"), 64)
QUICK = SearchSettings(population=12, parents=4, mutants=6, crossovers=4, generations=3)

seeds = st.integers(0, 2**32)


def judged(genome_PG: Tensor) -> tuple[Tensor, Tensor]:
    """A score with an optimum to find and many ties: near the choice 15 everywhere."""
    distance_P = (genome_PG - 15).abs().sum(1)
    return 1000 - distance_P // 10, distance_P.double() + genome_PG[:, 0] / 100


def search(
    costs: CostModel, budget: int, options: SearchSettings, seed: int, start: SearchState | None = None
) -> SearchState:
    state = initial_state(len(costs.space.genes), seed) if start is None else start
    while state.generation < options.generations:
        state = ask(state, options, costs, budget)
        state = tell(state, *judged(state.pending))
    return state


def same(one: SearchState, other: SearchState) -> bool:
    return all(
        torch.equal(value, vars(other)[name]) if isinstance(value, Tensor) else value == vars(other)[name]
        for name, value in vars(one).items()
    )


# -- what is asked -------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 1))
def test_every_genome_asked_for_is_legal_within_the_budget_and_new(seed: int, share: float) -> None:
    least, greatest = COSTS.legal_range()
    # Squared, so that budgets close to the least are drawn often.
    budget = least + int((greatest - least) * share**2)
    state = search(COSTS, budget, QUICK, seed)
    assert torch.equal(COSTS.space.check_genome(state.genome_VG), state.genome_VG)
    assert COSTS.macs(state.genome_VG).max() <= budget
    assert len(state.genome_VG.unique(dim=0)) == len(state.genome_VG)


def test_a_generation_has_the_papers_numbers_of_mutants_crossovers_and_random_genomes() -> None:
    # MetaPruning, section 3.3, and its source: 50 random genomes, then 25 mutants and 25 crossovers of the best 10.
    paper = SearchSettings(generations=2)
    state = search(COSTS, COSTS.legal_range()[1], paper, seed=0)
    assert paper.parents == 10
    assert paper.mutation_probability == 0.1
    origins = state.origin_V.tolist()
    assert origins == [Origin.RANDOM] * 50 + [Origin.MUTATION] * 25 + [Origin.CROSSOVER] * 25
    assert state.generation_V.tolist() == [0] * 50 + [1] * 50


def test_a_tight_budget_still_fills_a_generation() -> None:
    # Hardly any random structure is this small: the rest come from shrinking.
    budget = int(COSTS.legal_range()[0] * 1.2)
    assert (COSTS.macs(random_genomes(COSTS.space, 10_000)) > budget).all()
    state = ask(initial_state(25, seed=0), SearchSettings(), COSTS, budget)
    assert len(state.pending) == 50


def test_at_the_least_budget_exactly_the_structures_that_fit_are_asked_for() -> None:
    least, _ = SMALL_COSTS.legal_range()
    state = search(SMALL_COSTS, least, QUICK, seed=0)
    assert state.genome_VG.tolist() == ALL_SMALL[SMALL_COSTS.macs(ALL_SMALL) <= least].tolist()
    assert state.generation == QUICK.generations


@settings(max_examples=10)
@given(seeds, st.integers(1, 40))
def test_a_search_among_few_structures_finds_all_of_them_and_then_asks_for_none(seed: int, fitting: int) -> None:
    budget = int(SMALL_COSTS.macs(ALL_SMALL).sort().values[fitting])
    fits = ALL_SMALL[SMALL_COSTS.macs(ALL_SMALL) <= budget]
    state = search(SMALL_COSTS, budget, replace(QUICK, generations=6), seed)
    assert sorted(state.genome_VG.tolist()) == fits.tolist()
    assert len(ask(state, QUICK, SMALL_COSTS, budget).pending) == 0


def test_the_search_finds_better_structures_than_chance() -> None:
    budget = COSTS.legal_range()[1]
    state = search(COSTS, budget, SearchSettings(), seed=0)
    chance, _ = judged(draw(1, len(state.genome_VG), COSTS))
    assert state.correct.max() > chance.max()
    assert state.correct[-50:].double().mean() > state.correct[:50].double().mean()


# -- determinism ---------------------------------------------------------------------------------------------------


@given(seeds)
def test_the_same_seed_gives_the_same_search_and_another_seed_another(seed: int) -> None:
    budget = COSTS.legal_range()[1] // 2
    state = search(COSTS, budget, QUICK, seed)
    assert same(state, search(COSTS, budget, QUICK, seed))
    assert not torch.equal(state.genome_VG, search(COSTS, budget, QUICK, seed + 1).genome_VG)


@given(seeds, st.integers(0, 2), st.booleans())
def test_a_search_continued_from_a_saved_state_equals_the_whole_one(seed: int, generations: int, asked: bool) -> None:
    budget = COSTS.legal_range()[1] // 2
    state = search(COSTS, budget, replace(QUICK, generations=generations), seed)
    state = ask(state, QUICK, COSTS, budget) if asked else state
    saved: dict[str, Any] = {name: copy.deepcopy(value) for name, value in vars(state).items()}
    resumed = SearchState(**saved)
    if asked:
        resumed = tell(resumed, *judged(resumed.pending))
    assert same(search(COSTS, budget, QUICK, seed, resumed), search(COSTS, budget, QUICK, seed))


# -- what is told --------------------------------------------------------------------------------------------------


def test_asking_twice_without_telling_is_an_error() -> None:
    state = ask(initial_state(25, 0), QUICK, COSTS, COSTS.legal_range()[1])
    with pytest.raises(ValueError, match="tell the scores"):
        ask(state, QUICK, COSTS, COSTS.legal_range()[1])


@pytest.mark.parametrize(("correct", "loss"), [(11, 11), (13, 13), (12, 11), (11, 12), (0, 0)])
def test_telling_another_number_of_scores_than_was_asked_for_is_an_error(correct: int, loss: int) -> None:
    state = ask(initial_state(25, 0), QUICK, COSTS, COSTS.legal_range()[1])
    with pytest.raises(ValueError, match="12 genomes await"):
        tell(state, torch.zeros(correct, dtype=torch.int64), torch.zeros(loss, dtype=torch.float64))


scores = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.5, 1.0, torch.inf, torch.nan])), min_size=1)


@given(scores)
def test_more_correct_comes_first_then_less_loss_then_the_earlier_and_nan_last(told: list[tuple[int, float]]) -> None:
    def key(position: int) -> tuple[bool, int, float, int]:
        correct, loss = told[position]
        return (True, 0, 0, position) if loss != loss else (False, -correct, loss, position)

    correct, loss = zip(*told, strict=True)
    ranked = ranking(torch.tensor(correct), torch.tensor(loss, dtype=torch.float64)).tolist()
    assert ranked == sorted(range(len(told)), key=key)


@given(seeds, st.integers(0, 12))
def test_a_genome_that_failed_is_never_a_parent(seed: int, succeeded: int) -> None:
    # A child by crossover takes every gene from a parent. Failures alone have choices from 20 on, here, and the most
    # correct images.
    genome_PG = draw(seed, 12, COSTS) % 10
    genome_PG[succeeded:] += 20
    correct = torch.arange(12)
    loss = torch.where(correct < succeeded, 1.0, torch.nan).double()
    state = replace(initial_state(25, seed), genome_VG=genome_PG, origin_V=correct * 0, generation_V=correct * 0)
    state = ask(tell(state, correct, loss), QUICK, COSTS, COSTS.legal_range()[1])
    crossed = state.pending[state.origin_V[12:] == Origin.CROSSOVER]
    assert (crossed < 10).all()
    # One parent's children are that parent again, and without parents there are none.
    assert len(crossed) == (QUICK.crossovers if succeeded > 1 else 0)
    assert len(state.pending) == QUICK.population


# -- operators -----------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 5))
def test_mutation_copies_parents_at_probability_zero_and_redraws_all_at_one(seed: int, parents: int) -> None:
    parents_PG = random_genomes(COSTS.space, parents)
    copies = mutate(seed, parents_PG, 200, COSTS, probability=0)
    assert {tuple(row) for row in copies.tolist()} == {tuple(row) for row in parents_PG.tolist()}
    redrawn = mutate(seed, parents_PG, 200, COSTS, probability=1)
    assert torch.equal(redrawn, mutate(seed, parents_PG * 0, 200, COSTS, probability=1))
    assert set(redrawn.flatten().tolist()) == set(range(31))


def test_mutation_redraws_each_gene_with_its_probability() -> None:
    parent_PG = torch.full((1, 25), 31)  # no choice that a redraw could give
    redrawn = (mutate(0, parent_PG, 4000, COSTS, probability=0.1) != 31).double()
    # 100,000 genes in all: a standard deviation of sqrt(0.1 · 0.9 / 100,000) = 0.001; 0.005 for one gene's 4,000.
    assert abs(redrawn.mean() - 0.1) < 0.004
    assert (redrawn.mean(0) - 0.1).abs().max() < 0.02


@given(seeds, st.integers(1, 4))
def test_a_crossover_takes_every_gene_from_one_of_two_parents(seed: int, parents: int) -> None:
    # Parent p has the choice p everywhere: a child shows where its genes are from.
    parents_PG = torch.arange(parents)[:, None].expand(parents, 25)
    children = cross(seed, parents_PG, 300)
    assert all(len(set(child)) <= 2 for child in children.tolist())
    assert set(children.flatten().tolist()) == set(range(parents))
    if parents > 1:
        mixed = children[(children != children[:, :1]).any(1)]
        share = (mixed == mixed.amin(1, keepdim=True)).double().mean()
        assert 0.4 < share < 0.6


@given(seeds, st.floats(0, 1))
def test_shrinking_makes_genomes_fit_keeps_their_proportions_and_leaves_those_that_fit(seed: int, share: float) -> None:
    least, greatest = COSTS.legal_range()
    budget = least + int((greatest - least) * share**2)
    genome_PG = draw(seed, 50, COSTS)
    shrunk_PG = shrink_to_budget(genome_PG, COSTS, budget)
    assert COSTS.macs(shrunk_PG).max() <= budget
    for genome, shrunk in zip(genome_PG, shrunk_PG, strict=True):
        if COSTS.macs(genome[None]) <= budget:
            assert torch.equal(shrunk, genome)
        else:
            # The factor t / 64 is the greatest that fits.
            scaled = genome * torch.arange(64)[:, None] // 64
            assert shrunk.tolist() == scaled[COSTS.macs(scaled) <= budget][-1].tolist()
