"""A finished search, opened and verified: what it scored, how, and within which limits."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.evolution import draw, ranking, shrink_to_budget
from engine.files import sha256_file
from engine.random import random_uniform, stream_key
from engine.run.directory import CONFIG, read_config
from engine.run.opened import PruningNetRun
from engine.space.costs import CostModel, cost_model
from engine.space.structure import Structure, load_structure

CANDIDATES = "candidates.csv"
# Genomes drawn per genome wanted and round; the last rounds scale what exceeds the budget down.
OVERSAMPLING = 8
ROUNDS, SHRINKING_ROUNDS = 32, 8


@dataclass(frozen=True)
class Scoring:
    """How a search scored: options of its command."""

    calibration_images: int
    precision: str
    backend: str


@dataclass(frozen=True)
class FinishedSearch:
    """What a search leaves behind.

    ``genome_VG`` int64, ``correct_V`` int64 and ``loss_V`` float64 are of the candidates that were scored on all
    ``images`` images; ``candidates`` counts all of them, also those a race stopped early. ``limits`` are least and
    greatest values, inclusive, by name of the cost. ``digest`` is the SHA-256 of ``candidates.csv``.
    """

    folder: Path
    scoring: Scoring
    costs: CostModel
    limits: dict[str, tuple[int, int]]
    best: Structure
    uniform: Structure
    candidates: int
    images: int
    genome_VG: Tensor
    correct_V: Tensor
    loss_V: Tensor
    digest: str


def open_search(folder: Path, run: PruningNetRun) -> FinishedSearch:
    """Open the output folder of ``engine.evolve``.

    Raises `UserError` if the search is not finished, a file is damaged, or it was made with another PruningNet.
    """
    for name in (CONFIG, CANDIDATES, "structure.json", "uniform.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} is no finished search, for it has no {name}: "
                "let python -m engine.evolve finish there, or give another --search"
            )
    config = read_config(folder)
    best, uniform = (load_structure(folder / f"{name}.json") for name in ("structure", "uniform"))
    for structure in (best, uniform):
        if (structure.pruningnet, structure.architecture) != (run.digest, run.space().architecture):
            raise UserError(f"{folder} was searched with another PruningNet than {run.folder} holds: give its --run")
    costs = cost_model(best.space, best.flops_resolution, best.flops_convention)
    rows = _rows(folder / CANDIDATES, costs)
    images = max(row[2] for row in rows)
    whole = [row for row in rows if row[2] == images]
    for structure in (best, uniform):
        if (structure.score or {}).get("images") != images:
            raise UserError(f"{folder}: its structures were not scored on the {images} images of its candidates")
    return FinishedSearch(
        folder=folder,
        scoring=_scoring(folder, config["options"]),
        costs=costs,
        limits=_limits(folder, config["resolved"].get("budget")),
        best=best,
        uniform=uniform,
        candidates=len(rows),
        images=images,
        genome_VG=torch.tensor([row[0] for row in whole]),
        correct_V=torch.tensor([row[1] for row in whole]),
        loss_V=torch.tensor([row[3] for row in whole], dtype=torch.float64),
        digest=sha256_file(folder / CANDIDATES),
    )


def _scoring(folder: Path, options: Mapping[str, Any]) -> Scoring:
    scoring = Scoring(**{field.name: options.get(field.name) for field in fields(Scoring)})  # type: ignore[arg-type]
    images, words = scoring.calibration_images, (scoring.precision, scoring.backend)
    if type(images) is not int or images < 1 or not all(isinstance(word, str) for word in words):
        raise UserError(f"{folder / CONFIG} is damaged: it does not say how candidates were scored")
    return scoring


def _rows(path: Path, costs: CostModel) -> list[tuple[list[int], int, int, float]]:
    """Genome, correct, images and loss of every candidate. Raises `UserError` for a table that cannot be."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        rows = [
            ([int(c) for c in row["genome"].split()], int(row["correct"]), int(row["images"]), float(row["loss"]))
            for row in table
        ]
        genome_VG = costs.space.check_genome(torch.tensor([row[0] for row in rows], dtype=torch.int64))
        if costs.macs(genome_VG).tolist() != [int(row["macs"]) for row in table]:
            raise ValueError("the MACs are not those of the genomes")
        if not all(0 <= correct <= images and images > 0 for _, correct, images, _ in rows):
            raise ValueError("a count of correct images is out of range")
        if any(math.isinf(loss) for *_, loss in rows):
            raise ValueError("a loss is infinite")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, csv.Error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}): restore it, or search anew with --overwrite") from None
    return rows


