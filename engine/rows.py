"""Equal rows of a matrix: duplicates of a population, and the nodes of its trie."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

# Of integers that float64 holds exactly.
WORD_BITS = 53


def group_rows(rows_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Number the groups of equal rows in lexicographic order.

    Returns the group of every row, int64 ``[P]``, and the first row of every group, int64 ``[groups]``.
    """
    words = _words(rows_PG)
    if words is None:
        return _numbered(*torch.unique(rows_PG, dim=0, return_inverse=True))
    order = words[-1].argsort(stable=True)
    for word_P in reversed(words[:-1]):
        order = order[word_P[order].argsort(stable=True)]
    begins = torch.ones(len(order), dtype=torch.bool, device=order.device)
    begins[1:] = reduce(torch.logical_or, (word_P[order].diff() != 0 for word_P in words))
    # Sorting was stable: the first row of a group comes first in it.
    return torch.empty_like(order).scatter_(0, order, begins.cumsum(0) - 1), order[begins]


def _words(rows_PG: Tensor) -> list[Tensor] | None:
    """Integer rows as few integers each, int64 ``[P]``, that sort like them; None for rows of anything else.

    ``word = Σ_g (row_g - least) · 2^(bits · place_g)`` over as many neighbours as 53 bits hold: float64 is exact.
    """
    if not rows_PG.numel() or rows_PG.is_floating_point():
        return None
    least, greatest = (int(value) for value in rows_PG.aminmax())
    bits = max(1, (greatest - least).bit_length())
    if bits > WORD_BITS:
        return None
    size = WORD_BITS // bits
    scale = 2.0 ** (bits * torch.arange(size - 1, -1, -1, dtype=torch.float64, device=rows_PG.device))
    return [((part.long() - least).double() @ scale[-part.shape[1] :]).long() for part in rows_PG.split(size, 1)]


def group_keys(key_P: Tensor) -> tuple[Tensor, Tensor]:
    """The same for single integers ``[P]``, in ascending order."""
    return _numbered(*torch.unique(key_P, return_inverse=True))


def _numbered(distinct: Tensor, group_P: Tensor) -> tuple[Tensor, Tensor]:
    order_P = torch.arange(len(group_P), device=group_P.device)
    first = order_P.new_full((len(distinct),), len(group_P)).scatter_reduce(0, group_P, order_P, "amin")
    return group_P, first
