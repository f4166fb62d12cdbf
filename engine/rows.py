"""Equal rows of a matrix: duplicates of a population, and the nodes of its trie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

# Of integers that float64 holds exactly.
WORD_BITS = 53


def group_rows(rows_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Number the groups of equal rows in lexicographic order.

    Returns the group of every row, int64 ``[P]``, and the first row of every group, int64 ``[groups]``.
    """
    words = None
    if rows_PG.numel() and not rows_PG.is_floating_point():
        words = _words(rows_PG, *(int(value) for value in rows_PG.aminmax()))
    if words is None:
        return _numbered(*torch.unique(rows_PG, dim=0, return_inverse=True))
    order = _sorted(words)
    begins = _begins(words, order)
    return torch.empty_like(order).scatter_(0, order, begins.cumsum(0) - 1), order[begins]


def lexicographic_order(rows_PG: Tensor, least: int, greatest: int) -> Tensor:
    """Positions, int64 ``[P]``, that sort rows of integers in a range; equal rows keep their order.

    Nothing is read back from a GPU. Raises `ValueError` if the range has more than 53 bits.
    """
    return _sorted(_words_in(rows_PG, least, greatest))


def is_first(rows_PG: Tensor, least: int, greatest: int) -> Tensor:
    """Which rows of integers in a range equal no earlier one, bool ``[P]``. Nothing is read back from a GPU."""
    words = _words_in(rows_PG, least, greatest)
    order = _sorted(words)
    begins = _begins(words, order)
    return torch.empty_like(begins).scatter_(0, order, begins)


def _begins(words: Sequence[Tensor], order: Tensor) -> Tensor:
    """Where in this order a group of equal rows begins: with its first row, as sorting was stable. Bool ``[P]``."""
    begins = torch.ones(len(order), dtype=torch.bool, device=order.device)
    begins[1:] = reduce(torch.logical_or, (word_P[order].diff() != 0 for word_P in words))
    return begins


def _sorted(words: Sequence[Tensor]) -> Tensor:
    order = words[-1].argsort(stable=True)
    for word_P in reversed(words[:-1]):
        order = order[word_P[order].argsort(stable=True)]
    return order


def _words_in(rows_PG: Tensor, least: int, greatest: int) -> list[Tensor]:
    words = _words(rows_PG, least, greatest)
    if words is None:
        raise ValueError(f"the range from {least} to {greatest} is too wide to sort by")
    return words


def _words(rows_PG: Tensor, least: int, greatest: int) -> list[Tensor] | None:
    """Rows of integers in a range as few integers each, int64 ``[P]``, that sort like them; None for a wide range.

    ``word = Σ_g (row_g - least) · 2^(bits · place_g)`` over as many neighbours as 53 bits hold: float64 is exact.
    """
    bits = max(1, (greatest - least).bit_length())
    if bits > WORD_BITS:
        return None
    size = WORD_BITS // bits
    places = torch.arange(size - 1, -1, -1, device=rows_PG.device)
    scale = (torch.ones_like(places) << bits * places).double()
    return [((part.long() - least).double() @ scale[-part.shape[1] :]).long() for part in rows_PG.split(size, 1)]


def group_by_first(key_P: Tensor) -> tuple[Tensor, Tensor]:
    """`group_keys` in a fixed shape: the number of a group is the position of its first key.

    There are as many numbers as keys, each its own first, int64 ``[P]``; nothing is read back from a GPU.
    """
    order_P = torch.arange(len(key_P), device=key_P.device)
    return order_P.where(key_P[:, None] == key_P, len(key_P)).amin(1), order_P


def group_keys(key_P: Tensor) -> tuple[Tensor, Tensor]:
    """The same for single integers ``[P]``, in ascending order."""
    return _numbered(*torch.unique(key_P, return_inverse=True))


def _numbered(distinct: Tensor, group_P: Tensor) -> tuple[Tensor, Tensor]:
    order_P = torch.arange(len(group_P), device=group_P.device)
    first = order_P.new_full((len(distinct),), len(group_P)).scatter_reduce(0, group_P, order_P, "amin")
    return group_P, first
