"""Equal rows of a matrix: duplicates of a population, and the nodes of its trie."""

from __future__ import annotations

import torch
from torch import Tensor


def group_rows(rows_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Number the groups of equal rows in lexicographic order.

    Returns the group of every row, int64 ``[P]``, and the first row of every group, int64 ``[groups]``.
    """
    distinct, group_P = torch.unique(rows_PG, dim=0, return_inverse=True)
    order_P = torch.arange(len(rows_PG), device=rows_PG.device)
    first = order_P.new_full((len(distinct),), len(rows_PG)).scatter_reduce(0, group_P, order_P, "amin")
    return group_P, first
