"""The paper's evolutionary search as ask and tell, on device tensors, with explicit state and explicit randomness.

``ask`` proposes the genomes of the next generation, ``tell`` takes their scores. Proposals, costs, budget filter,
duplicates and selection are tensor operations over the whole population. Random numbers are counter-based
(`engine.random`): a state and a seed determine all that follows, on any device, whole or resumed.

With cost objectives beside accuracy the search is NSGA-II (https://doi.org/10.1109/4235.996017) over the same state.

Shape suffixes: P population, G genes, V genomes visited so far, K genomes proposed in one round, M objectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from engine.pareto import non_dominated_rank, nsga2_order, tournament
from engine.random import Key, random_bits, random_integers, random_uniform, stream_key
from engine.rows import is_first
from engine.sampling import draw, sample
from engine.space.budget import Budget, Quantity
from engine.stages import stage

# Proposals per genome wanted, and rounds of proposals before a generation is filled up by other means.
OVERSAMPLING = 8
ROUNDS = 16
# The same for random structures steered into the budget, which cost more each and miss it less often; a round of at
# least so many that brings nothing new has found what there is.
STEERED_OVERSAMPLING = 2
STEERED_ROUNDS = 4
STEERED_AT_LEAST = 256
# The least share of the budget that a random structure uses: the best ones are not found among the tiny.
NEAR_BUDGET = 0.8


# What of a state lies on the device.
TENSORS = ("genome_VG", "origin_V", "generation_V", "parent_V2", "correct", "loss", "images")


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

    Genomes are int64 ``[V, G]``; ``origin`` and ``generation`` int64 ``[V]``; ``parent_V2`` int64, the genomes each one
    was made of, -1 for none. ``correct`` and ``images`` (how many it was scored on) are int64 and ``loss`` float64, all
    ``[told]`` with ``told`` ≤ V: between ask and tell the last generation has no scores.
    """

    seed: int
    generation: int
    genome_VG: Tensor
    origin_V: Tensor
    generation_V: Tensor
    parent_V2: Tensor
    correct: Tensor
    loss: Tensor
    images: Tensor

    def to(self, device: torch.device | str) -> SearchState:
        """The same state on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if name in TENSORS})

    @property
    def told(self) -> SearchState:
        """The same state without what is pending."""
        last = len(self.correct)
        whole = ("genome_VG", "origin_V", "generation_V", "parent_V2")
        return replace(self, **{name: getattr(self, name)[:last] for name in whole})

    @property
    def pending(self) -> Tensor:
        """Genomes asked for and not told, ``[P, G]``."""
        return self.genome_VG[len(self.correct) :]


def initial_state(genes: int, seed: int, device: torch.device | str = "cpu") -> SearchState:
    """The state before the first ask."""
    empty = torch.empty(0, dtype=torch.int64, device=device)
    loss = torch.empty(0, dtype=torch.float64, device=device)
    return SearchState(seed, 0, empty.reshape(0, genes), empty, empty, empty.reshape(0, 2), empty, loss, empty)


def ranking(correct: Tensor, loss: Tensor) -> Tensor:
    """Indices from best to worst: most correct, then least loss, then earliest; a NaN loss is always last."""
    failed = loss.isnan()
    by_loss = loss.where(~failed, torch.inf).argsort(stable=True)
    by_correct = correct.where(~failed, -1)[by_loss].argsort(descending=True, stable=True)
    return by_loss[by_correct]


def objectives(state: SearchState, costs: Sequence[Quantity]) -> Tensor:
    """What a Pareto search minimises, float64 ``[told, 1 + len(costs)]``: error, then each cost.

    Error is minus the correct images, with ties broken by the loss: both in one number, NaN for a failed evaluation.
    """
    error = 1 - 1 / (1 + state.loss) - state.correct
    genome_PG = state.genome_VG[: len(state.correct)]
    return torch.stack([error, *(cost.of(genome_PG).double() for cost in costs)], 1)


def pareto_front(state: SearchState, costs: Sequence[Quantity]) -> Tensor:
    """The genomes told that no other one beats in one objective without losing in another, by the first cost."""
    objective_PM = objectives(state, costs)
    front = (non_dominated_rank(objective_PM) == 0).nonzero()[:, 0]
    front = front[~objective_PM[front, 0].isnan()]
    return front[objective_PM[front, 1].argsort(stable=True)]


def ask(state: SearchState, settings: SearchSettings, budget: Budget, costs: Sequence[Quantity] = ()) -> SearchState:
    """Propose the next generation: new genomes that meet ``budget``, none of them visited before.

    The first generation is random; later ones mutate and cross the best ``parents`` of all genomes told, failed
    ones excepted, and fill up with random ones. With ``costs`` as further objectives the parents are drawn by binary
    tournaments among the best ``population``, in the order of NSGA-II. A space with fewer unvisited genomes left than
    wanted yields what the rounds found, down to none: the search is then finished. Raises `ValueError` if the previous
    generation was not told.
    """
    if len(state.pending):
        raise ValueError("tell the scores of the last generation before asking for another")
    proposals = _Proposals(state, budget)
    with stage("selection"):
        parents = parents_of(state, settings, costs)
    if len(parents.index_P):
        probability = settings.mutation_probability
        proposals.fill(Origin.MUTATION, settings.mutants, lambda key, k: mutate(key, parents, k, budget, probability))
        proposals.fill(Origin.CROSSOVER, settings.crossovers, lambda key, k: cross(key, parents, k))
    nearest = 0.0 if costs else NEAR_BUDGET
    for propose in (
        lambda key, k: sample(key, k, budget, nearest),
        lambda key, k: sample(key, k, budget),
        lambda key, k: draw(key, k, budget),
    ):
        proposals.fill_random(settings.population - len(proposals.origin), propose)
    return proposals.asked()


def tell(state: SearchState, correct: Tensor, loss: Tensor, images: Tensor) -> SearchState:
    """Record the scores of the pending genomes, in order, each on so many ``images``."""
    if len(correct) != len(state.pending) or not len(loss) == len(images) == len(correct):
        raise ValueError(f"{len(state.pending)} genomes await their scores, got {len(correct)}")
    return replace(
        state,
        generation=state.generation + 1,
        correct=torch.cat([state.correct, correct]),
        loss=torch.cat([state.loss, loss]),
        images=torch.cat([state.images, images]),
    )


# -- operators: K new genomes, and the positions of their parents, from a stream of random numbers ------------------

Offspring = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Parents:
    """Genomes that may have children, best first, and where they stand in the state.

    ``count`` says on the device how many of them there are, where it is not all.
    """

    genome_PG: Tensor
    index_P: Tensor
    tournament: bool = False
    count: Tensor | None = None

    def choose(self, key: Key, shape: tuple[int, ...]) -> Tensor:
        """Positions of random parents: uniform, or winners of binary tournaments."""
        if self.tournament:
            order_P = torch.arange(len(self.index_P), device=self.index_P.device)
            return tournament(key, order_P, math.prod(shape)).reshape(shape)
        count = len(self.index_P) if self.count is None else self.count
        return random_integers(key, count, shape, self.index_P.device)


def parents_of(state: SearchState, settings: SearchSettings, costs: Sequence[Quantity]) -> Parents:
    """The best genomes told, without failed ones."""
    if costs:
        best = nsga2_order(objectives(state, costs))[: settings.population]
    else:
        best = ranking(state.correct, state.loss)[: settings.parents]
    index_P = best[~state.loss[best].isnan()]
    return Parents(state.genome_VG[index_P], index_P, bool(costs))


def mutate(key: Key, parents: Parents, count: int, budget: Budget, probability: float) -> Offspring:
    """Genomes ``[K, G]``: each a random parent with every gene redrawn with the given probability."""
    parent_K = parents.choose(stream_key(key, "parent"), (count,))
    redrawn_KG = random_uniform(stream_key(key, "redraw"), (count, parents.genome_PG.shape[1]), budget.device)
    choice_KG = draw(stream_key(key, "choice"), count, budget)
    genome_KG = torch.where(redrawn_KG < probability, choice_KG, parents.genome_PG.index_select(0, parent_K))
    index_K = parents.index_P[parent_K]
    return genome_KG, torch.stack([index_K, torch.full_like(index_K, -1)], 1)


def cross(key: Key, parents: Parents, count: int) -> Offspring:
    """Genomes ``[K, G]``: two random parents, each gene from one or the other by a coin."""
    pair_2K, genes = parents.choose(stream_key(key, "parents"), (2, count)), parents.genome_PG.shape[1]
    coin_KG = random_bits(stream_key(key, "coin"), count * genes, parents.index_P.device).reshape(count, genes) < 0
    first_KG, second_KG = (parents.genome_PG.index_select(0, parent_K) for parent_K in pair_2K)
    return torch.where(coin_KG, first_KG, second_KG), parents.index_P[pair_2K].T


def proposal_key(state: SearchState, origin: Origin, before: int, round_number: int = 0) -> int:
    """The stream of a round of proposals of the next generation, which has ``before`` genomes by then."""
    return stream_key("propose", state.seed, state.generation, int(origin), before, round_number)


class _Proposals:
    """A generation in the making: keeps the first new genomes within the budget of every round of proposals."""

    def __init__(self, state: SearchState, budget: Budget) -> None:
        self.state, self.budget = state, budget
        self.genome_VG, self.parent_V2, self.origin = state.genome_VG, state.parent_V2, list[int]()

    def fill_random(self, count: int, propose: Callable[[int, int], Tensor]) -> None:
        """Add up to ``count`` genomes without parents from ``propose(stream, K)``."""

        def orphans(key: int, k: int) -> Offspring:
            genome_KG = propose(key, max(k, STEERED_AT_LEAST))
            return genome_KG, genome_KG.new_full((len(genome_KG), 2), -1)

        self.fill(Origin.RANDOM, count, orphans, STEERED_ROUNDS, STEERED_OVERSAMPLING)

    def fill(
        self,
        origin: Origin,
        count: int,
        propose: Callable[[int, int], Offspring],
        rounds: int = ROUNDS,
        oversampling: int = OVERSAMPLING,
    ) -> None:
        """Add up to ``count`` genomes from ``propose(stream, K)``."""
        wanted = count
        for round_number in range(rounds):
            if wanted <= 0:
                return
            key = proposal_key(self.state, origin, len(self.origin), round_number)
            with stage("proposals"):
                genome_KG, parent_K2 = propose(key, wanted * oversampling)
            with stage("costs and filter"):
                fits_K = self.budget.fits(genome_KG).nonzero()[:, 0]
                genome_KG, parent_K2 = genome_KG.index_select(0, fits_K), parent_K2.index_select(0, fits_K)
            with stage("duplicates"):
                new_K = is_new(self.genome_VG, genome_KG, self.budget.space.choices).nonzero()[:wanted, 0]
            self.genome_VG = torch.cat([self.genome_VG, genome_KG[new_K]])
            self.parent_V2 = torch.cat([self.parent_V2, parent_K2[new_K]])
            self.origin += [int(origin)] * len(new_K)
            wanted -= len(new_K)
            if origin == Origin.RANDOM and not len(new_K):
                return

    def asked(self) -> SearchState:
        """The state with these proposals pending."""
        origin_P = self.state.origin_V.new_tensor(self.origin)
        generation_P = torch.full_like(origin_P, self.state.generation)
        return replace(
            self.state,
            genome_VG=self.genome_VG,
            parent_V2=self.parent_V2,
            origin_V=torch.cat([self.state.origin_V, origin_P]),
            generation_V=torch.cat([self.state.generation_V, generation_P]),
        )


def is_new(visited_VG: Tensor, genome_KG: Tensor, choices: int) -> Tensor:
    """Which of K genomes appear neither among the visited ones nor earlier among the K, bool ``[K]``.

    A visited row of -1 is no genome.
    """
    return is_first(torch.cat([visited_VG, genome_KG]), -1, choices - 1)[len(visited_VG) :]
