"""The command lines behind a search, and those to run next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from engine.evolve import Evolve
from engine.metatrain import Metatrain, run_option
from engine.reporting.content import genomes
from engine.reporting.text import command
from engine.retrain import Retrain
from engine.run.directory import CONFIG, read_config
from engine.run.searched import Search
from engine.run.trained import Trained

TRAINING = ("epochs", "steps", "batch", "lr", "weight_decay", "seed")


def run_of(search: Search) -> Path | None:
    """The run directory of a search's PruningNet: the folder it lies in, else the one it was given, if still there."""
    given = search.options.get("run")
    folders = [search.folder.parent if search.folder.name else search.folder.absolute().parent]
    folders += [Path(given)] if isinstance(given, str) else []
    return next(
        (folder for folder in folders if (folder / CONFIG).is_file() and (folder / "splits.json").is_file()), None
    )


def made_by(search: Search, run: Path | None, trained: Sequence[Trained]) -> list[str]:
    """The commands that led here: PruningNet, search, and the trainings from scratch of what the report compares."""
    lines = []
    if run is not None:
        lines.append(command("engine.metatrain", Metatrain, read_config(run)["options"], out=run))
    lines.append(command("engine.evolve", Evolve, search.options, out=search.folder))
    compared = genomes(search).values()
    for network in trained:
        if network.structure.genome in compared:
            lines.append(command("engine.retrain", Retrain, network.options, out=network.folder))
    return lines


def to_run_next(search: Search, run: Path | None, trained: Sequence[Trained]) -> list[tuple[str, str]]:
    """What is still missing, as (why, command): trainings from scratch, by the recipe of those that are there."""
    option = run_option(run) if run is not None else ""
    done = {network.structure.genome for network in trained}
    recipe = _recipe(trained, search)
    found = shlex.quote(str(search.folder / "structure.json"))
    steps = []
    if search.structure.genome not in done:
        why = "Train the winner from scratch and measure it on the test images"
        steps.append((why, f"python -m engine.retrain --structure {found}{option}{recipe}"))
    if search.uniform is not None and search.uniform.genome not in done:
        why = "Train the uniform structure the same way: the baseline the winner must beat"
        steps.append((why, f"python -m engine.retrain {_uniform(search)}{option}{recipe}"))
    if genomes(search)["full"] not in done:
        why = "Train the full network: what pruning gave up"
        steps.append((why, f"python -m engine.retrain --full{option}{recipe}"))
    steps.append(("Look at the winner in the terminal", f"python -m engine.inspect {found}"))
    return steps


def _uniform(search: Search) -> str:
    """The options that train exactly the uniform structure of this search."""
    uniform = search.folder / "uniform.json"
    return shlex.join(["--structure", str(uniform), "--out", str(search.folder / "uniform-retrained")])


def _recipe(trained: Sequence[Trained], search: Search) -> str:
    """The training options of the winner's training, else of any other training shown, to train alike."""
    compared = genomes(search).values()
    known = [network for genome in compared for network in trained if network.structure.genome == genome]
    if not known:
        return ""
    options = {name: value for name, value in known[0].options.items() if name in TRAINING}
    line = command("engine.retrain", Retrain, options).removeprefix("python -m engine.retrain")
    return line.rstrip()
