"""The paper's evolutionary search as ask and tell, on device tensors, with explicit state and explicit randomness.

``ask`` proposes the genomes of the next generation, ``tell`` takes their scores. Proposals, costs, budget filter,
duplicates and selection are tensor operations over the whole population. Random numbers are counter-based
(`engine.random`): a state and a seed determine all that follows, on any device, whole or resumed.

Shape suffixes: P population, G genes, V genomes visited so far, K genomes proposed in one round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from engine.random import random_bits, random_integers, random_uniform, stream_key
from engine.rows import group_rows
from engine.space.costs import CostModel

# Proposals per genome wanted, and rounds of proposals before a generation is filled up by other means.
OVERSAMPLING = 8
ROUNDS = 16


class Origin(IntEnum):
    """How a genome came to be."""

    RANDOM = 0
    MUTATION = 1
    CROSSOVER = 2


@dataclass(frozen=True)
class SearchSettings:
    """The paper's search (section 3.3): its defaults are the paper's values."""

    population: int = 50
    parents: int = 10
    mutants: int = 25
    crossovers: int = 25
    mutation_probability: float = 0.1
    generations: int = 20


@dataclass(frozen=True)
class SearchState:
    """Everything the search knows: all genomes asked for, in order, and the scores told so far.

    Genomes are int64 ``[V, G]``; ``origin`` and ``generation`` int64 ``[V]``; ``correct`` int64 and ``loss``
    float64, both ``[told]`` with ``told`` ≤ V: between ask and tell the last generation has no scores.
    """

    seed: int
    generation: int
    genome_VG: Tensor
    origin_V: Tensor
    generation_V: Tensor
    correct: Tensor
    loss: Tensor

    @property
    def pending(self) -> Tensor:
        """Genomes asked for and not told, ``[P, G]``."""
        return self.genome_VG[len(self.correct) :]


def initial_state(genes: int, seed: int, device: torch.device | str = "cpu") -> SearchState:
    """The state before the first ask."""
    empty = torch.empty(0, dtype=torch.int64, device=device)
    loss = torch.empty(0, dtype=torch.float64, device=device)
    return SearchState(seed, 0, empty.reshape(0, genes), empty, empty, empty, loss)


def ranking(correct: Tensor, loss: Tensor) -> Tensor:
    """Indices from best to worst: most correct, then least loss, then earliest; a NaN loss is always last."""
    failed = loss.isnan()
    by_loss = loss.where(~failed, torch.inf).argsort(stable=True)
    by_correct = correct.where(~failed, -1)[by_loss].argsort(descending=True, stable=True)
    return by_loss[by_correct]


def ask(state: SearchState, settings: SearchSettings, costs: CostModel, budget: int) -> SearchState:
    """Propose the next generation: new genomes within ``budget`` MACs, none of them visited before.

    The first generation is random; later ones mutate and cross the best ``parents`` of all genomes told, failed
    ones excepted, and fill up with random ones. A space with fewer unvisited genomes left than wanted yields what
    the rounds found, down to none: the search is then finished. Raises `ValueError` if the previous generation was
    not told.
    """
    if len(state.pending):
        raise ValueError("tell the scores of the last generation before asking for another")
    proposals = _Proposals(state, costs, budget)
    best = ranking(state.correct, state.loss)[: settings.parents]
    parents_PG = state.genome_VG[best[~state.loss[best].isnan()]]
    if len(parents_PG):
        probability = settings.mutation_probability
        proposals.fill(Origin.MUTATION, settings.mutants, lambda key, k: mutate(key, parents_PG, k, costs, probability))
        proposals.fill(Origin.CROSSOVER, settings.crossovers, lambda key, k: cross(key, parents_PG, k))
    missing = settings.population - len(proposals.origin)
    proposals.fill(Origin.RANDOM, missing, lambda key, k: draw(key, k, costs))
    missing = settings.population - len(proposals.origin)
    proposals.fill(Origin.RANDOM, missing, lambda key, k: shrink_to_budget(draw(key, k, costs), costs, budget))
    return proposals.asked()


def tell(state: SearchState, correct: Tensor, loss: Tensor) -> SearchState:
    """Record the scores of the pending genomes, in order."""
    if len(correct) != len(state.pending) or len(loss) != len(correct):
        raise ValueError(f"{len(state.pending)} genomes await their scores, got {len(correct)}")
    return replace(
        state,
        generation=state.generation + 1,
        correct=torch.cat([state.correct, correct]),
        loss=torch.cat([state.loss, loss]),
    )


# -- operators: K new genomes from a stream of random numbers -------------------------------------------------------


def draw(key: int, count: int, costs: CostModel) -> Tensor:
    """Genomes ``[K, G]`` with every gene uniform over its choices."""
    space, device = costs.space, costs.macs_form.device
    return random_integers(key, space.choices, (count, len(space.genes)), device)


def mutate(key: int, parents_PG: Tensor, count: int, costs: CostModel, probability: float) -> Tensor:
    """Genomes ``[K, G]``: each a random parent with every gene redrawn with the given probability."""
    parent_K = random_integers(stream_key(key, "parent"), len(parents_PG), (count,), parents_PG.device)
    redrawn_KG = random_uniform(stream_key(key, "redraw"), (count, parents_PG.shape[1]), parents_PG.device)
    return torch.where(redrawn_KG < probability, draw(stream_key(key, "choice"), count, costs), parents_PG[parent_K])


def cross(key: int, parents_PG: Tensor, count: int) -> Tensor:
    """Genomes ``[K, G]``: two random parents, each gene from one or the other by a coin."""
    pair_2K = random_integers(stream_key(key, "parents"), len(parents_PG), (2, count), parents_PG.device)
    coin_KG = random_bits(stream_key(key, "coin"), count * parents_PG.shape[1], parents_PG.device) < 0
    return torch.where(coin_KG.reshape(count, -1), parents_PG[pair_2K[0]], parents_PG[pair_2K[1]])


def shrink_to_budget(genome_KG: Tensor, costs: CostModel, budget: int) -> Tensor:
    """Scale the choices of genomes that exceed the budget down by the least common factor that makes them fit.

    MACs grow with every choice, so the factor ``t / 64`` is found by bisection; at zero the genome is the smallest
    structure, which fits any budget the space can meet.
    """
    steps = 64
    low_K = torch.zeros(len(genome_KG), dtype=torch.int64, device=genome_KG.device)
    high_K = torch.full_like(low_K, steps)
    fits_K = costs.macs(genome_KG) <= budget
    for _ in range(steps.bit_length()):
        middle_K = (low_K + high_K) // 2
        fits = costs.macs(genome_KG * middle_K[:, None] // steps) <= budget
        low_K, high_K = torch.where(fits, middle_K, low_K), torch.where(fits, high_K, middle_K)
    return torch.where(fits_K[:, None], genome_KG, genome_KG * low_K[:, None] // steps)


class _Proposals:
    """A generation in the making: keeps the first new genomes within the budget of every round of proposals."""

    def __init__(self, state: SearchState, costs: CostModel, budget: int) -> None:
        self.state, self.costs, self.budget = state, costs, budget
        self.genome_VG, self.origin = state.genome_VG, list[int]()

    def fill(self, origin: Origin, count: int, propose: Callable[[int, int], Tensor]) -> None:
        """Add up to ``count`` genomes from ``propose(stream, K)``."""
        wanted = count
        for round_number in range(ROUNDS):
            if wanted <= 0:
                return
            stream = (self.state.seed, self.state.generation, int(origin), len(self.origin), round_number)
            genome_KG = propose(stream_key("propose", *stream), wanted * OVERSAMPLING)
            genome_KG = genome_KG[self.costs.macs(genome_KG) <= self.budget]
            new_KG = genome_KG[_is_first(self.genome_VG, genome_KG)][:wanted]
            self.genome_VG = torch.cat([self.genome_VG, new_KG])
            self.origin += [int(origin)] * len(new_KG)
            wanted -= len(new_KG)

    def asked(self) -> SearchState:
        """The state with these proposals pending."""
        origin_P = self.state.origin_V.new_tensor(self.origin)
        generation_P = torch.full_like(origin_P, self.state.generation)
        return replace(
            self.state,
            genome_VG=self.genome_VG,
            origin_V=torch.cat([self.state.origin_V, origin_P]),
            generation_V=torch.cat([self.state.generation_V, generation_P]),
        )


def _is_first(visited_VG: Tensor, genome_KG: Tensor) -> Tensor:
    """Which of K genomes appear neither among the visited ones nor earlier among the K, bool ``[K]``."""
    group, first = group_rows(torch.cat([visited_VG, genome_KG]))
    order = torch.arange(len(group), device=group.device)
    return (first[group] == order)[len(visited_VG) :]
