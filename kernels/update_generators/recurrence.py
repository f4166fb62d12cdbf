"""Momentum SGD as a linear recurrence: what some steps make of weights, momentum and the gradients of the steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recurrence:
    """Weights w_t and momentum m_t after t steps from w_0 and m_0, with gradients g_1 … g_t. Immutable, in float64.

        w_t = w_0 + weights[0] · w_0 + weights[1] · m_0 + Σ_j weights[1+j] · g_j
        m_t =       momentum[0] · w_0 + momentum[1] · m_0 + Σ_j momentum[1+j] · g_j

    The w_0 is left out of `weights[0]`, which is close to zero: weight decay would be lost in the rounding of a one.
    """

    weights: tuple[float, ...] = (0.0, 0.0)
    momentum: tuple[float, ...] = (0.0, 1.0)

    @property
    def steps(self) -> int:
        """t"""
        return len(self.weights) - 2

    def step(self, *, lr: float, momentum: float, weight_decay: float) -> Recurrence:
        """After one step more: m ← momentum · m + g + weight_decay · w, then w ← w - lr · m."""
        m = [momentum * was + weight_decay * w for was, w in zip(self.momentum, self.weights, strict=True)]
        m[0] += weight_decay
        m.append(1.0)
        return Recurrence(tuple(w - lr * new for w, new in zip((*self.weights, 0.0), m, strict=True)), tuple(m))
