"""What is said of predicted and measured latencies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structures import space_of

from engine.files import read_json
from engine.run.verified import Verified, findings, report_latencies, why_not_measured
from engine.runtimes import Settings, Timing, machine
from engine.space.budget import Limit, quantities
from engine.space.costs import cost_model
from engine.space.latency_table import LatencyTable
from engine.space.structure import make_structure

COSTS = cost_model(space_of("mobilenet_v1", 10), 32)
LATENCY = quantities(COSTS, lambda genome_PG: COSTS.macs(genome_PG).double() / 1e6)["latency"]
EIGHT = Limit(LATENCY, 8.0)


def timing(ms: float) -> Timing:
    return Timing((ms, ms, ms))


def table(**settings: Any) -> LatencyTable:
    """A table of this machine for eager PyTorch at 32 px; nothing here asks it for a prediction."""
    given = vars(Settings(runtime="torch", resolution=32)) | settings
    return LatencyTable("mobilenet_v1", 10, given, machine("cpu"), {}, (), 0.0, 1.0)


@pytest.mark.parametrize(
    ("best", "uniform", "said"),
    [
        ((7.9, 7.9), (8.0, 8.0), []),
        ((7.0, 7.9), (8.0, 8.0), ["best structure was predicted to take 7 ms and takes 7.9 ms"]),
        ((8.0, 8.5), (8.0, 8.6), ["best structure takes 8.5 ms, more than 8 ms", "uniform structure takes 8.6 ms"]),
        ((7.9, 7.9), (7.5, 7.5), ["fewer MACs are not faster here: the best structure has 50% of the MACs"]),
        ((7.9, None), (7.5, None), []),
    ],
)
def test_what_differs_from_the_promise_is_said_plainly(
    best: tuple[float, float | None], uniform: tuple[float, float | None], said: list[str]
) -> None:
    entries = [
        Verified(name, macs, predicted, None if measured is None else timing(measured))
        for name, macs, (predicted, measured) in (("best", 100, best), ("uniform", 200, uniform))
    ]
    notes = findings(entries, EIGHT)
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))


def test_another_machine_or_a_runtime_that_is_missing_is_no_reason_to_guess() -> None:
    assert why_not_measured(table()) is None
    elsewhere = replace(table(), machine={"cpu": "abacus"})
    assert why_not_measured(elsewhere) == "the table is of another machine (abacus)"
    assert "unknown runtime 'telepathy'" in str(why_not_measured(table(runtime="telepathy")))
    assert "not those of this version" in str(why_not_measured(table(colour="red")))


def test_found_structures_are_measured_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    space = COSTS.space
    ends = {"best": space.uniform_choice(0)[0], "uniform": space.uniform_choice(30)[0]}
    structures = {name: make_structure(COSTS, genome_G, 32) for name, genome_G in ends.items()}
    report_latencies(structures, table(), LATENCY, None, tmp_path)
    written = read_json(tmp_path / "latency.json", "latencies")
    assert [row["name"] for row in written["structures"]] == ["best", "uniform"]
    assert [row["predicted_ms"] for row in written["structures"]] == [LATENCY.least, LATENCY.full]
    assert all(row["measured_ms"] > 0 for row in written["structures"])
    shown = capfd.readouterr().out
    assert shown.count("measured ") == 2
