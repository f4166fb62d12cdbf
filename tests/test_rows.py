"""Groups of equal rows, in lexicographic order, of any type and range."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.rows import group_by_first, group_keys, group_rows, is_first, lexicographic_order

LONG = (-(2**63), 2**63 - 1)


def grouped(rows: Sequence[Sequence[float]]) -> tuple[list[int], list[int]]:
    distinct = sorted(set(map(tuple, rows)))
    return [distinct.index(tuple(row)) for row in rows], [list(map(tuple, rows)).index(row) for row in distinct]


def answer(rows_PG: Tensor) -> tuple[list[int], list[int]]:
    group_P, first = group_rows(rows_PG)
    assert group_P.dtype == first.dtype == torch.int64
    return group_P.tolist(), first.tolist()


@given(
    st.data(),
    # From words of 53 one-bit columns to columns no word holds, on either side of zero.
    st.sampled_from([(0, 0), (0, 1), (-1, 1), (0, 30), (-100, 100), (5, 2**26), (0, 2**53 - 1), (0, 2**54 - 1), LONG]),
    st.integers(1, 60),
)
def test_rows_of_integers_are_grouped_as_python_sorts_them(
    data: st.DataObject, bounds: tuple[int, int], columns: int
) -> None:
    value = st.sampled_from(bounds) | st.integers(*bounds)
    few = data.draw(st.lists(st.lists(value, min_size=columns, max_size=columns), min_size=1, max_size=4))
    rows = data.draw(st.lists(st.sampled_from(few), min_size=1, max_size=12))
    assert answer(torch.tensor(rows)) == grouped(rows)


@pytest.mark.parametrize("bits", [26, 27, 52, 53, 54, 62])
def test_neighbours_far_from_the_least_are_told_apart(bits: int) -> None:
    # Floats of 53 bits cannot, from 2^53 on.
    rows = [[2**bits - 1 - (i // 4), 2**bits - 1 - (i % 4)] for i in range(16)]
    assert answer(torch.tensor([*rows, [0, 0]])) == grouped([*rows, [0, 0]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float32, torch.float64])
def test_rows_of_every_type_are_grouped(dtype: torch.dtype) -> None:
    bounds = {torch.bool: (0, 2), torch.uint8: (0, 256), torch.int8: (-128, 128)}.get(dtype, (-1000, 1000))
    random_PG = torch.randint(*bounds, (50, 3), generator=torch.Generator().manual_seed(0))
    extremes_PG = torch.tensor([[bounds[0]] * 3, [bounds[1] - 1] * 3])
    rows_PG = torch.cat([random_PG, extremes_PG, random_PG[:20]]).to(dtype)
    assert answer(rows_PG) == grouped(rows_PG.tolist())


def test_no_rows_are_no_groups() -> None:
    assert answer(torch.empty(0, 3, dtype=torch.int64)) == ([], [])


@given(st.lists(st.integers(*LONG)))
def test_single_integers_are_grouped_like_rows_of_one(keys: list[int]) -> None:
    group_P, first = group_keys(torch.tensor(keys, dtype=torch.int64))
    assert (group_P.tolist(), first.tolist()) == grouped([[key] for key in keys])


@given(st.lists(st.integers(0, 5), min_size=1), st.integers(1, 2**62))
def test_in_a_fixed_shape_a_group_has_the_position_of_its_first_key(small: list[int], scale: int) -> None:
    keys = [key * scale % 2**63 for key in small]
    group_P, first_P = group_by_first(torch.tensor(keys, dtype=torch.int64))
    assert group_P.tolist() == [keys.index(key) for key in keys]
    assert first_P.tolist() == list(range(len(keys)))


@given(st.data(), st.integers(1, 40), st.integers(0, 20))
def test_rows_are_sorted_as_python_sorts_them_and_equal_ones_keep_their_order(
    data: st.DataObject, columns: int, count: int
) -> None:
    row = st.lists(st.integers(0, 30), min_size=columns, max_size=columns)
    rows = data.draw(st.lists(row, min_size=count, max_size=count).map(lambda few: few + few[:3]))
    rows_PG = torch.tensor(rows, dtype=torch.int64).reshape(-1, columns)
    assert lexicographic_order(rows_PG, 0, 30).tolist() == sorted(range(len(rows)), key=rows.__getitem__)


@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 2))))
def test_the_first_of_equal_rows_is_told_from_the_others(rows: list[tuple[int, int]]) -> None:
    found = is_first(torch.tensor(rows, dtype=torch.int64).reshape(-1, 2), -1, 30)
    assert found.tolist() == [row not in rows[:position] for position, row in enumerate(rows)]


def test_a_range_too_wide_to_sort_by_is_an_error() -> None:
    with pytest.raises(ValueError, match="too wide"):
        lexicographic_order(torch.zeros(2, 2, dtype=torch.int64), *LONG)
