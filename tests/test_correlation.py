"""Rank correlations against SciPy, intervals and standard errors against what they are by definition."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.correlation import (
    Estimate,
    estimate,
    half_width,
    kendall_tau,
    resampled_means,
    resolution,
    spearman_rho,
)

# Few different values: ties are common.
pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12)


def both(rows: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.tensor(rows, dtype=torch.float64)
    return table[None, :, 0], table[None, :, 1]


@given(pairs)
def test_rank_correlations_are_those_of_scipy(rows: list[tuple[int, int]]) -> None:
    x, y = both(rows)
    if len(x.unique()) == 1 or len(y.unique()) == 1:
        assert math.isnan(kendall_tau(x, y))
        assert math.isnan(spearman_rho(x, y))
        return
    assert float(kendall_tau(x, y)) == pytest.approx(scipy.stats.kendalltau(x[0], y[0]).statistic)
    assert float(spearman_rho(x, y)) == pytest.approx(scipy.stats.spearmanr(x[0], y[0]).statistic)


def test_every_row_is_correlated_on_its_own() -> None:
    x = torch.tensor([[1.0, 2, 3], [1, 2, 3]])
    y = torch.tensor([[1.0, 2, 3], [1, 3, 2]])
    assert kendall_tau(x, y).tolist() == pytest.approx([1, 1 / 3])
    assert spearman_rho(x, y).tolist() == pytest.approx([1, 0.5])


def test_an_interval_covers_its_value_and_shrinks_with_more_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.arange(6.0).double()[:, None] + torch.randn(6, 40, generator=generator, dtype=torch.float64)

    def first(mean_RM: torch.Tensor) -> torch.Tensor:
        return mean_RM[:, 0]

    few, many = estimate(first, values[:, :4]), estimate(first, values)
    widths = []
    for value, low, high in (vars(found).values() for found in (few, many)):
        assert low < value < high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1]


def test_resampled_means_vary_as_means_of_new_seeds_would() -> None:
    values = torch.tensor([[1.0, 2, 6]], dtype=torch.float64)
    # The unbiased variance of the mean of three values.
    assert float(resampled_means(values).var()) == pytest.approx(float(values.var()) / 3, rel=0.1)
    assert torch.equal(resampled_means(values), resampled_means(values))


def test_one_seed_gives_a_value_and_no_interval() -> None:
    values = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    assert estimate(lambda mean_RM: mean_RM[:, 1], values) == Estimate(2.0, None, None)
    assert half_width(values) is None


def test_a_correlation_of_equal_scores_is_undefined() -> None:
    values = torch.tensor([[1.0, 2], [2, 3]], dtype=torch.float64)
    same = torch.zeros(2, dtype=torch.float64)
    assert estimate(lambda mean_RM: kendall_tau(same.expand_as(mean_RM), mean_RM), values) == Estimate(None, None, None)


def test_the_interval_of_a_mean_is_students() -> None:
    values = torch.tensor([[1.0, 2, 6]], dtype=torch.float64)
    low, high = scipy.stats.t.interval(0.95, 2, loc=3, scale=scipy.stats.sem(values[0]))
    assert half_width(values) == pytest.approx((high - low) / 2)


def test_the_standard_error_of_independent_images_is_binomial() -> None:
    right = torch.zeros(2, 100, dtype=torch.float64)
    right[0, :80] = right[1, 10:90] = 1
    found = resolution(right, torch.arange(100))
    assert found.accuracy == pytest.approx(math.sqrt(0.8 * 0.2 / 99))
    # 10 images are answered right by the one alone, 10 by the other alone.
    assert found.difference == pytest.approx(math.sqrt((20 / 100) / 99))


def test_copies_of_an_image_tell_no_more_than_the_image() -> None:
    right = torch.tensor([[1.0, 1, 0, 1, 0], [1, 0, 1, 1, 1]], dtype=torch.float64)
    alone, copied = resolution(right, torch.arange(5)), resolution(right.repeat(1, 10), torch.arange(5).repeat(10))
    assert copied.accuracy == pytest.approx(alone.accuracy)
    assert copied.difference == pytest.approx(alone.difference)
