"""The files a search leaves behind, made up: real genomes and costs of MobileNetV1, scores of no network."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import tomli_w
import torch
from structures import budget_of

from engine import report
from engine.files import sha256_json
from engine.run.command import run_command
from engine.run.search_state import SCHEMA
from engine.run.subjects import Subject
from engine.run.trust_report import trust_report
from engine.run.trust_report import write_report as write_trust_report
from engine.space import architecture
from engine.space.budget import uniform_genome
from engine.space.costs import cost_model
from engine.space.structure import Structure, make_structure

BUDGET, IMAGES, GENERATIONS, POPULATION = 300_000_000, 360, 3, 6
COSTS = cost_model(architecture("mobilenet_v1").build(10))
PROVENANCE = {"preprocessing": {}, "pruningnet": "ab" * 32, "splits": "cd" * 32}
Row = dict[str, Any]


def write_run(folder: Path) -> Path:
    """A run directory without its network."""
    folder.mkdir(parents=True)
    config = {"options": {"architecture": "mobilenet_v1", "data": "digits", "steps": 60, "seed": 0}, "resolved": {}}
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    (folder / "splits.json").write_text("{}")
    return folder


def write_search(
    folder: Path, raced: bool = False, latency: bool = False, front: bool = False, **options: object
) -> list[Row]:
    """A finished search of three generations of six; returns the rows of its candidates."""
    folder.mkdir(parents=True)
    rows = _rows(raced, latency)
    score = ["correct", "images", "loss", "macs", "parameters", "peak_activation_bytes", *["latency_ms"] * latency]
    write_table(folder / "candidates.csv", ["generation", "origin", "parents", *score, "genome"], rows)
    best = winner(rows)
    structure(best["genome"], best["correct"]).save(folder / "structure.json")
    uniform = uniform_genome(budget_of(COSTS, flops=BUDGET))[0].tolist()
    structure(" ".join(map(str, uniform)), 200).save(folder / "uniform.json")
    content = {"schema": SCHEMA, "seed": 0, "generation": GENERATIONS}
    (folder / "state.json").write_text(json.dumps({**content, "digest": sha256_json(content)}))
    resolved: dict[str, Any] = {"pruningnet": "ab" * 32, "splits": "cd" * 32, "budget": {"flops": {"high": BUDGET}}}
    if latency:
        resolved["budget"]["latency"] = {"low": 1.5, "high": 9.0}
    if front:
        resolved["objectives"] = ["accuracy", "flops"]
        members = [best, min(rows, key=lambda row: row["macs"])]
        write_table(
            folder / "front.csv",
            ["file", *score, "genome"],
            [{**row, "file": f"00{number}.json"} for number, row in enumerate(members, 1)],
        )
    given = {"flops": "300M", "run": str(folder.parent), "population": POPULATION, "seed": 0, **options}
    (folder / "config.toml").write_text(tomli_w.dumps({"options": given, "resolved": resolved}))
    return rows


def write_table(path: Path, columns: list[str], rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_training(folder: Path, trained: Structure, correct: int, **options: object) -> None:
    """What `engine.retrain` leaves of a training, without the network."""
    trained.save(folder / "structure.json")
    result = {"test_correct": correct, "test_images": IMAGES, "steps": 30, "recipe": {"batch": 64}}
    (folder / "result.json").write_text(json.dumps({**result, "structure": trained.to_dict()["digest"]}))
    (folder / "config.toml").write_text(tomli_w.dumps({"options": options, "resolved": {}}))


def write_trust(folder: Path, rows: list[Row], role: str = "median") -> dict[str, Any]:
    """What `engine.trust` leaves of three structures and two seeds; returns its content."""
    subjects = [
        Subject(roles, structure(row["genome"], row["correct"]))
        for roles, row in zip((("chosen",), (role,), ("uniform", "random-search")), rows[-3:], strict=True)
    ]
    dice = torch.Generator().manual_seed(0)
    right_MKN = torch.rand(3, 2, IMAGES, generator=dice) < torch.tensor([0.9, 0.8, 0.7])[:, None, None]
    report = trust_report(subjects, right_MKN, torch.arange(IMAGES) // 10, {"candidates": "ab" * 32})
    write_trust_report(report, folder)
    return report


def write_report(*arguments: object) -> int:
    return run_command(report.main, report.Report, [str(argument) for argument in arguments])


def structure(genome: str, correct: int | None) -> Structure:
    score = None if correct is None else {"correct": correct, "images": IMAGES, "loss": 1.0, "split": "sub_validation"}
    choices = torch.tensor([int(choice) for choice in genome.split()])
    return make_structure(COSTS, choices, 32, score=score, **PROVENANCE)


def winner(rows: list[Row]) -> Row:
    return max((row for row in rows if row["images"] == IMAGES), key=lambda row: row["correct"])


def _rows(raced: bool, latency: bool) -> list[Row]:
    """Random founders, then by turns mutants and crossovers of the two best; later ones are better."""
    dice = torch.Generator().manual_seed(0)
    genomes: list[list[int]] = []
    rows: list[Row] = []
    for number in range(GENERATIONS * POPULATION):
        generation = number // POPULATION
        first, second = 6 * (generation - 1) + 1, 6 * (generation - 1)
        if not generation:
            genome = torch.randint(20, (len(COSTS.space.genes),), generator=dice).tolist()
            origin, parents = "random", ""
        elif number % 2:
            genome = [
                choice if gene != number % 10 else (choice + 1) % 20 for gene, choice in enumerate(genomes[first])
            ]
            origin, parents = "mutation", str(first)
        else:
            genome = [*genomes[first][:7], *genomes[second][7:]]
            genome[3] = 20 + number // 2  # a choice of no founder
            origin, parents = "crossover", f"{first} {second}"
        genomes.append(genome)
        images = IMAGES // 2 if raced and number % 3 == 0 else IMAGES
        genome_1G = torch.tensor([genome])
        rows.append(
            {
                "generation": generation,
                "origin": origin,
                "parents": parents,
                "correct": images * (50 + number) // 100,
                "images": images,
                "loss": 2 - number / 20,
                "macs": int(COSTS.macs(genome_1G)),
                "parameters": int(COSTS.parameters(genome_1G)),
                "peak_activation_bytes": int(COSTS.peak_activation_bytes(genome_1G)),
                "genome": " ".join(map(str, genome)),
                **({"latency_ms": 2 + number / 8} if latency else {}),
            }
        )
    return rows
