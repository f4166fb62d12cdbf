"""A finished search, opened to be read: every file verified against the others and recounted.

SEARCH/config.toml          options and budgets      SEARCH/state.json       what the search knew, by its digest
SEARCH/structure.json       the best structure       SEARCH/candidates.csv   every structure scored, in order
SEARCH/uniform.json         the uniform structure    SEARCH/front.csv        the Pareto front, where one was asked for

Shape suffixes: V structures in a table, G genes.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.evolution import Origin
from engine.files import read_sealed
from engine.run.directory import CONFIG, read_config
from engine.run.search_state import COST_COLUMNS, SCHEMA, STATE
from engine.space.costs import CostModel, cost_model
from engine.space.structure import Structure, load_structure

CANDIDATES, FRONT = "candidates.csv", "front.csv"
LATENCY = COST_COLUMNS["latency"]
SCORE = ("correct", "images", "loss", *(column for column in COST_COLUMNS.values() if column != LATENCY))
ORIGINS = tuple(origin.name.lower() for origin in Origin)
FRONT_FILE = re.compile(r"(front/)?\d{3,9}\.json")


@dataclass(frozen=True)
class Scored:
    """Structures with their scores and costs, one a row.

    ``correct`` of ``images`` were right, int64 ``[V]``; ``loss`` is float64 ``[V]``, NaN where scoring failed;
    ``macs``, ``parameters`` and ``peak_activation_bytes`` are int64 ``[V]``; ``latency_ms`` is float64 ``[V]`` or None.
    """

    genome_VG: Tensor
    correct: Tensor
    images: Tensor
    loss: Tensor
    macs: Tensor
    parameters: Tensor
    peak_activation_bytes: Tensor
    latency_ms: Tensor | None

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> Tensor:
        """Share of the images that were right, float64 ``[V]``; NaN where scoring failed."""
        return (self.correct.double() / self.images).where(~self.loss.isnan(), torch.nan)

    def row_of(self, genome: Sequence[int]) -> int | None:
        """The first row with this genome, or None."""
        found = (self.genome_VG == torch.tensor(genome)).all(1).nonzero()
        return int(found[0]) if len(found) else None


@dataclass(frozen=True)
class Candidates(Scored):
    """Everything a search scored: ``generation_V`` counts from 0, ``parents`` are earlier rows."""

    generation_V: Tensor
    origin: tuple[str, ...]
    parents: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Front(Scored):
    """The structures of a Pareto search that no other beats in every objective, and the file of each."""

    file: tuple[str, ...]


@dataclass(frozen=True)
class Bounds:
    """Of one cost, in MACs, parameters, bytes or milliseconds; None where there is none."""

    name: str
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Search:
    """A finished search. ``row`` is that of its ``structure`` among the ``candidates``.

    ``latency_table`` is the digest of the table it searched by, if any.
    """

    folder: Path
    options: dict[str, Any]
    budgets: tuple[Bounds, ...]
    objectives: tuple[str, ...]
    costs: CostModel
    structure: Structure
    uniform: Structure | None
    candidates: Candidates
    row: int
    front: Front | None
    state_digest: str
    latency_table: str | None


def is_search(folder: Path) -> bool:
    """Whether a folder holds a search, finished or not."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (CANDIDATES, STATE))


def is_finished(folder: Path) -> bool:
    """Whether the search in a folder has written its result."""
    return (folder / "structure.json").is_file()


def load_search(folder: Path) -> Search:
    """Read and verify a finished search.

    Raises `UserError` if it is not finished, a file is missing or damaged, or the files contradict each other.
    """
    if not is_search(folder):
        raise UserError(f"there is no search in {folder}: search with python -m engine.evolve, or give its folder")
    if not is_finished(folder):
        raise UserError(f"the search in {folder} is not finished: continue it with python -m engine.evolve --resume")
    config, state = read_config(folder), read_sealed(folder / STATE, "search state", SCHEMA, "search again")
    structure = load_structure(folder / "structure.json")
    costs = cost_model(structure.space, structure.flops_resolution, structure.flops_convention)
    candidates = _read_candidates(folder / CANDIDATES, costs)
    row = candidates.row_of(structure.genome)
    if row is None:
        raise UserError(f"{folder / 'structure.json'} is not among the candidates of its search: search again")
    uniform = load_structure(folder / "uniform.json") if (folder / "uniform.json").is_file() else None
    for name, written in (("structure", structure), ("uniform", uniform)):
        _check_score(folder / f"{name}.json", written, structure)
    score = structure.score or {}
    if int(candidates.images[row]) == score["images"] and int(candidates.correct[row]) != score["correct"]:
        raise UserError(f"{folder / 'structure.json'} has another score than {CANDIDATES} beside it: search again")
    if any(config["resolved"].get(name) != getattr(structure, name) for name in ("pruningnet", "splits")):
        raise UserError(f"{folder / CONFIG} is of another search than structure.json beside it")
    return Search(
        folder=folder,
        options=config["options"],
        budgets=_budgets(folder / CONFIG, config["resolved"]),
        objectives=_objectives(folder / CONFIG, config["resolved"]),
        costs=costs,
        structure=structure,
        uniform=uniform,
        candidates=candidates,
        row=row,
        front=_read_front(folder / FRONT, costs) if (folder / FRONT).is_file() else None,
        state_digest=state["digest"],
        latency_table=config["resolved"].get("latency_table"),
    )


