"""The structures whose search scores are put to the test: picked from a search, and found at random beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.evolution import ranking
from engine.run.finished_search import FinishedSearch, random_genomes, spread
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
    search: FinishedSearch,
    structures: int,
    seed: int,
    score: Callable[[Tensor], tuple[Tensor, Tensor]],
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

    add(CHOSEN, search.best)
    for number, genome_G in enumerate(spread(search, structures - 1, seed)):
        row = int((search.genome_VG == genome_G).all(1).nonzero()[0])
        role = "median" if number == 0 else f"sample-{number}"
        add(role, scored_structure(search, genome_G, search.correct_V[row], search.loss_V[row]))
    add(UNIFORM, search.uniform)
    genome_VG = random_genomes(search, seed)
    if len(genome_VG):
        correct_V, loss_V = score(genome_VG)
        winner = ranking(correct_V, loss_V)[0]
        add(RANDOM, scored_structure(search, genome_VG[winner], correct_V[winner], loss_V[winner]))
    return [Subject(tuple(names), structure_of[genome]) for genome, names in roles.items()]


def scored_structure(search: FinishedSearch, genome_G: Tensor, correct: Tensor, loss: Tensor) -> Structure:
    """Describe a candidate that was scored as the best structure was."""
    best = search.best
    score = {**(best.score or {}), "correct": int(correct), "loss": float(loss)}
    return make_structure(
        search.costs, genome_G, best.resolution, score=score, preprocessing=best.preprocessing,
        pruningnet=best.pruningnet, splits=best.splits,
    )  # fmt: skip
