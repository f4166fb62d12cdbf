"""The structures whose search scores are put to the test: picked from a search, and found at random beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UserError
from engine.evolution import SearchSettings, ask, initial_state, ranking
from engine.random import random_uniform, stream_key
from engine.run.searched import Search
from engine.space.budget import Budget, Limit, quantities
from engine.space.latency_table import load_latency_table
from engine.space.structure import Structure, make_structure

CHOSEN, UNIFORM, RANDOM = "chosen", "uniform", "random-search"


@dataclass(frozen=True)
class Subject:
    """A structure with its search score, and why it is here: ``chosen``, ``uniform``, ``median``, ….

    One structure may be here for several reasons; the first names its folder.
    """

    roles: tuple[str, ...]
    structure: Structure

    @property
    def name(self) -> str:
        """What its folder is called."""
        return self.roles[0]

    @property
    def search_score(self) -> float:
        """Share of the images it was right for when the PruningNet scored it."""
        assert self.structure.score is not None
        return float(self.structure.score["correct"] / self.structure.score["images"])


def choose_subjects(
    search: Search, structures: int, seed: int, score: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> list[Subject]:
    """The best structure of a search and others from all over its scores, ``structures`` together, then the uniform
    one and the winner of a random search of equal cost.

    ``score`` gives correct images and loss of genomes ``[P, G]``, as the search would have.
    """
    roles: dict[tuple[int, ...], list[str]] = {}
    structure_of: dict[tuple[int, ...], Structure] = {}

    def add(role: str, structure: Structure) -> None:
        roles.setdefault(structure.genome, []).append(role)
        structure_of.setdefault(structure.genome, structure)

    add(CHOSEN, search.structure)
    found = search.candidates
    for number, row in enumerate(spread(search, structures - 1, seed)):
        role = "median" if number == 0 else f"sample-{number}"
        add(role, scored_structure(search, found.genome_VG[row], found.correct[row], found.loss[row]))
    if search.uniform is not None:
        add(UNIFORM, search.uniform)
    genome_VG = random_genomes(search, seed)
    if len(genome_VG):
        correct_V, loss_V = score(genome_VG)
        winner = ranking(correct_V, loss_V)[0]
        if not bool(loss_V[winner].isnan()):
            add(RANDOM, scored_structure(search, genome_VG[winner], correct_V[winner], loss_V[winner]))
    return [Subject(tuple(names), structure_of[genome]) for genome, names in roles.items()]


def spread(search: Search, count: int, seed: int) -> list[int]:
    """Pick ``count`` different candidates, by row, from all over what the search scored in full, its best one left out.

    The first is the median. The range of scores is cut into equal parts, one for each of the others, which is the
    candidate closest to a random score in its part: a search scores most of its candidates close to the best, and
    picks of equal probability would say little about the rest.
    """
    found = search.candidates
    order = ranking(found.correct, found.loss)
    order = order[~found.loss[order].isnan() & (found.images[order] == found.images.max())]
    score = found.correct[order].double()
    targets = score.quantile(0.5)[None]
    if count > 1:
        part = torch.arange(count - 1) + random_uniform(stream_key("trust", "spread", seed), (count - 1,)).double()
        targets = torch.cat([targets, score[-1] + (score[0] - score[-1]) * part.flip(0) / (count - 1)])
    free = (found.genome_VG[order] != torch.tensor(search.structure.genome)).any(1)
    picked = []
    for target in targets[: min(count, int(free.sum()))]:
        nearest = int((score - target).abs().masked_fill(~free, torch.inf).argmin())
        picked.append(int(order[nearest]))
        free[nearest] = False
    return picked


def random_genomes(search: Search, seed: int) -> Tensor:
    """As many different random genomes within the same budget as the search scored, ``[V, G]``, drawn as it draws.

    Fewer come back where the budget leaves fewer.
    """
    settings = SearchSettings(population=len(search.candidates), mutants=0, crossovers=0)
    start = initial_state(len(search.costs.space.genes), stream_key("trust", "random", seed))
    return ask(start, settings, budget_of(search)).pending


def budget_of(search: Search) -> Budget:
    """The budget a search kept. Raises `UserError` if its latency table is not there any more."""
    latency = None
    if any(bounds.name == "latency" for bounds in search.budgets):
        path = search.options.get("latency_table")
        table = load_latency_table(Path(str(path)), search.costs.space)
        if table.digest != search.latency_table:
            raise UserError(f"{path} is not the latency table that {search.folder} was searched with")
        latency = table.predict
    known = quantities(search.costs, latency)
    limits = (Limit(known[b.name], known[b.name].full if b.high is None else b.high, b.low) for b in search.budgets)
    return Budget(search.costs.space, torch.device("cpu"), tuple(limits))


def scored_structure(search: Search, genome_G: Tensor, correct: Tensor, loss: Tensor) -> Structure:
    """Describe a candidate that was scored as the best structure was."""
    best = search.structure
    score = {**(best.score or {}), "correct": int(correct), "loss": float(loss)}
    return make_structure(
        search.costs, genome_G, best.resolution, score=score, preprocessing=best.preprocessing,
        pruningnet=best.pruningnet, splits=best.splits,
    )  # fmt: skip
