import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import random
from engine.random import random_bits, random_integers, random_uniform, stream_key

keys = st.integers(0, 2**64 - 1)


def test_a_stream_is_splitmix64_seeded_with_its_key() -> None:
    # The reference implementation's output for seed 1234567, as published by Rosetta Code ("Pseudo-random numbers:
    # Splitmix64") and used by the tests of many libraries.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [bits % 2**64 for bits in random_bits(1234567, 5).tolist()] == published


def splitmix64(key: int, count: int) -> list[int]:
    """The reference implementation (https://prng.di.unimi.it/splitmix64.c), in Python's own integers."""
    mask, numbers = 2**64 - 1, []
    for _ in range(count):
        key = (key + 0x9E3779B97F4A7C15) & mask
        z = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(z ^ (z >> 31))
    return numbers


@given(keys, st.integers(0, 20))
def test_every_key_gives_the_stream_of_the_reference_implementation(key: int, count: int) -> None:
    assert [bits % 2**64 for bits in random_bits(key, count).tolist()] == splitmix64(key, count)


@given(keys, st.integers(0, 50), st.integers(0, 50))
def test_a_longer_stream_begins_with_the_shorter_one(key: int, count: int, more: int) -> None:
    assert torch.equal(random_bits(key, count + more)[:count], random_bits(key, count))


@given(keys, st.integers(0, 60), st.integers(1, 70))
def test_numbers_do_not_depend_on_how_many_are_mixed_at_once(key: int, count: int, chunk: int) -> None:
    whole = random_bits(key, count), random_uniform(key, (count,)), random_integers(key, 31, (count,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "CHUNK", chunk)
        in_chunks = random_bits(key, count), random_uniform(key, (count,)), random_integers(key, 31, (count,))
    assert all(map(torch.equal, in_chunks, whole))


@given(keys)
def test_uniform_numbers_are_the_upper_24_bits_of_the_stream(key: int) -> None:
    uniform = random_uniform(key, (2, 3, 4))
    assert uniform.shape == (2, 3, 4)
    assert uniform.dtype == torch.float32
    assert uniform.flatten().tolist() == [bits / 2**24 for bits in (b >> 40 for b in splitmix64(key, 24))]


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    uniform = random_uniform(stream_key("test"), (100_000,)).double()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    # The mean of n uniform numbers has a standard deviation of sqrt(1 / 12 n) = 0.0009, their variance is 1 / 12.
    assert abs(uniform.mean() - 1 / 2) < 4 * 0.0009
    assert abs(uniform.var() - 1 / 12) < 0.002


@given(keys, st.integers(1, 2**31))
def test_integers_are_below_their_bound_and_in_proportion_to_the_stream(key: int, high: int) -> None:
    integers = random_integers(key, high, (30,))
    assert integers.dtype == torch.int64
    assert integers.tolist() == [(bits >> 32) * high >> 32 for bits in splitmix64(key, 30)]
    assert all(0 <= integer < high for integer in integers.tolist())


@pytest.mark.parametrize("high", [2, 31, 100])
def test_integers_hit_every_value_equally_often(high: int) -> None:
    draws = 1000 * high
    observed = random_integers(stream_key("test", high), high, (draws,)).bincount(minlength=high)
    chi_square = float(((observed - 1000) ** 2 / 1000).sum())
    # Chi-square with f = high - 1 degrees of freedom has mean f and variance 2 f: five deviations on either side.
    freedom = high - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


@given(
    st.lists(st.integers() | st.text(max_size=3), max_size=3), st.lists(st.integers() | st.text(max_size=3), max_size=3)
)
def test_streams_of_different_names_differ(one: list[int | str], other: list[int | str]) -> None:
    same = torch.equal(random_bits(stream_key(*one), 4), random_bits(stream_key(*other), 4))
    assert same == (one == other)


def test_the_key_of_a_name_never_changes() -> None:
    # printf "('propose', 0, 1)" | sha256sum prints e5c0ae3817ae8442…; the first eight bytes, little-endian.
    # Checkpoints and searches of earlier versions continue only as long as this holds.
    assert stream_key("propose", 0, 1) == 0x4284AE1738AEC0E5
