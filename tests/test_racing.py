"""A race stops who cannot win any more, and hardly ever anybody else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.racing import Race, sign_test


def race_of(count: int, accuracy: float = 1.0, confidence: float = 0.95) -> Race:
    """The structure to beat is right about the first images."""
    return Race(torch.arange(count) < round(accuracy * count), confidence)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=5))
def test_the_sign_test_is_the_tail_of_a_binomial_distribution(counts: list[tuple[int, int]]) -> None:
    losses, wins = torch.tensor(counts, dtype=torch.int64).reshape(-1, 2).T
    expected = [sum(math.comb(a + b, k) for k in range(a, a + b + 1)) / 2 ** (a + b) for a, b in counts]
    torch.testing.assert_close(sign_test(losses, wins), torch.tensor(expected, dtype=torch.float64))


@given(st.integers(1, 2000))
def test_the_slices_are_all_images_once_each_and_the_same_for_everybody(count: int) -> None:
    slices = race_of(count).slices
    assert torch.cat(slices).sort().values.tolist() == list(range(count))
    assert all(torch.equal(part, part.sort().values) for part in slices)
    assert all(torch.equal(one, other) for one, other in zip(slices, race_of(count, 0.5).slices, strict=True))
    assert len(slices) <= 4


def test_a_slice_is_a_sample_of_all_images() -> None:
    first = race_of(8000).slices[0]
    assert len(first) == 1000
    # Uniform over 8000 positions: mean 4000 and a standard error of 8000 / sqrt(12 · 1000) = 73.
    assert abs(first.double().mean() - 4000) < 300


def test_who_cannot_catch_up_stops_whatever_the_confidence() -> None:
    # The bar is right about 6 of 10; four images are left.
    race = race_of(10, 0.6, confidence=0.999999)
    seen_N = torch.arange(6)
    right_PN = torch.zeros(3, 10, dtype=torch.bool)
    right_PN[1, :2] = True
    right_PN[2, :1] = True
    assert race.goes_on(right_PN, seen_N).tolist() == [False, True, False]


@pytest.mark.parametrize(("losses", "goes_on"), [(5, True), (6, False)])
def test_significantly_worse_is_what_the_stated_confidence_says(losses: int, goes_on: bool) -> None:
    # An error of 0.05 shared by three tests: 2⁻⁶ < 0.05 / 3 < 2⁻⁵, so that six losses in a row are enough.
    race, seen_N = race_of(1000, 0.9), torch.arange(500)
    right_PN = torch.ones(1, 1000, dtype=torch.bool)
    right_PN[0, :losses] = False
    assert race.goes_on(right_PN, seen_N).tolist() == [goes_on]


def test_images_that_were_not_seen_are_not_looked_at() -> None:
    race, seen_N = race_of(1000), torch.arange(500)
    right_PN = torch.ones(1, 1000, dtype=torch.bool)
    right_PN[0, 500:] = False
    assert race.goes_on(right_PN, seen_N).all()


def test_structures_as_good_as_the_bar_are_rarely_stopped_and_much_worse_ones_soon() -> None:
    generator = torch.Generator().manual_seed(0)
    difficulty_N = torch.rand(2000, generator=generator)
    race = Race(torch.rand(2000, generator=generator) < difficulty_N, 0.95)
    as_good_PN = torch.rand(400, 2000, generator=generator) < difficulty_N
    worse_PN = torch.rand(400, 2000, generator=generator) < 0.8 * difficulty_N
    running = {"as good": torch.ones(400, dtype=torch.bool), "worse": torch.ones(400, dtype=torch.bool)}
    for number in range(1, 4):
        seen_N = torch.cat(race.slices[:number])
        running["as good"] &= race.goes_on(as_good_PN, seen_N)
        running["worse"] &= race.goes_on(worse_PN, seen_N)
    assert running["as good"].double().mean() > 0.93
    assert running["worse"].double().mean() < 0.05
