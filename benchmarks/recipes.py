"""Which recipe of meta-training makes scores that rank structures best, at equal steps and at equal time.

    python benchmarks/recipes.py --out runs/recipes

Structures that no search has seen are trained from scratch, once: some evenly spread over all MACs, some of nearly
equal MACs. Then a PruningNet is trained with every recipe, several times, and scores them. A recipe whose steps take
longer than the paper's is trained once more for as many steps as fit into the time of the paper's.

Rank correlation (Kendall's τ-b) is between the scores on sub-validation images and the mean accuracies on test images.
The interval of a difference is a bootstrap over structures, which both recipes share; what other trainings of the
PruningNet would change shows in the values of the single seeds.

Writes recipes.json and recipes.md; what was trained before it was interrupted is not trained again (``--resume``).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from engine import population
from engine.correlation import CONFIDENCE, REPLICATES, Estimate, defined, kendall_tau
from engine.data import Data, open_data
from engine.errors import UserError
from engine.files import read_json, write_atomically
from engine.metatrain import Metatrain, recipe_of, training_of
from engine.pruningnet import PruningNet
from engine.random import random_integers, random_uniform, stream_key
from engine.repeated_training import train_repeatedly
from engine.run import directory
from engine.run.checkpoint import restore
from engine.run.command import Options, run_command, use_device
from engine.run.options import TrainingOptions, require_at_least
from engine.run.subjects import Subject
from engine.run.training import WEIGHTS, keep_freed_memory, train
from engine.sampling import sample
from engine.space import architecture
from engine.space.budget import Budget, parse_limit, quantities
from engine.space.costs import CostModel, cost_model
from engine.space.structure import make_structure
from engine.step_recipe import scale_to_macs

PLAIN = "plain"
RECIPES: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {},
    "structures 4": {"structures": 4},
    "sandwich": {"sandwich": True},
    "sandwich distill": {"sandwich": True, "distill": True},
    "sampling macs": {"sampling": "macs"},
    "ema 0.99": {"ema": 0.99},
    "momentum bfloat16": {"momentum": "bfloat16"},
    "weights shared": {"weights": "shared", "hidden": None},
}
# Steps that take this much longer than the paper's are worth a second training at equal time.
SLOWER = 1.1
# How many random structures are drawn for one that lies in the band.
DRAWN = 16


@dataclass(frozen=True, kw_only=True)
class Recipes(Options):
    """Train a PruningNet with every recipe, and compare how its scores rank structures trained from scratch."""

    out: Path
    """Output folder."""
    architecture: str = "mobilenet_v1"
    """Search space."""
    data: str = "digits-hard"
    """Images."""
    steps: int = 400
    """Steps of a PruningNet."""
    lr: float = 0.05
    """First learning rate of a PruningNet."""
    hidden: int = 8
    """Hidden size of its weight generators."""
    seeds: int = 2
    """PruningNets of every recipe: with --seed, and the seeds that follow it."""
    structures: int = 20
    """Structures trained from scratch, half of them in the band."""
    band: str = "10%:12%"
    """MACs of those."""
    trainings: int = 2
    """Trainings of every structure."""
    training_steps: int = 300
    """Steps of each of them."""
    calibration_images: int = 500
    """Images that calibrate BatchNorm before a structure is scored."""
    seed: int = 0
    """First seed of everything that is trained."""
    device: str = "auto"
    """auto, cpu or cuda."""
    resume: bool = False
    """Go on with what was interrupted."""
    overwrite: bool = False
    """Replace what is in the output folder."""


def main(options: Recipes) -> None:
    """Run the benchmark."""
    console = Console(file=sys.stderr)
    out = options.out
    directory.check_output(out, options.resume, options.overwrite)
    if options.resume:
        options = directory.resumed_options(options, out)
    counts = ("steps", "hidden", "seeds", "trainings", "training_steps", "calibration_images")
    require_at_least(options, {**dict.fromkeys(counts, 1), "structures": 4, "seed": 0})
    data = open_data(options.data, resolution=None, device=use_device(options.device, "auto"), seed=options.seed)
    keep_freed_memory()
    space = architecture(options.architecture).build(len(data.classes))
    costs = cost_model(space)
    genome_MG = held_out(costs, options.structures, options.band)
    if not options.resume:
        directory.start_output(out, options, {})

    accuracy_MK = accuracies(options, costs, genome_MG, data, console)
    rows: list[dict[str, Any]] = []
    numbers = range(options.seed, options.seed + options.seeds)
    for name in RECIPES:
        rows.append(
            row_of(name, "steps", [cell(options, name, options.steps, s, genome_MG, data, console) for s in numbers])
        )
        slower = rows[-1]["seconds_per_step"] / rows[0]["seconds_per_step"]
        if slower > SLOWER:
            steps = max(1, round(options.steps / slower))
            rows.append(
                row_of(name, "time", [cell(options, name, steps, s, genome_MG, data, console) for s in numbers])
            )
        report = compare(rows, costs.macs(genome_MG), accuracy_MK)
        write_atomically(out / "recipes.json", json.dumps(report, indent=1) + "\n")
        write_atomically(out / "recipes.md", table(report))
    print(table(report))
    print(f"report: {out / 'recipes.json'}")


# -- the structures ------------------------------------------------------------------------------------------------


def held_out(costs: CostModel, count: int, band: str) -> Tensor:
    """Structures ``[M, G]``: the first half evenly spread from the least to the most MACs, the others in ``band``.

    They are the same whatever the seed. Raises `UserError` if the band has too few.
    """
    space, spread = costs.space, count - count // 2
    macs, key = quantities(costs)["flops"], stream_key("held out")
    shape = (spread, len(space.genes))
    genome_MG = random_integers(stream_key(key, "genome"), space.choices, shape)
    share_M = (torch.arange(spread) + 0.5).double() / spread
    rounding_MG = random_uniform(stream_key(key, "rounding"), shape)
    spread_MG = scale_to_macs(costs, genome_MG, rounding_MG, macs.least + share_M * (macs.full - macs.least))
    budget = Budget(space, torch.device("cpu"), (parse_limit(band, macs, "--band").check(),))
    drawn_KG = sample(stream_key(key, "band"), DRAWN * count, budget).unique(dim=0)
    drawn_KG = drawn_KG[budget.fits(drawn_KG)]
    if len(drawn_KG) < count // 2:
        raise UserError(f"--band {band}: {len(drawn_KG)} structures were found in it, {count // 2} are needed")
    order = random_uniform(stream_key(key, "order"), (len(drawn_KG),)).argsort()
    return torch.cat([spread_MG, drawn_KG[order[: count // 2]]])


def accuracies(options: Recipes, costs: CostModel, genome_MG: Tensor, data: Data, console: Console) -> Tensor:
    """Test accuracies of the structures, trained from scratch with several seeds, ``[M, K]``."""
    subjects = []
    for number, genome_G in enumerate(genome_MG):
        structure = make_structure(
            costs, genome_G, data.preprocessing.resolution, preprocessing=data.preprocessing.to_dict(),
            splits=data.splits.digest,
        )  # fmt: skip
        subjects.append(Subject((f"structure-{number:02}",), structure))
        structure.save(options.out / "structures" / subjects[-1].name / "structure.json")
    plain = TrainingOptions(steps=options.training_steps, seed=options.seed)
    right_MKN = train_repeatedly(plain, options.trainings, subjects, options.out / "structures", data, console)
    return right_MKN.double().mean(2)


# -- a PruningNet ----------------------------------------------------------------------------------------------------


def cell(
    options: Recipes, name: str, steps: int, seed: int, genome_MG: Tensor, data: Data, console: Console
) -> dict[str, Any]:
    """Train one PruningNet and score the structures with it; what was done before is read again."""
    folder = options.out / f"{name.replace(' ', '-')}-{steps}-steps-seed-{seed}"
    path = folder / "scores.json"
    if path.exists():
        return read_json(path, "result of a recipe")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shared = {"architecture": options.architecture, "data": options.data, "hidden": options.hidden, "lr": options.lr}
    given = Metatrain(**{**shared, **RECIPES[name], "steps": steps, "seed": seed})
    given.check()
    space = architecture(options.architecture).build(len(data.classes))
    training = training_of(given, folder, space, data, recipe_of(given, data))
    console.print(f"{name}, {steps} steps, seed {seed}", highlight=False)
    seconds = [0.0]

    def stop_the_clock() -> dict[str, float]:
        seconds[0] = time.perf_counter() - began
        return {}

    began = time.perf_counter()
    training = dataclasses.replace(training, validate=stop_the_clock, validate_every=steps, checkpoint_minutes=1e6)
    checkpoint = train(training, console)
    net = PruningNet(space, given.hidden_size, device=data.device)
    restore(net, checkpoint.tensors(WEIGHTS), checkpoint.folder)
    scored = population.scoring_images(data, options.calibration_images)
    scores = population.score(net.requires_grad_(False), genome_MG.to(data.device), scored)
    content = {
        "seed": seed,
        "steps": steps,
        "seconds_per_step": seconds[0] / steps,
        "scores": (scores.correct / len(scored.subset)).tolist(),
    }
    write_atomically(path, json.dumps(content) + "\n")
    shutil.rmtree(training.checkpoints)
    return content


def row_of(name: str, equal: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All trainings of one recipe, as many steps each."""
    seconds = sum(run["seconds_per_step"] for run in runs) / len(runs)
    options = {option: value for option, value in RECIPES[name].items() if value is not None}
    steps = runs[0]["steps"]
    return {
        "recipe": name,
        "equal": equal,
        "options": options,
        "steps": steps,
        "seconds_per_step": seconds,
        "runs": runs,
    }


