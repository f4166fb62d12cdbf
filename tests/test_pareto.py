"""Fronts, crowding and tournaments against pymoo, and against the definitions written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine import pareto
from engine.pareto import crowding_distance, non_dominated_rank, nsga2_order, tournament
from engine.random import random_bits, random_integers, random_uniform, stream_key

ORACLE = "pymoo, the oracle of these tests, is not installed: pip install pymoo"

seeds = st.integers(0, 2**32)
# Few values make ties and equal individuals, many make neither.
values = st.sampled_from([2, 5, 1000])


def objectives(seed: int, population: int, count: int, high: int) -> Tensor:
    """Float64 ``[P, M]`` of ``high`` different values, negative ones among them."""
    return random_integers(stream_key(seed, "objectives"), high, (population, count)).double() / 3 - high / 6


def violations(seed: int, population: int) -> Tensor:
    """Float64 ``[P]``: half feasible, ties among the others."""
    return (random_integers(stream_key(seed, "violations"), 8, (population,)) - 4).clamp(min=0).double()


def dominates(one: list[float], other: list[float]) -> bool:
    """Constraint domination of (violation, objectives…), as Deb et al. define it; NaN is a failed evaluation."""
    if any(map(math.isnan, one)) or any(map(math.isnan, other)):
        return not any(map(math.isnan, one)) and any(map(math.isnan, other))
    if one[0] != other[0]:
        return one[0] < other[0]
    pairs = list(zip(one[1:], other[1:], strict=True))
    return one[0] == 0 and all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def peeled(objective_PM: Tensor, violation_P: Tensor) -> list[int]:
    """The front of every individual: take away who is dominated by nobody left, again and again."""
    rows = torch.cat([violation_P[:, None], objective_PM], 1).tolist()
    rank, left, front = [-1] * len(rows), set(range(len(rows))), 0
    while left:
        members = {i for i in left if not any(dominates(rows[j], rows[i]) for j in left)}
        for member in members:
            rank[member] = front
        left, front = left - members, front + 1
    return rank


# -- fronts --------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(0, 40), st.integers(1, 4), values)
def test_fronts_are_those_of_constraint_domination_written_out(
    seed: int, population: int, count: int, high: int
) -> None:
    objective_PM, violation_P = objectives(seed, population, count, high), violations(seed, population)
    rank_P = non_dominated_rank(objective_PM, violation_P)
    assert rank_P.dtype == torch.int64
    assert rank_P.tolist() == peeled(objective_PM, violation_P)


@given(seeds, st.integers(1, 40), st.integers(1, 3))
def test_failed_evaluations_are_behind_everybody_and_dominate_nobody(seed: int, population: int, count: int) -> None:
    objective_PM, violation_P = objectives(seed, population, count, 5), violations(seed, population)
    failed_PM = random_uniform(stream_key(seed, "failed"), (population, count)) < 0.2
    objective_PM = objective_PM.masked_fill(failed_PM, torch.nan)
    rank_P = non_dominated_rank(objective_PM, violation_P)
    assert rank_P.tolist() == peeled(objective_PM, violation_P)
    failed_P = failed_PM.any(1)
    whole = non_dominated_rank(objective_PM[~failed_P], violation_P[~failed_P])
    assert torch.equal(rank_P[~failed_P], whole)
    assert (rank_P[failed_P] == (whole.max() + 1 if len(whole) else 0)).all()


def test_a_failed_violation_or_an_infinite_objective_is_ranked_by_what_it_says() -> None:
    objective_PM = torch.tensor([[0.0, 0], [torch.inf, -1], [torch.inf, 1], [-torch.inf, 9], [1, 1]]).double()
    violation_P = torch.tensor([torch.nan, 0, 0, 0, torch.inf]).double()
    assert non_dominated_rank(objective_PM, violation_P).tolist() == [3, 0, 1, 0, 2]


@pytest.mark.parametrize("population", [1, 2, 300, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("high", [4, 50, 2**20])
def test_fronts_are_those_of_pymoo(population: int, count: int, high: int) -> None:
    sorting = pytest.importorskip("pymoo.util.nds.non_dominated_sorting", reason=ORACLE)
    objective_PM = objectives(population + high, population, count, high)
    _, expected = sorting.NonDominatedSorting().do(objective_PM.numpy(), return_rank=True)
    assert non_dominated_rank(objective_PM).tolist() == expected.tolist()


@given(seeds, st.integers(1, 300), st.integers(1, 3), values)
def test_fronts_do_not_depend_on_the_order_of_the_individuals(
    seed: int, population: int, count: int, high: int
) -> None:
    objective_PM, violation_P = objectives(seed, population, count, high), violations(seed, population)
    order = random_bits(stream_key(seed, "order"), population).argsort()
    permuted = non_dominated_rank(objective_PM[order], violation_P[order])
    assert torch.equal(permuted, non_dominated_rank(objective_PM, violation_P)[order])


@given(seeds, st.integers(1, 60), st.integers(1, 30))
def test_fronts_do_not_depend_on_how_many_are_compared_at_once(seed: int, population: int, block: int) -> None:
    objective_PM = objectives(seed, population, 3, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pareto, "BLOCK", block)
        in_blocks = non_dominated_rank(objective_PM)
    assert torch.equal(in_blocks, non_dominated_rank(objective_PM))


def test_a_chain_longer_than_a_block_has_as_many_fronts_as_links() -> None:
    place = torch.arange(1000).double()
    order = random_bits(7, 1000).argsort()
    chain_PM = torch.stack([place, place * 2], 1)[order]
    assert torch.equal(non_dominated_rank(chain_PM), order)


def test_zero_and_minus_zero_are_the_same_value() -> None:
    objective_PM = torch.tensor([[0.0, 1], [-0.0, 1], [-0.0, 0.0], [0.0, -0.0]]).double()
    assert non_dominated_rank(objective_PM).tolist() == [1, 1, 0, 0]


def test_ten_thousand_are_sorted_without_a_matrix_of_who_dominates_whom() -> None:
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(largest, result.numel() * result.itemsize if isinstance(result, Tensor) else 0)
            return result

    with Watch():
        rank_P = non_dominated_rank(torch.rand(10_000, 3, dtype=torch.float64))
    assert rank_P.max() > 10
    assert 10**6 < largest < 10**7


@pytest.mark.parametrize("shape", [(5,), (5, 0), (5, 2, 1)])
def test_objectives_of_another_shape_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one objective"):
        non_dominated_rank(torch.zeros(shape, dtype=torch.float64))


# -- crowding ------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(0, 60), st.integers(1, 4), st.integers(1, 4), values)
def test_crowding_on_every_front_is_that_of_pymoo(
    seed: int, population: int, count: int, fronts: int, high: int
) -> None:
    metrics = pytest.importorskip("pymoo.operators.survival.rank_and_crowding.metrics", reason=ORACLE)
    crowding = metrics.get_crowding_function("cd")
    objective_PM = objectives(seed, population, count, high)
    rank_P = random_integers(stream_key(seed, "rank"), fronts, (population,))
    distance_P = crowding_distance(objective_PM, rank_P)
    assert distance_P.dtype == torch.float64
    for front in range(fronts):
        members_P = rank_P == front
        expected = torch.from_numpy(crowding.do(objective_PM[members_P].numpy()))
        torch.testing.assert_close(distance_P[members_P], expected, rtol=1e-12, atol=0)


def test_crowding_of_a_front_worked_out_by_hand() -> None:
    # Spans 4 and 8; in the middle ((4 - 0) / 4 + (8 - 0) / 8) / 2 = 1 and, beside its equal, (1/4 + 2/8) / 2 and
    # ((4 - 1) / 4 + (6 - 0) / 8) / 2.
    objective_PM = torch.tensor([[0, 8], [1, 6], [1, 6], [4, 0]]).double()
    distances = crowding_distance(objective_PM, torch.zeros(4, dtype=torch.int64)).tolist()
    assert distances[0] == distances[3] == math.inf
    assert sorted(distances[1:3]) == [(1 / 4 + 6 / 8) / 2, (3 / 4 + 2 / 8) / 2]
    single = crowding_distance(objective_PM, torch.tensor([0, 0, 1, 0])).tolist()
    assert single == [math.inf, 1, math.inf, math.inf]


def test_one_or_two_on_a_front_are_infinitely_far_from_their_neighbours_and_three_equals_are_not() -> None:
    distances = crowding_distance(torch.ones(6, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 2])).tolist()
    assert distances == [math.inf, math.inf, 0, 0, math.inf, 0]


def test_an_objective_that_does_not_vary_adds_nothing() -> None:
    rank_P = torch.zeros(4, dtype=torch.int64)
    objective_PM = torch.tensor([[5, 0], [5, 1], [5, 3], [5, 4]]).double()
    assert crowding_distance(objective_PM, rank_P).tolist() == [math.inf, 3 / 8, 3 / 8, math.inf]
    assert crowding_distance(objective_PM[:, :1], rank_P).tolist() == [0, 0, 0, 0]


def test_infinite_objectives_and_failed_evaluations_have_a_distance_that_is_a_number() -> None:
    objective_PM = torch.tensor([[0.0], [1], [2], [torch.inf], [torch.inf], [torch.nan], [torch.nan]]).double()
    distances = crowding_distance(objective_PM, torch.tensor([0, 0, 0, 0, 0, 1, 1])).tolist()
    assert distances == [math.inf, 0, 0, 0, math.inf, 0, 0]


# -- order and tournaments -----------------------------------------------------------------------------------------


@given(seeds, st.integers(0, 60), st.integers(1, 3), values)
def test_the_order_is_by_front_then_the_lonelier_then_the_earlier(
    seed: int, population: int, count: int, high: int
) -> None:
    objective_PM, violation_P = objectives(seed, population, count, high), violations(seed, population)
    rank_P = non_dominated_rank(objective_PM, violation_P)
    distances = crowding_distance(objective_PM, rank_P).tolist()
    expected = sorted(range(population), key=lambda i: (int(rank_P[i]), -distances[i], i))
    order_P = nsga2_order(objective_PM, violation_P)
    assert order_P.tolist() == expected
    assert torch.equal(order_P, nsga2_order(objective_PM.clone(), violation_P.clone()))


@given(seeds, st.integers(1, 50), st.integers(0, 200))
def test_who_wins_a_tournament_is_a_matter_of_key_and_place(seed: int, population: int, count: int) -> None:
    order_P = random_bits(stream_key(seed, "order"), population).argsort()
    winners = tournament(seed, order_P, count)
    assert winners.shape == (count,)
    assert torch.equal(winners, tournament(seed, order_P, count))
    # The same draws among others have the winners in the same places.
    places = tournament(seed, torch.arange(population), count)
    assert torch.equal(winners, order_P[places])


def test_a_place_wins_as_often_as_two_draws_have_it_as_the_better() -> None:
    draws, places = 100_000, 10
    won = tournament(stream_key("test"), torch.arange(places), draws).bincount(minlength=places)
    # P(min of two of n places = i) = (2 (n - i) - 1) / n².
    expected = torch.tensor([(2 * (places - i) - 1) / places**2 * draws for i in range(places)])
    # Chi-square with f = 9 degrees of freedom has mean f and variance 2 f: five deviations.
    assert ((won - expected) ** 2 / expected).sum() < 9 + 5 * 18**0.5
    assert not torch.equal(tournament(1, torch.arange(10), 50), tournament(2, torch.arange(10), 50))


def test_a_tournament_of_nobody_is_an_error() -> None:
    with pytest.raises(ValueError, match="take part"):
        tournament(0, torch.empty(0, dtype=torch.int64), 3)


# -- together ------------------------------------------------------------------------------------------------------


def evolved(seed: int, judge_by: str) -> tuple[Tensor, Tensor]:
    """Integers ``[P, 8]`` from 0 to 30 evolved to be near 5 and near 25, and their objectives.

    The distances to the two, Σ|x - 5| and Σ|x - 25|, trade off: whoever has all x between 5 and 25 has a sum of 160,
    and nobody has less. At most 100 of the first distance are allowed.
    """
    population, genes, high = 40, 8, 31

    def judged(x_PG: Tensor) -> tuple[Tensor, Tensor]:
        objective_PM = torch.stack([(x_PG - 5).abs().sum(1), (x_PG - 25).abs().sum(1)], 1).double()
        return objective_PM, (objective_PM[:, 0] - 100).clamp(min=0)

    x_PG = random_integers(stream_key(seed, "first"), high, (population, genes))
    for generation in range(100):
        order_P = nsga2_order(*judged(x_PG))
        key = stream_key(seed, generation)
        if judge_by == "nsga2":
            parents = tournament(key, order_P, 2 * population)
        else:
            parents = random_integers(key, population, (2 * population,))
        coin_PG = random_bits(stream_key(key, "coin"), population * genes).reshape(population, genes) < 0
        child_PG = torch.where(coin_PG, x_PG[parents[:population]], x_PG[parents[population:]])
        redrawn_PG = random_uniform(stream_key(key, "redraw"), child_PG.shape) < 1 / genes
        child_PG = torch.where(redrawn_PG, random_integers(stream_key(key, "choice"), high, child_PG.shape), child_PG)
        everybody = torch.cat([x_PG, child_PG])
        kept = nsga2_order(*judged(everybody))[:population] if judge_by == "nsga2" else slice(population, None)
        x_PG = everybody[kept]
    return x_PG, judged(x_PG)[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_search_made_of_these_pieces_approaches_the_true_front_and_spreads_along_it(seed: int) -> None:
    _, objective_PM = evolved(seed, "nsga2")
    first, second = objective_PM.unbind(1)
    assert (first <= 100).all()
    assert (non_dominated_rank(objective_PM) == 0).all()
    # On the front the sum is 160; at random it is 8 · 60 / 31 = 15.5 more, with a deviation of 1.1 for a mean of 40.
    assert (first + second - 160).mean() < 1
    # From one end, which has a first distance of 0, to the other, cut off at 100.
    assert first.min() < 10
    assert first.max() > 90
    assert first.sort().values.diff().max() <= 10
    _, by_chance = evolved(seed, "chance")
    assert (by_chance.sum(1) - 160).mean() > 10


@pytest.mark.parametrize("seed", range(3))
def test_that_search_reaches_nearly_the_hypervolume_of_the_true_front(seed: int) -> None:
    hv = pytest.importorskip("pymoo.indicators.hv", reason=ORACLE)
    indicator = hv.HV(ref_point=[110.0, 170.0])
    true = torch.tensor([[d, 160 - d] for d in range(101)]).double()
    _, objective_PM = evolved(seed, "nsga2")
    assert indicator(objective_PM.numpy()) > 0.95 * indicator(true.numpy())