def _check_score(path: Path, structure: Structure | None, found: Structure) -> None:
    if structure is None:
        return
    identity = ("architecture", "classes", "flops_resolution", "flops_convention", "pruningnet", "splits")
    if any(getattr(structure, name) != getattr(found, name) for name in identity):
        raise UserError(f"{path} is of another search than structure.json beside it")
    score = structure.score or {}
    correct, images = score.get("correct"), score.get("images")
    if type(correct) is not int or type(images) is not int or not 0 <= correct <= images or images < 1:
        raise UserError(f"{path} has no score: search again")


def _budgets(path: Path, resolved: dict[str, Any]) -> tuple[Bounds, ...]:
    tables = resolved.get("budget", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise UserError(f"{path}: its budget is not written as this version does: search again")
    for name, table in tables.items():
        bounds = [table[key] for key in ("low", "high") if key in table]
        if name not in COST_COLUMNS or not all(type(n) in (int, float) and 0 <= n < math.inf for n in bounds):
            raise UserError(f"{path}: {name!r} is no budget; known are {', '.join(COST_COLUMNS)}")
    return tuple(Bounds(name, table.get("low"), table.get("high")) for name, table in tables.items())


def _objectives(path: Path, resolved: dict[str, Any]) -> tuple[str, ...]:
    objectives = resolved.get("objectives", [])
    if not isinstance(objectives, list) or not all(isinstance(name, str) for name in objectives):
        raise UserError(f"{path} is damaged: objectives must be a list of names")
    return tuple(objectives)


def _read_candidates(path: Path, costs: CostModel) -> Candidates:
    rows = _read_rows(path, ("generation", "origin", "parents", *SCORE))
    try:
        generations = [int(row["generation"]) for row in rows]
        parents = tuple(tuple(int(number) for number in row["parents"].split()) for row in rows)
        steps = [later - earlier for earlier, later in itertools.pairwise(generations)]
        if generations[:1] != [0] or not set(steps) <= {0, 1}:
            raise ValueError("generations must follow one another")
        for number, (row, own) in enumerate(zip(rows, parents, strict=True)):
            if row["origin"] not in ORIGINS or bool(own) != (row["origin"] != "random"):
                raise ValueError(f"row {number} is {row['origin']!r} of {len(own)} parents")
            if any(not 0 <= p < number or generations[p] >= generations[number] for p in own):
                raise ValueError(f"row {number} has a parent that is not older")
        return Candidates(
            **_scored(rows, costs),
            generation_V=torch.tensor(generations),
            origin=tuple(row["origin"] for row in rows),
            parents=parents,
        )
    except (ValueError, OverflowError, RuntimeError) as error:
        raise _damaged(path, error) from None


def _read_front(path: Path, costs: CostModel) -> Front:
    rows = _read_rows(path, ("file", *SCORE))
    files = tuple(row["file"] for row in rows)
    try:
        if not all(FRONT_FILE.fullmatch(name) for name in files):
            raise ValueError("the files of a front are called 001.json, 002.json, …")
        return Front(**_scored(rows, costs), file=files)
    except (ValueError, OverflowError, RuntimeError) as error:
        raise _damaged(path, error) from None


def _read_rows(path: Path, leading: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table whose columns are ``leading``, perhaps a latency, and the genome."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file, strict=True)
        if header not in ([*leading, "genome"], [*leading, LATENCY, "genome"]):
            raise ValueError(f"its columns must be {', '.join(leading)}, perhaps {LATENCY}, and genome")
        if not lines:
            raise ValueError("it has no row")
        return [dict(zip(header, line, strict=True)) for line in lines]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise _damaged(path, error) from None


def _scored(rows: list[dict[str, str]], costs: CostModel) -> dict[str, Any]:
    """The columns every table has, checked: costs are those of the genomes, and no more is right than was shown."""
    genomes = [[int(choice) for choice in row["genome"].split()] for row in rows]
    genome_VG = costs.space.check_genome(torch.tensor(genomes, dtype=torch.int64))
    counts = {name: torch.tensor([int(row[name]) for row in rows]) for name in SCORE if name != "loss"}
    for name in ("macs", "parameters", "peak_activation_bytes"):
        wrong = (counts[name] != getattr(costs, name)(genome_VG)).nonzero()
        if len(wrong):
            raise ValueError(f"row {int(wrong[0])}: its genome has other {name}")
    if not bool(((counts["correct"] >= 0) & (counts["correct"] <= counts["images"]) & (counts["images"] > 0)).all()):
        raise ValueError("correct must be 0 to images")
    latency = torch.tensor([float(row[LATENCY]) for row in rows], dtype=torch.float64) if LATENCY in rows[0] else None
    if latency is not None and not bool((latency.isfinite() & (latency >= 0)).all()):
        raise ValueError(f"{LATENCY} must be a number of milliseconds")
    loss = torch.tensor([float(row["loss"]) for row in rows], dtype=torch.float64)
    return {"genome_VG": genome_VG, **counts, "loss": loss, LATENCY: latency}


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged: {' '.join(str(error).split())[:200]}")
