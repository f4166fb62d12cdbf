import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import budget_of, random_genomes, space_of
from torch import Tensor

from engine.evolution import (
    Origin,
    Parents,
    SearchSettings,
    SearchState,
    ask,
    cross,
    initial_state,
    mutate,
    objectives,
    pareto_front,
    ranking,
    tell,
)
from engine.sampling import draw
from engine.space import IMAGE, IMAGE_CHANNELS, Conv, Space, gene
from engine.space.budget import Budget, Quantity, quantities
from engine.space.costs import cost_model

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
ANY = budget_of(COSTS, flops="100%")
HALF = budget_of(COSTS, flops="50%")
FLOPS = quantities(COSTS)["flops"]
QUICK = SearchSettings(population=12, parents=4, mutants=6, crossovers=4, generations=3)

seeds = st.integers(0, 2**32)


def judged(genome_PG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A score with an optimum to find and many ties: near the choice 15 everywhere."""
    distance_P = (genome_PG - 15).abs().sum(1)
    return 1000 - distance_P // 10, distance_P.double() + genome_PG[:, 0] / 100, torch.full_like(distance_P, 2000)


def search(
    budget: Budget,
    options: SearchSettings,
    seed: int,
    start: SearchState | None = None,
    costs: tuple[Quantity, ...] = (),
) -> SearchState:
    state = initial_state(len(budget.space.genes), seed) if start is None else start
    while state.generation < options.generations:
        state = ask(state, options, budget, costs)
        state = tell(state, *judged(state.pending))
    return state


def macs_between(share: float) -> int:
    """MACs between the least and the most, those close to the least often."""
    return int(FLOPS.least + (FLOPS.full - FLOPS.least) * share**2)


def told(genome_PG: Tensor, correct: Tensor, loss: Tensor) -> SearchState:
    """A state in which these genomes have these scores."""
    zeros = torch.zeros(len(genome_PG), dtype=torch.int64)
    state = replace(
        initial_state(genome_PG.shape[1], 0), genome_VG=genome_PG, origin_V=zeros, generation_V=zeros,
        parent_V2=torch.full((len(genome_PG), 2), -1),
    )  # fmt: skip
    return tell(state, correct, loss, zeros + 100)


def same(one: SearchState, other: SearchState) -> bool:
    return all(
        torch.equal(value, vars(other)[name]) if isinstance(value, Tensor) else value == vars(other)[name]
        for name, value in vars(one).items()
    )


# -- what is asked -------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 1))
def test_every_genome_asked_for_is_legal_within_the_budget_and_new(seed: int, share: float) -> None:
    budget = budget_of(COSTS, flops=macs_between(share))
    state = search(budget, QUICK, seed)
    assert torch.equal(COSTS.space.check_genome(state.genome_VG), state.genome_VG)
    assert COSTS.macs(state.genome_VG).max() <= macs_between(share)
    assert len(state.genome_VG.unique(dim=0)) == len(state.genome_VG)


@settings(max_examples=10)
@given(seeds)
def test_several_limits_hold_for_every_genome_asked_for(seed: int) -> None:
    # At 64 px: 46 M MACs and 6.9 M parameters are the full network.
    budget = budget_of(COSTS, flops="48%:52%", params="40%:50%", memory_peak="85%")
    state = search(budget, QUICK, seed)
    assert len(state.pending) == 0
    assert len(state.genome_VG) == QUICK.population * QUICK.generations
    shares = [cost.of(state.genome_VG) / cost.full for name, cost in quantities(COSTS).items() if name != "latency"]
    for share_V, (low, high) in zip(shares, [(0.48, 0.52), (0.40, 0.50), (0, 0.85)], strict=True):
        # The bounds were rounded down to whole numbers.
        assert low - 1e-6 <= share_V.min()
        assert share_V.max() <= high


def test_a_generation_has_the_papers_numbers_of_mutants_crossovers_and_random_genomes() -> None:
    # MetaPruning, section 3.3, and its source: 50 random genomes, then 25 mutants and 25 crossovers of the best 10.
    paper = SearchSettings(generations=2)
    state = search(ANY, paper, seed=0)
    assert paper.parents == 10
    assert paper.mutation_probability == 0.1
    origins = state.origin_V.tolist()
    assert origins == [Origin.RANDOM] * 50 + [Origin.MUTATION] * 25 + [Origin.CROSSOVER] * 25
    assert state.generation_V.tolist() == [0] * 50 + [1] * 50


def test_a_tight_budget_still_fills_a_generation() -> None:
    # Hardly any random structure is this small.
    macs = int(FLOPS.least * 1.2)
    assert (COSTS.macs(random_genomes(COSTS.space, 10_000)) > macs).all()
    state = ask(initial_state(25, seed=0), SearchSettings(), budget_of(COSTS, flops=macs))
    assert len(state.pending) == 50


def test_a_loose_budget_is_searched_near_its_bound() -> None:
    macs = 0.8 * FLOPS.full
    # Hardly any random structure is this large.
    assert (COSTS.macs(random_genomes(COSTS.space, 1000)) < 0.75 * macs).double().mean() > 0.99
    state = search(budget_of(COSTS, flops=int(macs)), SearchSettings(generations=4), seed=0)
    first = COSTS.macs(state.genome_VG[:50])
    assert 0.75 * macs < first.min()
    assert first.max() <= macs


def test_at_the_least_budget_exactly_the_structures_that_fit_are_asked_for() -> None:
    least = int(quantities(SMALL_COSTS)["flops"].least)
    state = search(budget_of(SMALL_COSTS, flops=least), QUICK, seed=0)
    assert state.genome_VG.tolist() == ALL_SMALL[SMALL_COSTS.macs(ALL_SMALL) <= least].tolist()
    assert state.generation == QUICK.generations


@settings(max_examples=5)
@given(seeds, st.integers(1, 40))
def test_a_search_among_few_structures_finds_all_of_them_and_then_asks_for_none(seed: int, fitting: int) -> None:
    macs = int(SMALL_COSTS.macs(ALL_SMALL).sort().values[fitting])
    fits = ALL_SMALL[SMALL_COSTS.macs(ALL_SMALL) <= macs]
    budget = budget_of(SMALL_COSTS, flops=macs)
    state = search(budget, replace(QUICK, generations=6), seed)
    assert sorted(state.genome_VG.tolist()) == fits.tolist()
    assert len(ask(state, QUICK, budget).pending) == 0


def test_the_search_finds_better_structures_than_chance() -> None:
    state = search(ANY, SearchSettings(), seed=0)
    chance, *_ = judged(draw(1, len(state.genome_VG), ANY))
    assert state.correct.max() > chance.max()
    assert state.correct[-50:].double().mean() > state.correct[:50].double().mean()


@given(seeds)
def test_a_child_has_its_genes_from_its_parents_which_came_before_it(seed: int) -> None:
    state = search(HALF, QUICK, seed)
    for child, (origin, parents) in enumerate(zip(state.origin_V.tolist(), state.parent_V2.tolist(), strict=True)):
        known = [parent for parent in parents if parent >= 0]
        assert len(known) == {Origin.RANDOM: 0, Origin.MUTATION: 1, Origin.CROSSOVER: 2}[Origin(origin)]
        assert all(state.generation_V[parent] < state.generation_V[child] for parent in known)
        if origin == Origin.CROSSOVER:
            first, second = state.genome_VG[known]
            assert ((state.genome_VG[child] == first) | (state.genome_VG[child] == second)).all()


# -- several objectives --------------------------------------------------------------------------------------------


@given(seeds)
def test_a_front_holds_exactly_what_nothing_told_beats(seed: int) -> None:
    state = search(ANY, QUICK, seed, costs=(FLOPS,))
    correct, loss, macs = state.correct.tolist(), state.loss.tolist(), COSTS.macs(state.genome_VG).tolist()

    def beats(one: int, other: int) -> bool:
        error, others_error = (-correct[one], loss[one]), (-correct[other], loss[other])
        nowhere_worse = error <= others_error and macs[one] <= macs[other]
        return nowhere_worse and (error < others_error or macs[one] < macs[other])

    everyone = range(len(correct))
    best = [one for one in everyone if not any(beats(other, one) for other in everyone)]
    front = pareto_front(state, (FLOPS,)).tolist()
    assert sorted(front) == best
    assert [macs[one] for one in front] == sorted(macs[one] for one in front)


def test_an_infinite_loss_is_the_worst_of_its_ties_and_no_failure() -> None:
    loss = torch.tensor([torch.inf, 5.0, 0.0], dtype=torch.float64)
    state = told(torch.tensor([[3] * 25, [4] * 25, [5] * 25]), torch.tensor([7, 7, 6]), loss)
    assert objectives(state, ())[:, 0].argsort().tolist() == [1, 0, 2]


def test_a_failed_evaluation_is_on_no_front_and_has_no_children() -> None:
    genome_PG = torch.tensor([[3] * 25, [4] * 25, [5] * 25])
    state = told(genome_PG, torch.tensor([100, 5, 6]), torch.tensor([torch.nan, 1.0, 1.0], dtype=torch.float64))
    assert objectives(state, (FLOPS,))[0, 0].isnan()
    assert pareto_front(state, (FLOPS,)).tolist() == [1, 2]
    assert 0 not in ask(state, QUICK, ANY, (FLOPS,)).parent_V2


def test_a_pareto_search_spreads_over_the_costs_and_moves_its_front_forward() -> None:
    state = search(ANY, SearchSettings(generations=10), seed=0, costs=(FLOPS,))
    macs = COSTS.macs(state.genome_VG).double() / FLOPS.full
    assert macs[:50].min() < 0.2
    assert macs[:50].max() > 0.8
    # Few structures of the first generation are still on the front in the end.
    front = pareto_front(state, (FLOPS,))
    assert len(front) > 5
    assert (front >= 50).double().mean() > 0.5


# -- determinism ---------------------------------------------------------------------------------------------------


@given(seeds)
def test_the_same_seed_gives_the_same_search_and_another_seed_another(seed: int) -> None:
    state = search(HALF, QUICK, seed)
    assert same(state, search(HALF, QUICK, seed))
    assert not torch.equal(state.genome_VG, search(HALF, QUICK, seed + 1).genome_VG)


@given(seeds, st.integers(0, 2), st.booleans())
def test_a_search_continued_from_a_saved_state_equals_the_whole_one(seed: int, generations: int, asked: bool) -> None:
    state = search(HALF, replace(QUICK, generations=generations), seed)
    state = ask(state, QUICK, HALF) if asked else state
    saved: dict[str, Any] = {name: copy.deepcopy(value) for name, value in vars(state).items()}
    resumed = SearchState(**saved)
    if asked:
        resumed = tell(resumed, *judged(resumed.pending))
    assert same(search(HALF, QUICK, seed, resumed), search(HALF, QUICK, seed))


# -- what is told --------------------------------------------------------------------------------------------------


def test_asking_twice_without_telling_is_an_error() -> None:
    state = ask(initial_state(25, 0), QUICK, ANY)
    with pytest.raises(ValueError, match="tell the scores"):
        ask(state, QUICK, ANY)


@pytest.mark.parametrize(("correct", "loss"), [(11, 11), (13, 13), (12, 11), (11, 12), (0, 0)])
def test_telling_another_number_of_scores_than_was_asked_for_is_an_error(correct: int, loss: int) -> None:
    state = ask(initial_state(25, 0), QUICK, ANY)
    zeros, losses = torch.zeros(correct, dtype=torch.int64), torch.zeros(loss, dtype=torch.float64)
    with pytest.raises(ValueError, match="12 genomes await"):
        tell(state, zeros, losses, zeros)


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
    genome_PG = draw(seed, 12, ANY) % 10
    genome_PG[succeeded:] += 20
    correct = torch.arange(12)
    loss = torch.where(correct < succeeded, 1.0, torch.nan).double()
    state = ask(replace(told(genome_PG, correct, loss), seed=seed), QUICK, ANY)
    crossed = state.pending[state.origin_V[12:] == Origin.CROSSOVER]
    assert (crossed < 10).all()
    # One parent's children are that parent again, and without parents there are none.
    assert len(crossed) == (QUICK.crossovers if succeeded > 1 else 0)
    assert len(state.pending) == QUICK.population


# -- operators -----------------------------------------------------------------------------------------------------


def parents_of(genome_PG: Tensor) -> Parents:
    """Parents that stand in a state from its 7th genome on."""
    return Parents(genome_PG, torch.arange(7, 7 + len(genome_PG)))


@given(seeds, st.integers(1, 5))
def test_mutation_copies_parents_at_probability_zero_and_redraws_all_at_one(seed: int, parents: int) -> None:
    parents_PG = random_genomes(COSTS.space, parents)
    copies, parent_K2 = mutate(seed, parents_of(parents_PG), 200, ANY, probability=0)
    assert {tuple(row) for row in copies.tolist()} == {tuple(row) for row in parents_PG.tolist()}
    assert torch.equal(copies, parents_PG[parent_K2[:, 0] - 7])
    assert (parent_K2[:, 1] == -1).all()
    redrawn, _ = mutate(seed, parents_of(parents_PG), 200, ANY, probability=1)
    assert torch.equal(redrawn, mutate(seed, parents_of(parents_PG * 0), 200, ANY, probability=1)[0])
    assert set(redrawn.flatten().tolist()) == set(range(31))


def test_mutation_redraws_each_gene_with_its_probability() -> None:
    parents = parents_of(torch.full((1, 25), 31))  # no choice that a redraw could give
    redrawn = (mutate(0, parents, 4000, ANY, probability=0.1)[0] != 31).double()
    # 100,000 genes in all: a standard deviation of sqrt(0.1 · 0.9 / 100,000) = 0.001; 0.005 for one gene's 4,000.
    assert abs(redrawn.mean() - 0.1) < 0.004
    assert (redrawn.mean(0) - 0.1).abs().max() < 0.02


@given(seeds, st.integers(1, 4))
def test_a_crossover_takes_every_gene_from_one_of_two_parents(seed: int, parents: int) -> None:
    # Parent p has the choice p everywhere: a child shows where its genes are from.
    parents_PG = torch.arange(parents)[:, None].expand(parents, 25)
    children, parent_K2 = cross(seed, parents_of(parents_PG), 300)
    assert all(set(child) <= set(pair) for child, pair in zip(children.tolist(), (parent_K2 - 7).tolist(), strict=True))
    assert set(children.flatten().tolist()) == set(range(parents))
    if parents > 1:
        mixed = children[(children != children[:, :1]).any(1)]
        share = (mixed == mixed.amin(1, keepdim=True)).double().mean()
        assert 0.4 < share < 0.6
