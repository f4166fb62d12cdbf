"""Equal rows of a matrix: duplicates of a population, and the nodes of its trie."""

from __future__ import annotations

import torch
from torch import Tensor


def group_rows(rows_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Number the groups of equal rows in lexicographic order.

    Returns the group of every row, int64 ``[P]``, and the first row of every group, int64 ``[groups]``.
    """
    return _numbered(*torch.unique(rows_PG, dim=0, return_inverse=True))


def group_keys(key_P: Tensor) -> tuple[Tensor, Tensor]:
    """The same for single integers ``[P]``, in ascending order."""
    return _numbered(*torch.unique(key_P, return_inverse=True))


def _numbered(distinct: Tensor, group_P: Tensor) -> tuple[Tensor, Tensor]:
    order_P = torch.arange(len(group_P), device=group_P.device)
    first = order_P.new_full((len(distinct),), len(group_P)).scatter_reduce(0, group_P, order_P, "amin")
    return group_P, first
