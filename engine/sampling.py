"""Structures drawn where the budget is: random ones, scaled to it and walked into it.

Hardly any uniformly random structure lies in a tight budget, and of a loose one most lie far below. So every genome
is scaled along a ray from the smallest structure to the full one until it uses the share of the budget it was given,
and then changed gene by gene, whatever moves it closer being kept, until it meets every limit. All of it is tensor
operations over all genomes at once; nothing here guarantees a structure that fits: the caller filters.

Shape suffixes: K genomes, G genes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import UserError
from engine.random import Key, random_integers, random_uniform, stream_key
from engine.space.budget import Budget

# Steps of the ray below and above a genome.
STEPS = 64
# Rounds of the walk, and after how many it is looked whether all have arrived.
ROUNDS, LOOK_EVERY = 256, 16
# How far a gene moves in one round, three times in eight not at all.
MOVES = (-8, -3, -2, -1, -1, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 8)
# A structure has arrived when it uses this much of its own share.
SLACK = 0.98
# Genomes and attempts before a budget counts as impossible to meet.
PROBES, ATTEMPTS = 512, 4


def draw(key: Key, count: int, budget: Budget) -> Tensor:
    """Genomes ``[K, G]`` with every gene uniform over its choices, whatever the budget."""
    return random_integers(key, budget.space.choices, (count, len(budget.space.genes)), budget.device)


def sample(key: int, count: int, budget: Budget, least_usage: float = 0.0) -> Tensor:
    """Random genomes ``[K, G]`` that mostly meet the budget, each using a random share of it from ``least_usage`` on.

    A share is of the way from the smallest structure to the tightest upper bound; from 0 on, one in ten is 0 itself.
    """
    genome_KG = draw(stream_key(key, "base"), count, budget)
    first = least_usage or -0.1
    share_K = first + (1 - first) * random_uniform(stream_key(key, "share"), (count,), budget.device)
    share_K = share_K.clamp(min=least_usage)
    if not budget.limits:
        return along_ray(genome_KG, (share_K * (2 * STEPS + 1)).long(), budget)
    return walk(key, scale_to_usage(genome_KG, share_K, budget), share_K.double() * SLACK, budget)


def along_ray(genome_KG: Tensor, step_K: Tensor, budget: Budget) -> Tensor:
    """Step 0 is the smallest structure, `STEPS` the genome itself, twice that the full one; between, in proportion."""
    step_K1, top = step_K[:, None], budget.space.choices - 1
    below = genome_KG * step_K1 // STEPS
    above = genome_KG + (top - genome_KG) * (step_K1 - STEPS) // STEPS
    return torch.where(step_K1 <= STEPS, below, above)


def scale_to_usage(genome_KG: Tensor, usage_K: Tensor, budget: Budget) -> Tensor:
    """The last step along each genome's ray that uses at most ``usage_K`` of the budget: costs grow along it."""
    low_K = torch.zeros(len(genome_KG), dtype=torch.int64, device=genome_KG.device)
    high_K = torch.full_like(low_K, 2 * STEPS + 1)
    for _ in range((2 * STEPS).bit_length()):
        middle_K = (low_K + high_K) // 2
        fits_K = budget.usage(budget.costs(along_ray(genome_KG, middle_K, budget))) <= usage_K
        low_K, high_K = torch.where(fits_K, middle_K, low_K), torch.where(fits_K, high_K, middle_K)
    return along_ray(genome_KG, low_K, budget)


def walk(key: int, genome_KG: Tensor, usage_K: Tensor, budget: Budget) -> Tensor:
    """Change one or two genes at a time wherever that brings a genome closer to the budget, or to its share of it."""

    def distance(genome_KG: Tensor) -> Tensor:
        costs_KC = budget.costs(genome_KG)
        # A limit that is not met outweighs any share.
        return 1000 * budget.violation(costs_KC) + (usage_K - budget.usage(costs_KC)).clamp(min=0)

    count, genes = genome_KG.shape
    top, rows = budget.space.choices - 1, torch.arange(count, device=budget.device)
    distance_K = distance(genome_KG)
    for round_number in range(ROUNDS):
        if round_number % LOOK_EVERY == 0 and not bool(distance_K.any()):
            break
        stream = stream_key(key, "walk", round_number)
        gene_2K = random_integers(stream_key(stream, "gene"), genes, (2, count), budget.device)
        move_2K = random_integers(stream_key(stream, "move"), len(MOVES), (2, count), budget.device)
        changed_KG = genome_KG.clone()
        moves = torch.tensor(MOVES, device=budget.device)
        for gene_K, move_K in zip(gene_2K, move_2K, strict=True):
            changed_KG[rows, gene_K] = (changed_KG[rows, gene_K] + moves[move_K]).clamp(0, top)
        changed_distance_K = distance(changed_KG)
        closer_K = (changed_distance_K <= distance_K) & (distance_K > 0)
        genome_KG = torch.where(closer_K[:, None], changed_KG, genome_KG)
        distance_K = torch.where(closer_K, changed_distance_K, distance_K)
    return genome_KG


def check_feasible(budget: Budget) -> None:
    """Raise `UserError`, with the closest structure there is, if no structure that meets all limits is found.

    Upper bounds can be met together if each can be met: the smallest structure meets them. With lower bounds the
    answer is that of a search, for a fixed number of structures.
    """
    if all(limit.low is None for limit in budget.limits):
        return
    closest, least = None, torch.inf
    for attempt in range(ATTEMPTS):
        costs_KC = budget.costs(sample(stream_key("feasible", attempt), PROBES, budget))
        violation_K = budget.violation(costs_KC)
        if not bool(violation_K.all()):
            return
        best = int(violation_K.argmin())
        if float(violation_K[best]) < least:
            least, closest = float(violation_K[best]), costs_KC[best].tolist()
    assert closest is not None
    shown = ", ".join(limit.quantity.kind.show(value) for limit, value in zip(budget.limits, closest, strict=True))
    asked = " with ".join(limit.text for limit in budget.limits)
    raise UserError(f"{asked}: none of {PROBES * ATTEMPTS} structures steered there fits; the closest has {shown}")
