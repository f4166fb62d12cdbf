"""Search the best structures within a budget, scoring candidates with generated weights.

    python -m engine.evolve --flops 300M
    python -m engine.evolve --flops 280M:300M --params 2M --memory-peak 50%
    python -m engine.evolve --latency 8ms --latency-table table.json
    python -m engine.evolve --objectives accuracy,flops
    torchrun --nproc-per-node=2 -m -- engine.evolve --flops 300M

Needs a PruningNet from ``engine.metatrain``. Writes to its output folder

    structure.json    the best structure            uniform.json   the uniform one within the same budget
    candidates.csv    everything that was scored    state.json     what resuming needs
    latency.json      predicted and measured milliseconds, when a latency table was given
    profile.json      where the time of the generations went, with --profile
    front/ front.csv front.png                      the Pareto front, when there are several objectives
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from engine import stages
from engine.errors import UserError
from engine.evolution import SearchSettings, SearchState, initial_state
from engine.files import write_atomically
from engine.memory import parse_memory
from engine.metatrain import DEFAULT_RUN, run_option
from engine.run import directory, ranks
from engine.run.command import run_command, use_device
from engine.run.limits import LimitOptions, checked_budget, feasibility
from engine.run.opened import open_run
from engine.run.options import require_at_least
from engine.run.scores import ScoreCache
from engine.run.scoring import Precision, open_scoring
from engine.run.scoring import Settings as ScoringSettings
from engine.run.search import (
    Search,
    best_genome,
    run_generations,
    save_front,
    scored_structure,
    uniform_structure,
)
from engine.run.search_state import Identity, load_state
from engine.run.shared import serve, shared_scorer
from engine.run.verified import report_latencies
from engine.space.budget import Budget, Quantity, quantities
from engine.space.costs import DEFAULT_RESOLUTION, Convention, CostModel, cost_model
from engine.space.latency_table import LatencyTable, load_latency_table
from engine.space.structure import Structure

PAPER = SearchSettings()


@dataclass(frozen=True, kw_only=True)
class Evolve(LimitOptions):
    """Search the best structures within a budget, scoring candidates with generated weights."""

    run: Path = DEFAULT_RUN
    """Run directory of the PruningNet."""
    out: Path | None = None
    """Output folder (default: RUN/search-BUDGET)."""
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
    race: float | None = None
    """Stop structures early that are not among the best with this confidence, such as 0.95 (default: never)."""
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
    """Memory for activations: 2G, 500M, 25% of what is free, or auto (4%, on a GPU 25%); no score depends on it."""
    resume: bool = False
    """Continue an interrupted search; the result is that of an uninterrupted one."""
    overwrite: bool = False
    """Replace the search in the output folder."""
    profile: bool = False
    """Say where the time of the generations went, as a table and in profile.json; no CUDA graphs are made then."""


def main(options: Evolve) -> None:
    """Run the command."""
    console = Console(file=sys.stderr)
    run = open_run(options.run)
    out = options.out or options.run / options.folder()
    if options.resume and (out / directory.CONFIG).is_file():
        options = directory.resumed_options(options, out)
    settings = _settings(options)
    device = use_device(options.device, options.backend)
    memory = parse_memory(options.memory, device)
    costs = cost_model(run.space(options.divisor), options.flops_resolution, options.flops_convention).to(device)
    table = _latency_table(options, costs)
    known = quantities(costs, table.predict if table else None)
    pareto, limits = options.costs(known), options.limits(known)
    Console().print(feasibility(known, limits))
    budget = checked_budget(limits, costs.space, device)
    directory.check_output(out, options.resume, options.overwrite)
    ranks.begin(options, device)
    scoring = open_scoring(run, run.data(device), memory, ScoringSettings.of(vars(options)))
    if run.steps_left:
        console.print(f"note: this PruningNet is not finished; {run.steps_left} steps of its training are missing")

    scorer = shared_scorer(scoring)
    identity: Identity = {
        "pruningnet": scoring.key["pruningnet"],
        "splits": scoring.key["splits"],
        "budget": {name: limit.bounds for name, limit in limits.items()},
        "objectives": options.objectives.split(","),
        "latency_table": table.digest if table else None,
    }
    state = load_state(out, identity, device) if options.resume else None
    if not options.resume:
        directory.start_output(out, options, identity)
    cache = ScoreCache(run.folder, scoring.cache_key, len(scoring.images.subset))
    listed = quantities(costs.to("cpu"), table.to("cpu").predict if table else None)
    search = Search(settings, costs, listed, budget, pareto, options.race, run, scoring, cache, scorer, out, identity)
    state = state or initial_state(len(costs.space.genes), options.seed, device)
    run_all = _profiled if options.profile else run_generations
    state = run_all(search, state, console)

    structures = {"structure": scored_structure(search, best_genome(search, state))}
    structures["uniform"] = uniform_structure(search)
    for name, structure in structures.items():
        structure.save(out / f"{name}.json")
    _print_result(structures, known, budget, out)
    if table:
        found = {"best": structures["structure"], "uniform": structures["uniform"]}
        report_latencies(found, table, known["latency"], limits.get("latency"), out)
    if pareto:
        front = save_front(search, state)
        print(f"front of {len(front)} structures: {out / 'front.csv'}, {out / 'front.png'}")
    best = shlex.quote(str(out / "structure.json"))
    print(f"next: python -m engine.retrain --structure {best}{run_option(options.run)}")


def _profiled(search: Search, state: SearchState, console: Console) -> SearchState:
    """`run_generations`; then a table of where their time went, and the same in ``profile.json``."""
    first = state.generation
    with stages.recorded(search.scoring.device) as record:
        state = run_generations(search, state, console)
        seconds = {name: took for name, took in record.seconds().items() if took}
    generations = state.generation - first
    Console().print(stages.table(seconds, generations))
    content = {"device": search.scoring.device.type, "generations": generations, "seconds": seconds}
    write_atomically(search.out / "profile.json", json.dumps(content, indent=2) + "\n")
    return state


def assist(options: Evolve, next_work: Callable[[], Any], answer: Callable[[Any], None]) -> None:
    """What the other ranks do: score for rank 0."""
    device = use_device(options.device, options.backend)
    memory = parse_memory(options.memory, device)
    run = open_run(options.run)
    scoring = open_scoring(run, run.data(device), memory, ScoringSettings.of(vars(options)))
    serve(scoring, next_work, answer)


def _latency_table(options: Evolve, costs: CostModel) -> LatencyTable | None:
    """The table to search by, if one is given: of the images that MACs are counted at."""
    if options.latency_table is None:
        return None
    table = load_latency_table(options.latency_table, costs.space)
    if table.settings["resolution"] != costs.resolution:
        raise UserError(
            f"--latency-table {options.latency_table} is of {table.settings['resolution']} px images and MACs are "
            f"counted at {costs.resolution} px: give the side of deployment with --flops-resolution"
        )
    return table.to(costs.macs_form.device)


def _settings(options: Evolve) -> SearchSettings:
    settings = SearchSettings(**{field.name: getattr(options, field.name) for field in fields(SearchSettings)})
    least = {"population": 1, "parents": 1, "mutants": 0, "crossovers": 0, "generations": 1, "divisor": 1}
    require_at_least(options, {**least, "calibration_images": 1, "seed": 0})
    if settings.mutants + settings.crossovers > settings.population:
        raise UserError(
            f"--mutants {settings.mutants} and --crossovers {settings.crossovers} exceed "
            f"--population {settings.population}: lower them or raise it"
        )
    if not 0 <= settings.mutation_probability <= 1:
        raise UserError(f"--mutation-probability {settings.mutation_probability}: a number from 0 to 1")
    if options.race is not None and not 0.5 <= options.race < 1:
        raise UserError(f"--race {options.race}: a confidence from 0.5 to below 1, such as 0.95")
    if options.race is not None and options.objectives != "accuracy":
        raise UserError("--race compares accuracies alone: leave it out with several --objectives")
    return settings


def _print_result(structures: dict[str, Structure], known: dict[str, Quantity], budget: Budget, out: Path) -> None:
    table = Table(title=f"budget: {budget.show()}")
    for heading in ("", *(quantity.kind.heading for quantity in known.values()), "search score"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, structure in structures.items():
        score, genome_1G = structure.score or {}, torch.tensor([structure.genome], device=budget.device)
        table.add_row(
            {"structure": "best"}.get(name, name),
            *(quantity.kind.show(float(quantity.of(genome_1G))) for quantity in known.values()),
            f"{100 * score['correct'] / score['images']:.1f} %",
        )
    Console().print(table)
    for name in structures:
        print(f"{name}: {out / f'{name}.json'}")


if __name__ == "__main__":
    sys.exit(ranks.launch(lambda: run_command(main, Evolve), assist))
