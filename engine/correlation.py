"""How well one ranking predicts another, and how sure that is when each value was measured a few times.

Shape suffixes: R replicates of the bootstrap, M structures, K seeds, N images, C clusters of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy.special import stdtrit
from torch import Tensor

from engine.random import random_integers, stream_key

REPLICATES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


def kendall_tau(x_RM: Tensor, y_RM: Tensor) -> Tensor:
    """Kendall's tau-b of every row, float64 ``[R]``: NaN where all values of a row are equal.

    Of all pairs, those ordered alike minus those ordered the other way, over the geometric mean of the pairs not
    tied in ``x`` and of those not tied in ``y``.
    """
    x_RMM, y_RMM = _signs(x_RM), _signs(y_RM)
    untied = x_RMM.abs().sum((1, 2)) * y_RMM.abs().sum((1, 2))
    return (x_RMM * y_RMM).sum((1, 2)) / untied.sqrt()


def spearman_rho(x_RM: Tensor, y_RM: Tensor) -> Tensor:
    """Spearman's rho of every row, float64 ``[R]``: the correlation of the ranks; NaN where all values are equal."""
    # The rank of a value is half the sum of its signs against all others, up to a constant.
    x_RM, y_RM = _signs(x_RM).sum(2), _signs(y_RM).sum(2)
    return (x_RM * y_RM).sum(1) / (x_RM.square().sum(1) * y_RM.square().sum(1)).sqrt()


def _signs(x_RM: Tensor) -> Tensor:
    """The sign of every difference within a row, float64 ``[R, M, M]``."""
    return (x_RM[:, :, None] - x_RM[:, None, :]).sign().double()


def resampled_means(values_MK: Tensor, seed: int = 0) -> Tensor:
    """Means over seeds drawn with replacement, for every structure apart, float64 ``[R, M]``; R is 0 for one seed.

    A mean of K draws from K values varies less than a mean of K new values, by the factor (K - 1) / K in variance,
    which matters when K is 3: deviations from the mean are widened accordingly.
    """
    structures, seeds = values_MK.shape
    if seeds < 2:
        return values_MK.new_zeros(0, structures)
    drawn_RMK = random_integers(stream_key("bootstrap", seed), seeds, (REPLICATES, structures, seeds))
    resampled_RM = values_MK.expand(REPLICATES, -1, -1).gather(2, drawn_RMK).mean(2)
    mean_M = values_MK.mean(1)
    return mean_M + math.sqrt(seeds / (seeds - 1)) * (resampled_RM - mean_M)


def estimate(statistic: Callable[[Tensor], Tensor], values_MK: Tensor) -> Estimate:
    """``statistic`` of the mean over seeds, with its percentile interval; ``statistic`` maps ``[R, M]`` to ``[R]``."""
    value = defined(float(statistic(values_MK.mean(1)[None])))
    replicates_R = statistic(resampled_means(values_MK))
    tail = (1 - CONFIDENCE) / 2
    low, high = (
        defined(float(replicates_R.nanquantile(quantile))) if len(replicates_R) else None
        for quantile in (tail, 1 - tail)
    )
    return Estimate(value, low, high)


def half_width(values_MK: Tensor) -> float | None:
    """Half the 95 % interval of a mean over K seeds, by Student's t; None for one seed.

    The variance is pooled over all structures: that of three values alone is hardly known.
    """
    structures, seeds = values_MK.shape
    if seeds < 2:
        return None
    quantile = float(stdtrit(structures * (seeds - 1), (1 + CONFIDENCE) / 2))
    return quantile * math.sqrt(float(values_MK.var(1).mean()) / seeds)


@dataclass(frozen=True)
class Resolution:
    """What the test images can tell: standard errors of one accuracy, and of a difference of two."""

    accuracy: float
    difference: float


def resolution(right_MN: Tensor, clusters_N: Tensor) -> Resolution:
    """Standard errors that come from testing on these images and not on others like them.

    right_MN    share of the seeds that answered an image right, float64
    clusters_N  which images belong together (copies of one original), int64: clusters are independent, images of
                one cluster are not

    Errors are root mean squares over structures, and over pairs of structures, whose answers to the same images
    are compared. With one image a cluster, the first is ``sqrt(p (1 - p) / (N - 1))``.
    """
    structures, images = right_MN.shape
    _, cluster_N = clusters_N.unique(return_inverse=True)
    clusters = int(cluster_N.max()) + 1
    residual_MN = right_MN - right_MN.mean(1, keepdim=True)
    residual_MC = right_MN.new_zeros(structures, clusters).index_add(1, cluster_N, residual_MN)
    correction = clusters / max(clusters - 1, 1)
    accuracy = residual_MC.square().sum(1).mean()
    difference = (residual_MC[:, None] - residual_MC[None]).square().sum(2).sum() / max(
        structures * (structures - 1), 1
    )
    return Resolution(*(math.sqrt(correction * float(square)) / images for square in (accuracy, difference)))


def defined(value: float) -> float | None:
    """The value, or None where it is none: JSON knows no NaN."""
    return value if math.isfinite(value) else None
