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

from engine.errors import UserError
from engine.files import sha256_file, sha256_json
from engine.memory import parse_memory
from engine.repeated_training import train_repeatedly
from engine.retrain import from_scratch
from engine.run import directory
from engine.run.command import Interruption, run_command, use_device
from engine.run.opened import PruningNetRun, open_run
from engine.run.options import TrainingOptions, require_at_least
from engine.run.scores import ScoreCache
from engine.run.scoring import Scoring, Settings, open_scoring
from engine.run.searched import CANDIDATES, Search, load_search
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
    search = _open_search(options.search, run)
    settings = Settings.of(search.options)
    device = use_device(options.device, settings.backend)
    memory = parse_memory(options.memory, device)
    data = run.data(device, options.cache)
    keep_freed_memory()
    training = from_scratch(options, search.structure, out, data)
    training.check_disk_space()
    identity = _identity(search, run, training)
    if options.resume:
        _check_identity(identity, out)
    else:
        directory.start_output(out, options, {"identity": identity})

    subjects = choose_subjects(
        search, options.structures, options.seed,
        lambda genome_PG: _score(open_scoring(run, data, memory, settings), run.folder, genome_PG, console),
    )  # fmt: skip
    for subject in subjects:
        subject.structure.save(out / subject.name / "structure.json")
    right_MKN = train_repeatedly(options, options.seeds, subjects, out, data, console)
    test = data.subset("test").indices
    report = trust_report(subjects, right_MKN, torch.tensor(data.groups)[test] if data.groups else test, identity)
    write_report(report, out)
    print_report(report, Console())
    print(f"report: {out / 'trust.json'}")


def _open_search(folder: Path, run: PruningNetRun) -> Search:
    """The finished search in a folder, made with the PruningNet of this run."""
    search = load_search(folder)
    if search.structure.pruningnet != run.digest:
        raise UserError(f"{folder} was searched with another PruningNet than {run.folder} holds: give its --run")
    return search


def _identity(search: Search, run: PruningNetRun, training: Training) -> dict[str, Any]:
    """What the report is of: a resumed command must find the same."""
    return {
        "candidates": sha256_file(search.folder / CANDIDATES),
        "scored": len(search.candidates),
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


def _score(scoring: Scoring, folder: Path, genome_PG: Tensor, console: Console) -> tuple[Tensor, Tensor]:
    """Correct images and loss of genomes, on the CPU, as a search with this scoring would have them.

    What was scored before comes from the run's cache, which also keeps what a signal interrupts.
    """
    genome_PG = genome_PG.to(scoring.device)
    cache = ScoreCache(folder, scoring.cache_key, len(scoring.images.subset))
    with Interruption() as interruption, _progress(console) as progress:
        task = progress.add_task("random candidate", total=len(genome_PG))
        for count in cache.score_missing(scoring.score, genome_PG):
            progress.update(task, advance=count)
            interruption.stop_if_asked()
    correct, loss, _ = cache.lookup(genome_PG)
    return correct.cpu(), loss.cpu()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TextColumn("time left"),
        TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, Trust))
