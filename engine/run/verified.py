"""Latencies of what a search found: predicted from a table, and measured end to end on the machine of the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import UserError
from engine.files import write_atomically
from engine.runtimes import Settings, Timing, machine, measure_structures
from engine.space.budget import Limit, Quantity
from engine.space.latency_table import LatencyTable
from engine.space.structure import Structure

# A difference between prediction and measurement that is worth a word.
NOTABLE = 0.1


@dataclass(frozen=True)
class Verified:
    """Predicted and measured milliseconds of one structure; not measured where this is not the table's machine."""

    name: str
    macs: int
    predicted_ms: float
    measured: Timing | None

    @property
    def error(self) -> float:
        """How far the prediction is from the measurement, relative to it."""
        assert self.measured is not None
        return self.predicted_ms / self.measured.ms - 1


def verify_latencies(
    structures: Mapping[str, Structure], table: LatencyTable, latency: Quantity
) -> tuple[list[Verified], str | None]:
    """Predict and measure structures, and say why nothing was measured if so."""
    predicted = latency.of(torch.tensor([structure.genome for structure in structures.values()])).tolist()
    timings: list[Timing | None] = [None] * len(structures)
    reason = why_not_measured(table)
    if reason is None:
        timings = list(measure_structures(list(structures.values()), Settings.of(table.settings)))
    entries = zip(structures.items(), predicted, timings, strict=True)
    return [Verified(name, structure.macs, ms, timing) for (name, structure), ms, timing in entries], reason


def why_not_measured(table: LatencyTable) -> str | None:
    """Why latencies measured here would say nothing about a table; None if they do."""
    try:
        settings = Settings.of(table.settings)
        settings.check()
    except UserError as error:
        return str(error)
    here = machine(settings.device)
    if here != dict(table.machine):
        return f"the table is of another machine ({', '.join(map(str, table.machine.values()))})"
    return None


def findings(verified: list[Verified], limit: Limit | None) -> list[str]:
    """What a user should know: predictions that are off, a budget that is missed, fewer MACs that are not faster."""
    notes = []
    for entry in verified:
        if entry.measured is None:
            continue
        if abs(entry.error) > NOTABLE:
            notes.append(
                f"the {entry.name} structure was predicted to take {entry.predicted_ms:.3g} ms and takes "
                f"{entry.measured.ms:.3g} ms: check the table with python -m engine.latency check"
            )
        if limit is not None and entry.measured.ms > limit.high:
            asked = limit.quantity.kind.show(limit.high)
            notes.append(f"the {entry.name} structure takes {entry.measured.ms:.3g} ms, more than {asked}")
    measured = [(entry, entry.measured.ms) for entry in verified if entry.measured is not None]
    for one, one_ms in measured:
        for other, other_ms in measured:
            if one.macs < other.macs and one_ms >= other_ms:
                notes.append(
                    f"fewer MACs are not faster here: the {one.name} structure has {one.macs / other.macs:.0%} of the "
                    f"MACs of the {other.name} one and takes {one_ms / other_ms:.0%} of its time"
                )
    return notes


def report_latencies(
    structures: dict[str, Structure], table: LatencyTable, latency: Quantity, limit: Limit | None, out: Path
) -> None:
    """Measure what was found end to end, print it beside its prediction, and write ``latency.json``."""
    verified, reason = verify_latencies(structures, table, latency)
    notes = findings(verified, limit)
    for entry in verified:
        measured = "not measured" if entry.measured is None else f"measured {entry.measured.ms:.3g} ms"
        print(f"{entry.name}: predicted {entry.predicted_ms:.3g} ms, {measured}")
    for note in [f"nothing was measured: {reason}"] if reason else notes:
        print(f"note: {note}")
    rows = [
        {
            "name": entry.name,
            "predicted_ms": entry.predicted_ms,
            "measured_ms": entry.measured.ms if entry.measured else None,
            "spread": entry.measured.spread if entry.measured else None,
        }
        for entry in verified
    ]
    content = {"table": table.digest, "settings": dict(table.settings), "not_measured": reason, "structures": rows}
    write_atomically(out / "latency.json", json.dumps({**content, "notes": notes}, indent=2) + "\n")
