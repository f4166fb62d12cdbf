"""Search the best structure within a budget, scoring candidates with generated weights.

    python -m engine.evolve --flops 300M

Needs a PruningNet from ``engine.metatrain``. Writes to its output folder

    structure.json    the best structure            uniform.json   the uniform one of equal MACs
    candidates.csv    everything that was scored    state.json     what resuming needs
"""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from engine import population
from engine.errors import UserError
from engine.evolution import Origin, SearchSettings, SearchState, ask, initial_state, ranking, tell
from engine.files import read_json, sha256_json, write_atomically
from engine.metatrain import DEFAULT_RUN
from engine.population import ScoringImages
from engine.pruningnet import PruningNet
from engine.run import directory
from engine.run.command import Interruption, Options, run_command, use_device
from engine.run.opened import PruningNetRun, open_run
from engine.run.options import require_at_least
from engine.run.scores import ScoreCache
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

STATE_SCHEMA = "metaprune.search/1"
PAPER = SearchSettings()


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
    resume: bool = False
    """Continue an interrupted search; the result is that of an uninterrupted one."""
    overwrite: bool = False
    """Replace the search in the output folder."""


def main(options: Evolve) -> None:
    """Run the command."""
    console = Console(file=sys.stderr)
    run = open_run(options.run)
    out = options.out or options.run / f"search-{options.flops.replace('%', 'pct')}"
    if options.resume and (out / directory.CONFIG).is_file():
        options = directory.resumed_options(options, out)
    settings = _settings(options)
    device = use_device(options.device, options.backend)
    costs = cost_model(run.space(), options.flops_resolution, options.flops_convention).to(device)
    budget = parse_budget(options.flops, costs)
    directory.check_output(out, options.resume, options.overwrite)
    data = run.data(device)
    images = population.scoring_images(data, options.calibration_images)
    keep_freed_memory()
    net = run.net(device)
    if run.steps_left:
        console.print(f"note: this PruningNet is not finished; {run.steps_left} steps of its training are missing")

    identity = {"pruningnet": run.digest, "splits": data.splits.digest, "budget": budget}
    if options.resume:
        state = load_state(out / "state.json", identity, len(costs.space.genes), device)
    else:
        directory.start_output(out, options, identity)
        state = initial_state(len(costs.space.genes), options.seed, device)
    scoring: dict[str, str | int] = {
        "calibration": len(images.calibration_NCHW),
        "device": device.type,
        "backend": options.backend,
    }
    cache = ScoreCache(run.folder, {"pruningnet": run.digest, "splits": data.splits.digest, **scoring})
    state = _search(state, settings, costs, budget, net, images, cache, out, identity, console)

    uniform = uniform_genome(costs, budget)
    best = state.genome_VG[ranking(state.correct, state.loss)[:1]]
    structures = {
        name: _structure(genome_1G, costs, run, images, cache, net, data.preprocessing.to_dict())
        for name, genome_1G in (("structure", best), ("uniform", uniform))
    }
    for name, structure in structures.items():
        structure.save(out / f"{name}.json")
    _print_result(structures, budget, out)


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


def _search(
    state: SearchState, settings: SearchSettings, costs: CostModel, budget: int, net: PruningNet,
    images: ScoringImages, cache: ScoreCache, out: Path, identity: dict[str, Any], console: Console,
) -> SearchState:  # fmt: skip
    """Ask, score, tell and save until all generations are done or the space has no new structure to offer."""
    with Interruption() as interruption, _progress(console) as progress:
        task = progress.add_task("", total=settings.generations * settings.population, status="", speed="")
        progress.update(task, completed=state.generation * settings.population)
        while state.generation < settings.generations:
            state = ask(state, settings, costs, budget)
            pending, began = state.pending, time.monotonic()
            if not len(pending):
                console.print("note: every structure within the budget has been scored")
                break
            scored = 0
            for count in cache.score_missing(net, pending, images):
                scored += count
                progress.update(task, advance=count, speed=f"{scored / (time.monotonic() - began):.2f}")
                interruption.stop_if_asked()
            state = tell(state, *cache.lookup(pending))
            progress.update(task, completed=state.generation * settings.population)
            _save(state, costs, images, out, identity)
            best, median = _best_and_median(state, len(pending))
            progress.console.print(
                f"generation {state.generation}/{settings.generations}  best {100 * best / len(images.subset):.1f} %  "
                f"median {100 * median / len(images.subset):.1f} %  "
                f"{scored / max(time.monotonic() - began, 1e-9):.2f} candidates/s ({len(pending) - scored} from cache)",
                highlight=False,
            )
            interruption.stop_if_asked()
    return state