def _limits(folder: Path, budget: Any) -> dict[str, tuple[int, int]]:
    """Least and greatest value of every cost that the search limited."""
    tables = {"flops": {"high": budget}} if isinstance(budget, int) else budget
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"{folder / CONFIG} is damaged: it names no budget")
    limits = {}
    for name, table in tables.items():
        if name not in COSTS:
            raise UserError(f"{folder}: random search within a budget of {name} is not supported, only {sorted(COSTS)}")
        low, high = (table.get("low", 0), table.get("high")) if isinstance(table, dict) else (None, None)
        if type(low) is not int or type(high) is not int:
            raise UserError(f"{folder / CONFIG} is damaged: the budget of {name} is {table!r}")
        limits[name] = (low, high)
    return limits


COSTS = {
    "flops": CostModel.macs,
    "params": CostModel.parameters,
    "memory_peak": CostModel.peak_activation_bytes,
}


def spread(search: FinishedSearch, count: int, seed: int) -> list[Tensor]:
    """Pick ``count`` different candidates ``[G]`` from all over what the search scored, its best one left out.

    The first is the median. The range of scores is cut into equal parts, one for each of the others, which is the
    candidate closest to a random score in its part: a search scores most of its candidates close to the best, and
    picks of equal probability would say little about the rest.
    """
    order = ranking(search.correct_V, search.loss_V)
    order = order[~search.loss_V[order].isnan()]
    if not len(order):
        return []
    score = search.correct_V[order].double()
    targets = score.quantile(0.5)[None]
    if count > 1:
        part = torch.arange(count - 1) + random_uniform(stream_key("trust", "spread", seed), (count - 1,)).double()
        targets = torch.cat([targets, score[-1] + (score[0] - score[-1]) * part.flip(0) / (count - 1)])
    genome_VG = search.genome_VG[order]
    free = (genome_VG != torch.tensor(search.best.genome)).any(1)
    picked = []
    for target in targets[: min(count, int(free.sum()))]:
        nearest = int((score - target).abs().masked_fill(~free, torch.inf).argmin())
        picked.append(genome_VG[nearest])
        free[nearest] = False
    return picked


def random_genomes(search: FinishedSearch, seed: int) -> Tensor:
    """As many different random genomes within the same limits as the search scored, ``[V, G]``.

    Every gene is uniform over its choices, as in a random search. Where too few of those are within the limits, the
    rest are scaled down until they meet the budget in MACs, as `engine.evolution.ask` does. Fewer come back where
    the limits leave fewer.
    """
    costs, wanted = search.costs, search.candidates
    found: dict[tuple[int, ...], None] = {}
    for round_number in range(ROUNDS + SHRINKING_ROUNDS):
        genome_KG = draw(stream_key("trust", "random", seed, round_number), wanted * OVERSAMPLING, costs)
        if round_number >= ROUNDS and "flops" in search.limits:
            genome_KG = shrink_to_budget(genome_KG, costs, search.limits["flops"][1])
        for name, (low, high) in search.limits.items():
            cost_K = COSTS[name](costs, genome_KG)
            genome_KG = genome_KG[(low <= cost_K) & (cost_K <= high)]
        found.update(dict.fromkeys(map(tuple, genome_KG.tolist())))
        if len(found) >= wanted:
            break
    return torch.tensor(list(found)[:wanted], dtype=torch.int64).reshape(-1, len(costs.space.genes))
