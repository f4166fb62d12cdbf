"""Search the best structure within a budget, scoring candidates with generated weights.

    python -m engine.evolve --flops 300M

Needs a PruningNet from ``engine.metatrain``. Writes to its output folder

    structure.json    the best structure            uniform.json   the uniform one of equal MACs
    candidates.csv    everything that was scored    state.json     what resuming needs
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from engine import population
from engine.errors import UserError
from engine.evolution import SearchSettings, SearchState, ask, initial_state, ranking, tell
from engine.memory import parse_memory
from engine.metatrain import DEFAULT_RUN, run_option
from engine.population import ScoringImages
from engine.pruningnet import PruningNet
from engine.run import directory
from engine.run.command import Interruption, Options, run_command, use_device
from engine.run.opened import PruningNetRun, open_run
from engine.run.options import require_at_least
from engine.run.scores import ScoreCache
from engine.run.search_state import Identity, load_state, save_state
from engine.run.training import keep_freed_memory
from engine.space.costs import (
    DEFAULT_RESOLUTION,
    Convention,
    CostModel,
    cost_model,
    format_count,
    parse_budget,
    uniform_genome,
)
from engine.space.structure import Structure, make_structure

PAPER = SearchSettings()

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Evolve(Options):
    """Search the best structure within a budget, scoring candidates with generated weights."""

    flops: str
    """Budget in MACs: 300M, 1.2G, or 50% of the full network."""
    run: Path = DEFAULT_RUN
    """Run directory of the PruningNet."""
    out: Path | None = None
    """Output folder (default: RUN/search-FLOPS)."""
    flops_resolution: int = DEFAULT_RESOLUTION
    """Image side in pixels at which MACs are counted: that of deployment."""
    flops_convention: Convention = "macs"
    """macs, or metapruning to also count what the original implementation counted."""
    population: int = PAPER.population
    """Structures per generation."""
    parents: int = PAPER.parents
    """Best structures that are mutated and crossed."""
    mutants: int = PAPER.mutants
    """Mutants per generation."""
    crossovers: int = PAPER.crossovers
    """Crossovers per generation."""
    mutation_probability: float = PAPER.mutation_probability
    """Probability that a mutation redraws a gene."""
    generations: int = PAPER.generations
    """Generations."""
    calibration_images: int = 1000
    """Images that calibrate BatchNorm for each structure."""
    seed: int = 0
    """Seed of the search."""
    device: str = "auto"
    """auto, cpu or cuda."""
    backend: str = "auto"
    """Kernels: auto, reference, cpu, triton or cuda."""
    precision: Precision = "fp32"
    """Of weights and activations when structures are scored; bf16 is faster on processors that multiply it."""
    memory: str = "auto"
    """Memory for activations: 2G, 500M, 25% of what is free, or auto (4% of it); no score depends on it."""
    resume: bool = False
    """Continue an interrupted search; the result is that of an uninterrupted one."""
    overwrite: bool = False
    """Replace the search in the output folder."""


@dataclass(frozen=True)
class Search:
    """What stays the same throughout one search. ``identity`` says what its scores belong to."""

    settings: SearchSettings
    costs: CostModel
    budget: int
    run: PruningNetRun
    net: PruningNet
    images: ScoringImages
    cache: ScoreCache
    out: Path
    identity: Identity
    memory: int


def main(options: Evolve) -> None:
    """Run the command."""
    console = Console(file=sys.stderr)
    run = open_run(options.run)
    out = options.out or options.run / f"search-{options.flops.replace('%', 'pct')}"
    if options.resume and (out / directory.CONFIG).is_file():
        options = directory.resumed_options(options, out)
    settings = _settings(options)
    device = use_device(options.device, options.backend)
    memory = parse_memory(options.memory, device)
    costs = cost_model(run.space(), options.flops_resolution, options.flops_convention).to(device)
    budget = parse_budget(options.flops, costs)
    directory.check_output(out, options.resume, options.overwrite)
    data = run.data(device)
    images = population.scoring_images(data, options.calibration_images)
    keep_freed_memory()
    net = run.net(device).to_precision(DTYPES[options.precision])
    if run.steps_left:
        console.print(f"note: this PruningNet is not finished; {run.steps_left} steps of its training are missing")

    scored_by: Identity = {"pruningnet": run.digest, "splits": data.splits.digest}
    scored_how: Identity = {
        "calibration": len(images.calibration_NCHW), "precision": options.precision, "device": device.type,
        "backend": options.backend,
    }  # fmt: skip
    identity = {**scored_by, "budget": budget}
    state = load_state(out, identity, device) if options.resume else None
    if not options.resume:
        directory.start_output(out, options, identity)
    cache = ScoreCache(run.folder, {**scored_by, **scored_how})
    search = Search(settings, costs, budget, run, net, images, cache, out, identity, memory)
    state = _generations(search, state or initial_state(len(costs.space.genes), options.seed, device), console)

    best_1G = state.genome_VG[ranking(state.correct, state.loss)[:1]]
    structures = {
        "structure": _structure(search, best_1G),
        "uniform": _structure(search, uniform_genome(costs, budget)),
    }
    for name, structure in structures.items():
        structure.save(out / f"{name}.json")
    _print_result(structures, budget, out)
    found = shlex.quote(str(out / "structure.json"))
    print(f"next: python -m engine.retrain --structure {found}{run_option(options.run)}")


def _settings(options: Evolve) -> SearchSettings:
    settings = SearchSettings(**{field.name: getattr(options, field.name) for field in fields(SearchSettings)})
    least = {"population": 1, "parents": 1, "mutants": 0, "crossovers": 0, "generations": 1}
    require_at_least(options, {**least, "calibration_images": 1, "seed": 0})
    if settings.mutants + settings.crossovers > settings.population:
        raise UserError(
            f"--mutants {settings.mutants} and --crossovers {settings.crossovers} exceed "
            f"--population {settings.population}: lower them or raise it"
        )
    if not 0 <= settings.mutation_probability <= 1:
        raise UserError(f"--mutation-probability {settings.mutation_probability}: a number from 0 to 1")
    return settings


def _generations(search: Search, state: SearchState, console: Console) -> SearchState:
    """Ask, score, tell and save until all generations are done or the space has no new structure to offer."""
    generations, population_size = search.settings.generations, search.settings.population
    images = len(search.images.subset)
    with Interruption() as interruption, _progress(console) as progress:
        task = progress.add_task("", total=generations * population_size, speed="")
        while state.generation < generations:
            progress.update(task, completed=state.generation * population_size)
            state = ask(state, search.settings, search.costs, search.budget)
            pending, began, scored = state.pending, time.monotonic(), 0
            if not len(pending):
                console.print("note: every structure within the budget has been scored")
                break
            for count in search.cache.score_missing(search.net, pending, search.images, search.memory):
                scored += count
                progress.update(task, advance=count, speed=f"{scored / (time.monotonic() - began):.2f}")
                interruption.stop_if_asked()
            state = tell(state, *search.cache.lookup(pending))
            save_state(search.out, state, search.costs, images, search.identity)
            best, median = _best_and_median(state, len(pending))
            progress.console.print(
                f"generation {state.generation}/{generations}  best {100 * best / images:.1f} %  "
                f"median {100 * median / images:.1f} %  "
                f"{scored / max(time.monotonic() - began, 1e-9):.2f} candidates/s ({len(pending) - scored} from cache)",
                highlight=False,
                soft_wrap=True,
            )
            interruption.stop_if_asked()
    return state


def _best_and_median(state: SearchState, last: int) -> tuple[int, float]:
    """Correct images of the best structure so far, and the median of the last generation."""
    best = state.correct[ranking(state.correct, state.loss)[0]]
    return int(best), float(state.correct[-last:].double().quantile(0.5))


def _structure(search: Search, genome_1G: Tensor) -> Structure:
    """One structure with its score, taken from the cache or computed now."""
    for _ in search.cache.score_missing(search.net, genome_1G, search.images, search.memory):
        pass
    correct, loss = search.cache.lookup(genome_1G)
    images = search.images
    score = {
        "correct": int(correct),
        "images": len(images.subset),
        "loss": float(loss),
        "split": images.subset.name,
        "calibration_images": len(images.calibration_NCHW),
        "precision": str(search.net.precision).removeprefix("torch."),
        "method": "top-1 with generated weights, BatchNorm calibrated for the structure; no fine-tuning",
    }
    return make_structure(
        search.costs, genome_1G[0], images.preprocessing.resolution, score=score,
        preprocessing=images.preprocessing.to_dict(), pruningnet=search.run.digest,
        splits=search.run.checkpoint.manifest["splits"],
    )  # fmt: skip


def _print_result(structures: dict[str, Structure], budget: int, out: Path) -> None:
    table = Table(title=f"budget {format_count(budget)} MACs")
    for heading in ("", "MACs", "parameters", "search score", "written to"):
        table.add_column(heading, justify="left" if heading in ("", "written to") else "right", overflow="fold")
    for name, structure in structures.items():
        score = structure.score or {}
        table.add_row(
            {"structure": "best"}.get(name, name),
            format_count(structure.macs),
            format_count(structure.parameters),
            f"{100 * score['correct'] / score['images']:.1f} %",
            str(out / f"{name}.json"),
        )
    Console().print(table)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("candidate"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[speed]} candidates/s"),
        TextColumn("time left"), TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, Evolve))
