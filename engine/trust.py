"""How far the scores of a search can be trusted: train structures from scratch, and compare.

    python -m engine.trust --search runs/mobilenet_v1-digits-hard/search-300M

Trains the chosen structure, others from all over the scores of the search, the uniform one and the winner of a random
search of equal cost, each for several seeds with the recipe of ``engine.retrain``, and measures them on the test split.
Writes to its output folder

    trust.json trust.csv    scores, accuracies, rank correlations, regret
    STRUCTURE/              structure.json, and seed-N/result.json of every training
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from engine import population
from engine.data import Data
from engine.errors import UserError
from engine.evolve import DTYPES
from engine.files import sha256_json
from engine.memory import parse_memory
from engine.repeated_training import train_repeatedly
from engine.retrain import from_scratch
from engine.run import directory
from engine.run.command import Interruption, run_command, use_device
from engine.run.finished_search import FinishedSearch, open_search
from engine.run.opened import PruningNetRun, open_run
from engine.run.options import TrainingOptions, require_at_least
from engine.run.scores import ScoreCache
from engine.run.subjects import choose_subjects
from engine.run.training import Training, keep_freed_memory
from engine.run.trust_report import print_report, trust_report, write_report


@dataclass(frozen=True, kw_only=True)
class Trust(TrainingOptions):
    """Train structures of a search from scratch, and compare their accuracies with its scores."""

    search: Path
    """Output folder of a finished search."""
    run: Path | None = None
    """Run directory of its PruningNet (default: the folder the search lies in)."""
    structures: int = 8
    """Structures to train from what the search scored: its best, its median, and others across the scores."""
    seeds: int = 3
    """Trainings of each structure: with --seed, and the seeds that follow it."""
    out: Path | None = None
    """Output folder (default: trust, in the folder of the search)."""
    memory: str = "auto"
    """Memory for activations when random structures are scored: 2G, 500M, 25% of what is free, or auto."""


def main(options: Trust) -> None:
    """Run the command."""
    console = Console(file=sys.stderr)
    out = options.out or options.search / "trust"
    directory.check_output(out, options.resume, options.overwrite)
    if options.resume:
        options = directory.resumed_options(options, out)
    options.check()
    require_at_least(options, {"structures": 1, "seeds": 1})
    run = open_run(options.run or options.search.parent)
    search = open_search(options.search, run)
    device = use_device(options.device, search.scoring.backend)
    memory = parse_memory(options.memory, device)
    dtype = _dtype(search)
    data = run.data(device)
    keep_freed_memory()
    training = from_scratch(options, search.best, out, data)
    training.check_disk_space()
    identity = _identity(search, run, training)
    if options.resume:
        _check_identity(identity, out)
    else:
        directory.start_output(out, options, {"identity": identity})

    subjects = choose_subjects(
        search, options.structures, options.seed,
        lambda genome_PG: score_as_searched(search, run, data, genome_PG, dtype, memory, console),
    )  # fmt: skip
    for subject in subjects:
        subject.structure.save(out / subject.name / "structure.json")
    right_MKN = train_repeatedly(options, options.seeds, subjects, out, data, console)
    test = data.subset("test").indices
    report = trust_report(subjects, right_MKN, torch.tensor(data.groups)[test] if data.groups else test, identity)
    write_report(report, out)
    print_report(report, Console())
    print(f"report: {out / 'trust.json'}")


def _identity(search: FinishedSearch, run: PruningNetRun, training: Training) -> dict[str, Any]:
    """What the report is of: a resumed command must find the same."""
    return {
        "candidates": search.digest,
        "scored": search.candidates,
        "pruningnet": run.digest,
        "splits": training.data.splits.digest,
        "recipe": sha256_json([dataclasses.asdict(training.recipe), training.steps]),
        "steps": training.steps,
    }


def _check_identity(identity: dict[str, Any], out: Path) -> None:
    stored = directory.read_config(out)["resolved"].get("identity")
    for name, value in identity.items():
        if not isinstance(stored, dict) or stored.get(name) != value:
            raise UserError(f"{out} is of another {name}: restore what it was, or start anew with --overwrite")


def _dtype(search: FinishedSearch) -> torch.dtype:
    """What weights and activations were when structures were scored."""
    for name, dtype in DTYPES.items():
        if name == search.scoring.precision:
            return dtype
    raise UserError(f"{search.folder} was scored in precision {search.scoring.precision!r}: choose {', '.join(DTYPES)}")


def score_as_searched(
    search: FinishedSearch,
    run: PruningNetRun,
    data: Data,
    genome_PG: Tensor,
    dtype: torch.dtype,
    memory: int,
    console: Console,
) -> tuple[Tensor, Tensor]:
    """Correct images and loss of genomes, on the CPU, by the PruningNet and settings of a search.

    What was scored before comes from the run's cache, which also keeps what a signal interrupts. Raises `UserError`
    if the search was not scored on these images.
    """
    scoring, genome_PG = search.scoring, genome_PG.to(data.device)
    images = population.scoring_images(data, scoring.calibration_images)
    if len(images.subset) != search.images:
        raise UserError(f"{search.folder} scored on {search.images} images, {run.folder} has {len(images.subset)}")
    key: dict[str, str | int] = {
        "pruningnet": run.digest, "splits": data.splits.digest, "calibration": len(images.calibration_NCHW),
        "precision": scoring.precision, "device": data.device.type, "backend": scoring.backend,
    }  # fmt: skip
    net, cache = run.net(data.device).to_precision(dtype), ScoreCache(run.folder, key)
    with Interruption() as interruption, _progress(console) as progress:
        task = progress.add_task("random candidate", total=len(genome_PG))
        for count in cache.score_missing(net, genome_PG, images, memory):
            progress.update(task, advance=count)
            interruption.stop_if_asked()
    correct, loss = cache.lookup(genome_PG)
    return correct.cpu(), loss.cpu()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TextColumn("time left"),
        TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, Trust))
