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
from engine.generation import Generation
from engine.racing import Race
from engine.run import ranks
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

    ``quantities`` are all costs that are known of a structure, on the host; ``pareto`` those that are objectives beside
    accuracy, and ``budget``, on the device.
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
    generation, device = on_device(search), search.scoring.device
    with Interruption() as interruption, _progress(console) as progress:
        task = progress.add_task("", total=generations * population_size, speed="")
        while state.generation < generations:
            with stage("progress line"):
                progress.update(task, completed=state.generation * population_size)
            if not len(state.pending):
                state = ask(state.to(device), search.settings, search.budget, search.pareto)
            pending, began, scored, asked = state.pending, time.monotonic(), 0, None
            if not len(pending):
                console.print("note: every structure within the budget has been scored")
                break
            if generation and _starts(generation, search, state):
                outcome = generation.outcome()
                told, asked, scored = outcome.told, outcome.asked, len(pending)
                last = (value[-scored:] for value in (told.correct, told.loss, told.images))
                search.cache.add(pending, outcome.right_PN, *last)
                if asked and told.generation < generations:
                    # The device goes on while the host writes down what it has found out.
                    _starts(generation, search, asked)
                state = told
            else:
                state = state.to(device)
                pending = state.pending
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
                line = _progress_line(search, state, len(pending), scored, time.monotonic() - began)
                progress.console.print(line, highlight=False, soft_wrap=True)
            interruption.stop_if_asked()
            state = asked or state
    if generation and generation.why_not_captured:
        console.print(f"note: no generation became a CUDA graph: {generation.why_not_captured}")
    return state.told.to(device)


def on_device(search: Search) -> Generation | None:
    """What runs whole generations on the device, or None where the host has to decide in between.

    It does in races, when several ranks share the work, when random structures are asked for in every generation, when
    there are several objectives, and when images are decoded as they are needed. On a CPU there is nothing to wait for.
    """
    scoring, alone = search.scoring, ranks.leader() is None
    plain = search.race is None and not search.pareto and Generation.serves(search.settings, scoring.images)
    if scoring.device.type == "cpu" or not (alone and plain):
        return None
    return Generation(scoring.net, scoring.images, scoring.memory, search.settings, search.budget)


def _starts(generation: Generation, search: Search, state: SearchState) -> bool:
    """Start on what is pending, if there is as much of it as should be, and nothing to take from the cache."""
    starts = generation.takes(state) and not search.cache.knows_any(state.pending)
    if starts:
        generation.start(state)
    return starts


def _progress_line(search: Search, state: SearchState, last: int, scored: int, seconds: float) -> str:
    """What a generation, the last so many told, has brought: ``scored`` of it in so many seconds."""
    images = len(search.scoring.images.subset)
    best, median = _best_and_median(state, last)
    saved = 1 - float(state.images[-last:].double().mean()) / images
    return (
        f"generation {state.generation}/{search.settings.generations}  best {100 * best / images:.1f} %  "
        f"median {100 * median:.1f} %  {scored / max(seconds, 1e-9):.2f} candidates/s ({last - scored} from cache)"
        + (f"  {100 * saved:.0f} % of the images saved" if search.race else "")
    )


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