def _best_and_median(state: SearchState, last: int) -> tuple[int, float]:
    """Correct images of the best structure so far, and the median of the last generation."""
    best = state.correct[ranking(state.correct, state.loss)[0]]
    return int(best), float(state.correct[-last:].double().quantile(0.5))


def _save(state: SearchState, costs: CostModel, images: ScoringImages, out: Path, identity: dict[str, Any]) -> None:
    """Write ``candidates.csv`` and ``state.json``: the search can go on from here."""
    columns = {
        "generation": state.generation_V.tolist(),
        "origin": [Origin(origin).name.lower() for origin in state.origin_V.tolist()],
        "correct": state.correct.tolist(),
        "images": [len(images.subset)] * len(state.correct),
        "loss": state.loss.tolist(),
        "macs": costs.macs(state.genome_VG).tolist(),
        "parameters": costs.parameters(state.genome_VG).tolist(),
        "peak_activation_bytes": costs.peak_activation_bytes(state.genome_VG).tolist(),
        "genome": [" ".join(map(str, row)) for row in state.genome_VG.tolist()],
    }
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomically(out / "candidates.csv", table.getvalue())
    content = {
        "schema": STATE_SCHEMA,
        **identity,
        "seed": state.seed,
        "generation": state.generation,
        "genomes": state.genome_VG.tolist(),
        "origins": state.origin_V.tolist(),
        "generations": state.generation_V.tolist(),
        "correct": state.correct.tolist(),
        "loss": state.loss.tolist(),
    }
    write_atomically(out / "state.json", json.dumps({**content, "digest": sha256_json(content)}) + "\n")


def load_state(path: Path, identity: dict[str, Any], genes: int, device: torch.device) -> SearchState:
    """Read and verify ``state.json``; a search stopped before its first generation has none and starts anew."""
    if not path.exists():
        seed = directory.read_config(path.parent)["options"]["seed"]
        return initial_state(genes, seed, device)
    content = read_json(path, "search state")
    digest = content.pop("digest", None)
    if content.get("schema") != STATE_SCHEMA or digest != sha256_json(content):
        raise UserError(f"{path} is damaged or of another version: start the search anew with --overwrite")
    for name, value in identity.items():
        if content[name] != value:
            raise UserError(f"{path} is of another {name}: start the search anew with --overwrite")
    integers = {name: torch.tensor(content[name], device=device) for name in ("origins", "generations", "correct")}
    return SearchState(
        seed=content["seed"],
        generation=content["generation"],
        genome_VG=torch.tensor(content["genomes"], device=device),
        origin_V=integers["origins"],
        generation_V=integers["generations"],
        correct=integers["correct"],
        loss=torch.tensor(content["loss"], dtype=torch.float64, device=device),
    )


def _structure(
    genome_1G: Tensor, costs: CostModel, run: PruningNetRun, images: ScoringImages, cache: ScoreCache,
    net: PruningNet, preprocessing: dict[str, Any],
) -> Structure:  # fmt: skip
    for _ in cache.score_missing(net, genome_1G, images):
        pass
    correct, loss = cache.lookup(genome_1G)
    score = {
        "correct": int(correct),
        "images": len(images.subset),
        "loss": float(loss),
        "split": images.subset.name,
        "calibration_images": len(images.calibration_NCHW),
        "method": "top-1 with generated weights, BatchNorm calibrated for the structure; no fine-tuning",
    }
    return make_structure(
        costs, genome_1G[0], images.preprocessing.resolution, score=score, preprocessing=preprocessing,
        pruningnet=run.digest, splits=run.checkpoint.manifest["splits"],
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
    print(f"next: python -m engine.retrain --structure {out / 'structure.json'}")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("candidate"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[speed]} candidates/s"),
        TextColumn("time left"), TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, Evolve))
