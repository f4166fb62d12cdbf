"""Non-dominated sorting, crowding and tournaments on device tensors: what a Pareto search selects by.

All objectives are minimised. One structure dominates another if it is nowhere worse and somewhere better.

Shape suffixes: P population, M objectives, D distinct individuals in lexicographic order, B those of a block, L
those of the block and all later ones.
Source: Deb et al.: A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE TEC 2002.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from engine.random import Key, random_integers, stream_key
from engine.rows import group_keys, group_rows

# Individuals compared with all others at once: small enough for the comparisons to stay in cache.
BLOCK = 128


def non_dominated_rank(objective_PM: Tensor, violation_P: Tensor | None = None) -> Tensor:
    """The front of every individual, int64 ``[P]``: 0 is dominated by nobody, ``r`` by nobody once fronts < r are gone.

    ``objective_PM`` and ``violation_P`` are float64; a violation of 0, or none given, is feasible. By constraint
    domination a feasible individual dominates every infeasible one, and of two infeasible ones that with the lesser
    violation dominates. An evaluation that failed, NaN anywhere, is in one last front behind all others.
    """
    if objective_PM.ndim != 2 or objective_PM.shape[1] < 1:
        raise ValueError(f"objectives are [P, M] with at least one objective, got shape {tuple(objective_PM.shape)}")
    violation_P = objective_PM.new_zeros(len(objective_PM)) if violation_P is None else violation_P
    failed_P = objective_PM.isnan().any(1) | violation_P.isnan()
    feasible_P = ~failed_P & (violation_P <= 0)
    infeasible_P = ~failed_P & (violation_P > 0)
    rank_P = torch.zeros(len(objective_PM), dtype=torch.int64, device=objective_PM.device)
    fronts = 0
    # Whoever is feasible dominates the other two kinds, so their fronts follow one another.
    for members_P, ranked in (
        (feasible_P, _pareto_rank(objective_PM[feasible_P])),
        (infeasible_P, torch.unique(violation_P[infeasible_P], return_inverse=True)[1]),
        (failed_P, rank_P[failed_P]),
    ):
        rank_P[members_P] = fronts + ranked
        fronts += int(ranked.max()) + 1 if len(ranked) else 0
    return rank_P


def crowding_distance(objective_PM: Tensor, rank_P: Tensor) -> Tensor:
    """How far apart an individual's neighbours on its front are, float64 ``[P]``; more is lonelier.

    The mean over objectives of (next value - last value) / (greatest - least value of the front). The first and the
    last on a front have infinite distance, and so have all of a front of one or two. Of equal values the earlier
    individual comes first, so of equal individuals at an end one alone is infinite, and those between equals have 0
    (pymoo's convention). An objective that is the same all over a front adds nothing, to its ends either. Failed
    evaluations (NaN) have 0.
    """
    fronts = int(rank_P.max()) + 1 if len(rank_P) else 0
    size_P = torch.bincount(rank_P, minlength=fronts)[rank_P]
    distance_P = torch.zeros(len(rank_P), dtype=torch.float64, device=objective_PM.device)
    for value_P in objective_PM.double().unbind(1):
        by_value = value_P.argsort(stable=True)
        order = by_value[rank_P[by_value].argsort(stable=True)]
        value, front = value_P[order], rank_P[order]
        ends = front.new_ones(len(front) + 1, dtype=torch.bool)
        ends[1:-1] = front[1:] != front[:-1]
        # Every front is one stretch: its least value is at the start, its greatest at the end.
        least, greatest = value[ends[:-1]], value[ends[1:]]
        span = (greatest - least)[torch.unique_consecutive(front, return_inverse=True)[1]]
        gap = torch.where(ends[:-1] | ends[1:], torch.inf, (value.roll(-1) - value.roll(1)) / span)
        distance_P[order] += torch.where(span > 0, gap, 0).nan_to_num(nan=0, posinf=torch.inf)
    distance_P /= objective_PM.shape[1]
    distance_P[size_P <= 2] = torch.inf
    return distance_P.masked_fill(objective_PM.isnan().any(1), 0)


def nsga2_order(objective_PM: Tensor, violation_P: Tensor | None = None) -> Tensor:
    """Indices from best to worst, int64 ``[P]``: the earlier front, then the greater distance, then the earlier one."""
    rank_P = non_dominated_rank(objective_PM, violation_P)
    by_distance = crowding_distance(objective_PM, rank_P).argsort(descending=True, stable=True)
    return by_distance[rank_P[by_distance].argsort(stable=True)]


def tournament(key: Key, order_P: Tensor, count: int) -> Tensor:
    """The winners, int64 ``[count]``, of binary tournaments: of two drawn at random, with replacement, the better.

    ``order_P`` lists the individuals from best to worst (`nsga2_order`, or the best of it); ``key`` names the stream
    of random numbers (`engine.random`).
    """
    if not len(order_P):
        raise ValueError("a tournament needs somebody to take part")
    drawn = random_integers(stream_key(key, "tournament"), len(order_P), (2, count), order_P.device)
    return order_P[drawn.amin(0)]


def _pareto_rank(objective_PM: Tensor) -> Tensor:
    """The front of every individual by domination alone, int64 ``[P]``, of objectives without NaN.

    It is the length of the longest chain of individuals that dominate one another and end before this one. In
    lexicographic order whoever dominates comes first, so blocks in that order pass on how long their chains are.
    """
    group_P, first = group_rows(objective_PM)
    if objective_PM.shape[1] == 1:
        return group_P
    distinct_DM = objective_PM[first]
    small = torch.int16 if len(first) < 2**15 else torch.int32
    # Of distinct rows in lexicographic order the first objective needs no comparison. Places compare like values.
    place_MD = [group_keys(value_D)[0].to(small) for value_D in distinct_DM.unbind(1)[1:]]
    rank_D = torch.zeros(len(first), dtype=small, device=first.device)
    for start in range(0, len(first), BLOCK):
        dominates_BL = _nowhere_worse(place_MD, start)
        dominates_BB = dominates_BL[:, :BLOCK].triu(1)
        rank_B, rank_later = rank_D[start : start + BLOCK], rank_D[start + BLOCK :]
        while not torch.equal(rank_B, raised_B := torch.maximum(rank_B, _behind(rank_B, dominates_BB))):
            rank_B.copy_(raised_B)
        rank_later.copy_(torch.maximum(rank_later, _behind(rank_B, dominates_BL[:, BLOCK:])))
    return rank_D.long()[group_P]


def _nowhere_worse(place_MD: list[Tensor], start: int) -> Tensor:
    """Whether a row of the block from ``start`` is nowhere worse than a column from ``start``, bool ``[B, L]``."""
    return reduce(Tensor.logical_and_, (p[start : start + BLOCK, None] <= p[start:] for p in place_MD))


def _behind(rank_B: Tensor, dominates_BL: Tensor) -> Tensor:
    """The first front behind those of all who dominate, ``[L]``; 0 where nobody does."""
    return ((rank_B + 1)[:, None] * dominates_BL).amax(0)
