"""How sums of layers are fitted to whole networks, and how well they predict them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.correlation import kendall_tau, spearman_rho
from engine.random import random_uniform, stream_key
from engine.space import Space


def spread_genomes(space: Space, count: int, *name: int | str) -> Tensor:
    """Random genomes ``[count, G]`` from the smallest to the largest, one for each of ``count`` levels.

    Genes are drawn within a third of the choices of the level; ``name`` is that of the random stream.
    """
    levels = (torch.arange(count) + 0.5) / count
    uniform = random_uniform(stream_key(*name), (count, len(space.genes)))
    ratio = levels[:, None] + (uniform - 0.5) * 2 / 3
    return (ratio * space.choices).floor().clamp(0, space.choices - 1).long()


def fit(layers_ms: Sequence[float], measured_ms: Sequence[float]) -> tuple[float, float]:
    """Constant (at least 0) and scale with the least squared relative errors of ``constant + scale · layers``."""
    layers, measured = (torch.tensor(list(values), dtype=torch.float64) for values in (layers_ms, measured_ms))
    design = torch.stack([1 / measured, layers / measured], 1)
    solution = torch.linalg.lstsq(design, torch.ones_like(design[:, :1]), driver="gelsd").solution
    constant, scale = solution[:, 0].tolist()
    if constant < 0 or scale <= 0:
        constant, ratio = 0.0, layers / measured
        scale = float(ratio.sum() / (ratio**2).sum())
    return constant, scale


def agreement(predicted: Tensor, measured: Tensor) -> dict[str, float]:
    """Median and greatest relative error, and the rank correlations of Spearman and Kendall."""
    error = (predicted / measured - 1).abs()
    return {
        "median_relative_error": float(error.median()),
        "greatest_relative_error": float(error.max()),
        "spearman": float(spearman_rho(predicted[None], measured[None])),
        "kendall": float(kendall_tau(predicted[None], measured[None])),
    }
