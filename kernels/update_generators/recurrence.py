"""Momentum SGD without gradients: a linear recurrence that takes several steps at once."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layout import sent

# Values of the uint8 that says when rows were last written.
DRIFTS = 256
# The drift of rows that were just written.
_NONE = (0.0, 0.0, 0.0, 1.0)


class Recurrence:
    """What t steps make of rows of weights w and momentum m that were last written after step j ≤ t. Immutable.

        w_t = w + drift[j,0] · w + drift[j,1] · m
        m_t =     drift[j,2] · w + drift[j,3] · m          the steps j+1 … t had no gradient for them

    The w is left out of `drift[j,0]`, which is close to zero: weight decay would be lost in the rounding of a one.
    """

    # Of as many steps at most it is known when rows were written.
    LONGEST = DRIFTS - 1

    def __init__(self, drift_T4: Tensor | None = None) -> None:
        self._drift_T4 = torch.tensor([_NONE], dtype=torch.float64) if drift_T4 is None else drift_T4
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @property
    def steps(self) -> int:
        """t"""
        return len(self._drift_T4) - 1

    def step(self, *, lr: float, momentum: float, weight_decay: float) -> Recurrence:
        """After one step more: m ← momentum · m + weight_decay · w, then w ← w - lr · m."""
        if self.steps == self.LONGEST:
            raise ValueError(f"after {self.LONGEST} steps all rows have to be written")
        from_w, from_m, m_from_w, m_from_m = self._drift_T4.unbind(1)
        m_from_w = momentum * m_from_w + weight_decay * from_w + weight_decay
        m_from_m = momentum * m_from_m + weight_decay * from_m
        after_T4 = torch.stack([from_w - lr * m_from_w, from_m - lr * m_from_m, m_from_w, m_from_m], dim=1)
        return Recurrence(torch.cat([after_T4, after_T4.new_tensor([_NONE])]))

    def drift(self, like: Tensor) -> Tensor:
        """The drifts `[256, 4]` in the dtype and on the device of a tensor; NaN where no row was written yet."""
        place = like.dtype, like.device
        if place not in self._tables:
            table = torch.full((DRIFTS, 4), torch.nan, dtype=like.dtype)
            table[: len(self._drift_T4)] = self._drift_T4
            self._tables[place] = sent(table, like.device)
        return self._tables[place]