# -- what they say -----------------------------------------------------------------------------------------------------


def compare(rows: Sequence[Mapping[str, Any]], macs_M: Tensor, accuracy_MK: Tensor) -> dict[str, Any]:
    """Rank correlations of every row with the accuracies, and their differences from the first row's."""
    accuracy_M = accuracy_MK.mean(1)
    count = len(accuracy_M)
    groups = {"all": torch.arange(count), "band": torch.arange(count - count // 2, count)}
    found = []
    for row in rows:
        scores_RM = _scores(row)
        taus = {}
        for group, members in groups.items():
            own, plain = scores_RM[:, members], _scores(rows[0])[:, members]
            taus[group] = {
                "tau": [defined(tau) for tau in _taus(own, accuracy_M[members]).tolist()],
                "minus_plain": dataclasses.asdict(difference(own, plain, accuracy_M[members])),
            }
        found.append({**row, "mean_score": float(scores_RM.mean()), "kendall": taus})
    structures = [
        {"macs": macs, "accuracies": values} for macs, values in zip(macs_M.tolist(), accuracy_MK.tolist(), strict=True)
    ]
    of_macs = {g: defined(float(_taus(macs_M[None, m].double(), accuracy_M[m]))) for g, m in groups.items()}
    return {"schema": "metaprune.recipes/1", "structures": structures, "tau_of_macs": of_macs, "recipes": found}


def _scores(row: Mapping[str, Any]) -> Tensor:
    """Scores of a recipe's runs, float64 ``[R, M]``."""
    return torch.tensor([run["scores"] for run in row["runs"]], dtype=torch.float64)


def _taus(scores_RM: Tensor, accuracy_M: Tensor) -> Tensor:
    return kendall_tau(scores_RM, accuracy_M.expand_as(scores_RM))


def difference(scores_RM: Tensor, plain_RM: Tensor, accuracy_M: Tensor) -> Estimate:
    """Mean τ of some runs minus that of others, with a 95 % interval over structures drawn with replacement."""
    drawn_BM = random_integers(stream_key("recipes"), len(accuracy_M), (REPLICATES, len(accuracy_M)))
    whole_1M = torch.arange(len(accuracy_M))[None]

    def gain(rows_BM: Tensor) -> Tensor:
        accuracy_BM = accuracy_M[rows_BM]
        own, plain = (
            torch.stack([kendall_tau(run_M[rows_BM], accuracy_BM) for run_M in runs]).mean(0)
            for runs in (scores_RM, plain_RM)
        )
        return own - plain

    tail = (1 - CONFIDENCE) / 2
    replicates_B = gain(drawn_BM)
    low, high = (defined(float(replicates_B.nanquantile(quantile))) for quantile in (tail, 1 - tail))
    return Estimate(defined(float(gain(whole_1M))), low, high)


HEADINGS = (
    "recipe", "equal", "steps", "ms a step", "mean score", "τ, all", "minus plain", "τ, equal MACs", "minus plain",
)  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for row in report["recipes"]:
        cells = [row["recipe"], row["equal"], row["steps"], f"{1000 * row['seconds_per_step']:.0f}"]
        cells.append(f"{100 * row['mean_score']:.1f} %")
        for group in ("all", "band"):
            found = row["kendall"][group]
            cells.append(", ".join(_shown(tau) for tau in found["tau"]))
            value, low, high = (_shown(found["minus_plain"][name], "+") for name in ("value", "low", "high"))
            cells.append("" if row["recipe"] == PLAIN else f"{value} ({low} to {high})")
        lines.append(tuple(map(str, cells)))
    macs = report["tau_of_macs"]
    accuracy = [sum(s["accuracies"]) / len(s["accuracies"]) for s in report["structures"]]
    note = (
        f"{len(accuracy)} structures, {100 * min(accuracy):.1f} to {100 * max(accuracy):.1f} % right; MACs alone: τ "
        f"{_shown(macs['all'])} of all, {_shown(macs['band'])} of those of nearly equal MACs. τ of every seed; "
        "differences of means, with 95 % intervals over structures."
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def _shown(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.2f}"


if __name__ == "__main__":
    sys.exit(run_command(main, Recipes))
