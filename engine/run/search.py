"""A search at work: generations asked, scored, told and saved, and what comes out in the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from engine.evolution import SearchSettings, SearchState, ask, pareto_front, ranking, tell
from engine.racing import Race
from engine.run.command import Interruption
from engine.run.front import write_front
from engine.run.opened import PruningNetRun
from engine.run.scores import ScoreCache, Scorer
from engine.run.scoring import Scoring
from engine.run.search_state import COST_COLUMNS, Identity, columns_of, save_state
from engine.space.budget import Budget, Quantity, uniform_genome
from engine.space.costs import CostModel
from engine.space.structure import Structure, make_structure
from engine.stages import stage

# Uniform structures that a picture of a front shows.
UNIFORM_CHOICES = tuple(range(0, 31, 5))


@dataclass(frozen=True)
class Search:
    """What stays the same throughout one search.

    ``quantities`` are all costs that are known of a structure; ``pareto`` those that are objectives beside accuracy.
    ``race`` is the confidence with which candidates are stopped early. ``identity`` says what the scores belong to.
    """

    settings: SearchSettings
    costs: CostModel
    quantities: Mapping[str, Quantity]
    budget: Budget
    pareto: tuple[Quantity, ...]
    race: float | None
    run: PruningNetRun
    scoring: Scoring
    cache: ScoreCache
    scorer: Scorer
    out: Path
    identity: Identity


def run_generations(search: Search, state: SearchState, console: Console) -> SearchState:
    """Ask, score, tell and save until all generations are done or the space has no new structure to offer."""
    generations, population_size = search.settings.generations, search.settings.population
    images = len(search.scoring.images.subset)
    with Interruption() as interruption, _progress(console) as progress:
        task = progress.add_task("", total=generations * population_size, speed="")
        while state.generation < generations:
            with stage("progress line"):
                progress.update(task, completed=state.generation * population_size)
            state = ask(state, search.settings, search.budget, search.pareto)
            pending, began, scored = state.pending, time.monotonic(), 0
            if not len(pending):
                console.print("note: every structure within the budget has been scored")
                break
            with stage("scoring"):
                for count in search.cache.score_missing(search.scorer, pending, _race(search, state)):
                    scored += count
                    with stage("progress line"):
                        progress.update(task, advance=count, speed=f"{scored / (time.monotonic() - began):.2f}")
                    interruption.stop_if_asked()
            state = tell(state, *search.cache.lookup(pending))
            with stage("state file"):
                save_state(search.out, state, search.quantities, search.identity)
            with stage("progress line"):
                best, median = _best_and_median(state, len(pending))
                saved = 1 - float(state.images[-len(pending) :].double().mean()) / images
                progress.console.print(
                    f"generation {state.generation}/{generations}  best {100 * best / images:.1f} %  "
                    f"median {100 * median:.1f} %  "
                    f"{scored / max(time.monotonic() - began, 1e-9):.2f} candidates/s "
                    f"({len(pending) - scored} from cache)"
                    + (f"  {100 * saved:.0f} % of the images saved" if search.race else ""),
                    highlight=False,
                    soft_wrap=True,
                )
            interruption.stop_if_asked()
    return state


def _race(search: Search, state: SearchState) -> Race | None:
    """The race against the worst of the best structures told; none as long as there are too few."""
    best = ranking(state.correct, state.loss)[: search.settings.parents]
    if search.race is None or len(best) < search.settings.parents or bool(state.loss[best].isnan().any()):
        return None
    bar_1G = state.genome_VG[best[-1:]]
    # Known from its own generation, unless the scores were deleted since.
    for _ in search.cache.score_missing(search.scorer, bar_1G):
        pass
    return Race(search.cache.right(bar_1G[0]), search.race)


def _best_and_median(state: SearchState, last: int) -> tuple[int, float]:
    """Correct images of the best structure so far, and the median share of the last generation."""
    best = state.correct[ranking(state.correct, state.loss)[0]]
    return int(best), float((state.correct / state.images)[-last:].double().quantile(0.5))


def best_genome(search: Search, state: SearchState) -> Tensor:
    """The genome ``[1, G]`` with the best score."""
    return state.genome_VG[ranking(state.correct, state.loss)[:1]]


def scored_structure(search: Search, genome_1G: Tensor) -> Structure:
    """One structure with its score on all images, taken from the cache or computed now."""
    for _ in search.cache.score_missing(search.scorer, genome_1G):
        pass
    correct, loss, _ = search.cache.lookup(genome_1G)
    images = search.scoring.images
    score = {
        "correct": int(correct),
        "images": len(images.subset),
        "loss": float(loss),
        "split": images.subset.name,
        "calibration_images": len(images.calibration_NCHW),
        "precision": str(search.scoring.net.precision).removeprefix("torch."),
        "method": "top-1 with generated weights, BatchNorm calibrated for the structure; no fine-tuning",
    }
    return make_structure(
        search.costs, genome_1G[0], images.preprocessing.resolution, score=score,
        preprocessing=images.preprocessing.to_dict(), pruningnet=search.run.digest,
        splits=search.run.checkpoint.manifest["splits"],
    )  # fmt: skip


def uniform_structure(search: Search) -> Structure:
    """The uniform structure of the budget, with its score."""
    return scored_structure(search, uniform_genome(search.budget))


def save_front(search: Search, state: SearchState) -> Tensor:
    """Write the Pareto front of everything told; returns its positions, in order of the first cost."""
    front = pareto_front(state, search.pareto)
    space, told = search.costs.space, torch.arange(len(state.correct))
    uniform_PG = torch.cat([space.uniform_choice(choice) for choice in UNIFORM_CHOICES]).to(state.genome_VG.device)
    uniform_PG = uniform_PG[search.budget.fits(uniform_PG)]
    for _ in search.cache.score_missing(search.scorer, uniform_PG):
        pass
    correct, _, images = search.cache.lookup(uniform_PG)
    cost = COST_COLUMNS[search.pareto[0].name]
    uniform = {
        "correct": correct.tolist(), "images": images.tolist(), cost: search.pareto[0].of(uniform_PG).tolist(),
    }  # fmt: skip
    write_front(
        search.out,
        [scored_structure(search, state.genome_VG[[position]]) for position in front.tolist()],
        columns_of(state, front, search.quantities),
        columns_of(state, told, search.quantities),
        uniform,
        cost,
    )
    return front


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("candidate"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[speed]} candidates/s"),
        TextColumn("time left"), TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip
