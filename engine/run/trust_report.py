"""What trained structures say about the scores of a search, as ``trust.json``, ``trust.csv`` and tables.

Shape suffixes: M structures, K seeds, N test images, R replicates of the bootstrap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.correlation import Estimate, estimate, half_width, kendall_tau, resolution, spearman_rho
from engine.files import csv_text, read_sealed, sha256_json, write_atomically
from engine.run.subjects import CHOSEN, RANDOM, UNIFORM, Subject
from engine.space.costs import format_count

SCHEMA = "metaprune.trust/1"
# What a difference must exceed to be no accident of the test images, in standard errors.
TELLS_APART = 1.96


def trust_report(
    subjects: Sequence[Subject], right_MKN: Tensor, groups_N: Tensor, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare search scores with real accuracies.

    right_MKN  bool: which test images each training answered right
    groups_N   int64: which test images are copies of one original
    identity   what the report is of; stored with it

    Intervals hold for other seeds of the same trainings; ``test`` says what other test images would change.
    """
    accuracy_MK = right_MKN.double().mean(2)
    mean_M, half = accuracy_MK.mean(1).tolist(), half_width(accuracy_MK)
    error = resolution(right_MKN.double().mean(1), groups_N)
    row_of = {role: row for row, subject in enumerate(subjects) for role in subject.roles}
    rows = [
        {
            "roles": list(subject.roles),
            "search_score": subject.search_score,
            "macs": subject.structure.macs,
            "parameters": subject.structure.parameters,
            "accuracy": mean,
            "half_width": half,
            "accuracies": accuracies,
            "genome": list(subject.structure.genome),
        }
        for subject, mean, accuracies in zip(subjects, mean_M, accuracy_MK.tolist(), strict=True)
    ]
    content = {
        "schema": SCHEMA,
        "identity": dict(identity),
        "structures": rows,
        "correlation": {
            name: {
                "kendall": asdict(_correlation(kendall_tau, [row[name] for row in rows], accuracy_MK)),
                "spearman": asdict(_correlation(spearman_rho, [row[name] for row in rows], accuracy_MK)),
            }
            for name in ("search_score", "macs")
        },
        "regret": asdict(estimate(lambda mean_RM: mean_RM.amax(1) - mean_RM[:, row_of[CHOSEN]], accuracy_MK)),
        "chosen_minus": {
            role: asdict(_difference(row_of[CHOSEN], row_of[role], accuracy_MK))
            for role in (UNIFORM, RANDOM)
            if role in row_of
        },
        "test": {
            "images": right_MKN.shape[2],
            "originals": len(groups_N.unique()),
            "standard_error": error.accuracy,
            "standard_error_of_difference": error.difference,
        },
    }
    return {**content, "digest": sha256_json(content)}


def _correlation(statistic: Any, predictor: list[float], accuracy_MK: Tensor) -> Estimate:
    predictor_M = torch.tensor(predictor, dtype=torch.float64)
    return estimate(lambda mean_RM: statistic(predictor_M.expand_as(mean_RM), mean_RM), accuracy_MK)


def _difference(first: int, second: int, accuracy_MK: Tensor) -> Estimate:
    return estimate(lambda mean_RM: mean_RM[:, first] - mean_RM[:, second], accuracy_MK)


def write_report(report: dict[str, Any], out: Path) -> None:
    """Write ``trust.json``, and its structures as ``trust.csv``."""
    names = ("roles", "search_score", "macs", "parameters", "accuracy", "half_width", "accuracies", "genome")
    columns = {
        name: [" ".join(map(str, v)) if isinstance(v := row[name], list) else v for row in report["structures"]]
        for name in names
    }
    write_atomically(out / "trust.csv", csv_text(columns))
    write_atomically(out / "trust.json", json.dumps(report, indent=2) + "\n")


def read_report(path: Path) -> dict[str, Any]:
    """Read and verify a ``trust.json``. Raises `UserError` if it is damaged or of another version."""
    return read_sealed(path, "trust report", SCHEMA, "run python -m engine.trust --overwrite")


# -- what a person reads: the same words in the terminal and in a report ---------------------------------------------

STRUCTURES_TITLE = "trained from scratch: top-1 in percent, ± half a 95 % interval over seeds"
STRUCTURE_HEADINGS = ("structure", "MACs", "search score", "test", "test of each seed")
STATISTIC_HEADINGS = ("", "value", "95 % interval")


def structure_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The structures from best to worst, under `STRUCTURE_HEADINGS`."""
    return [
        (
            ", ".join(row["roles"]),
            format_count(row["macs"]),
            f"{100 * row['search_score']:.1f}",
            f"{100 * row['accuracy']:.1f}" + ("" if row["half_width"] is None else f" ± {100 * row['half_width']:.1f}"),
            " ".join(f"{100 * accuracy:.1f}" for accuracy in row["accuracies"]),
        )
        for row in sorted(report["structures"], key=lambda row: -row["accuracy"])
    ]


def statistic_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rank correlations, regret and gains, under `STATISTIC_HEADINGS`."""
    rows: list[tuple[str, ...]] = [
        (f"{symbol}, {predictor} and test", *_shown(report["correlation"][name][statistic], 1, "{:.2f}"))
        for name, predictor in (("search_score", "search score"), ("macs", "MACs"))
        for statistic, symbol in (("kendall", "Kendall's τ"), ("spearman", "Spearman's ρ"))
    ]
    rows.append(("regret: best here minus chosen, points", *_shown(report["regret"], 100, "{:.1f}")))
    gains = report["chosen_minus"].items()
    return rows + [(f"chosen minus {role}, points", *_shown(found, 100, "{:+.1f}")) for role, found in gains]


def caveats(report: Mapping[str, Any]) -> list[str]:
    """What the test images, and the seeds, cannot tell."""
    test = report["test"]
    images = f"{test['images']} test images"
    if test["originals"] < test["images"]:
        images += f", copies of {test['originals']} originals"
    error, difference = 100 * test["standard_error"], 100 * test["standard_error_of_difference"]
    said = [
        f"{images}: the standard error is {error:.2f} points of one accuracy and {difference:.2f} of a difference of "
        f"two structures, so that these images cannot tell structures apart that differ by less than "
        f"{TELLS_APART * difference:.1f} points."
    ]
    if len(report["structures"][0]["accuracies"]) == 1:
        said.append("One seed gives no intervals: give --seeds 2 or more.")
    return said


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the structures, what they say, and what they cannot tell."""
    for title, headings, rows in (
        (STRUCTURES_TITLE, STRUCTURE_HEADINGS, structure_rows(report)),
        (None, STATISTIC_HEADINGS, statistic_rows(report)),
    ):
        table = Table(title=title)
        for number, heading in enumerate(headings):
            table.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence in caveats(report):
        console.print(sentence, highlight=False, soft_wrap=True)


def _shown(found: Mapping[str, float | None], scale: float, form: str) -> tuple[str, str]:
    """A value and its interval as text; a dash where it is not defined."""
    values = (found["value"], found["low"], found["high"])
    value, low, high = (None if number is None else form.format(scale * number) for number in values)
    return value or "–", f"{low} to {high}" if low and high else "–"
