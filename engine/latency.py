"""Measure what layers take on this machine, and check that their sums predict whole networks.

    python -m engine.latency build --architecture mobilenet_v1 --out table.json
    python -m engine.latency check --table table.json

A table is for one runtime, batch, number of threads and resolution: those of deployment. `engine.space.latency_table`
says how it predicts, `engine.layer_times` how a layer is measured. `build` keeps what is measured in
``table.json.partial`` until the table is whole; `check` writes ``table.check.json``.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from engine.errors import UserError
from engine.files import write_atomically
from engine.fit import agreement, fit, spread_genomes
from engine.layer_times import (
    Axes,
    GridPlan,
    blocks_wanted,
    find_steps,
    kinds_of,
    make_grid,
    plan_grids,
    scans,
    time_layers,
)
from engine.run.command import Interruption, Options, run_command
from engine.run.measurements import Measurements
from engine.run.opened import open_run
from engine.run.options import require_at_least
from engine.run.training import keep_freed_memory
from engine.runtimes import RUNTIMES, Network, Settings, Timing, machine, measure_structures
from engine.space import Space, architecture
from engine.space.costs import DEFAULT_RESOLUTION, cost_model, format_count
from engine.space.latency_table import LatencyTable, LayerKind, for_space, load_latency_table
from engine.space.structure import convolutions
from engine.versions import versions_of

DEFAULT_ARCHITECTURE = "mobilenet_v1"
# Whole networks that the constant and the scale are fitted to, spread over the whole range.
FITTED = 12
PACKAGES = ("torch", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Build(Options):
    """Measure the layers of an architecture on this machine."""

    out: Path
    """File the table is written to."""
    architecture: str | None = None
    """Architecture (default: mobilenet_v1)."""
    run: Path | None = None
    """Run directory of a PruningNet, instead: its architecture and number of classes."""
    runtime: str = "onnx"
    """onnx, torch or torch-compile."""
    device: str = "cpu"
    """cpu or cuda."""
    batch: int = 1
    """Images at once."""
    threads: int = 1
    """Threads of the runtime."""
    resolution: int = DEFAULT_RESOLUTION
    """Image side in pixels."""
    pad: int | None = None
    """Pad channels with zeros to a multiple of this (default: 1; for onnx 16 or 8, since others are far slower)."""
    points: int = 8
    """Widths at which a layer is measured, on each axis."""
    resume: bool = False
    """Continue an interrupted build: only what is missing is measured."""
    overwrite: bool = False
    """Replace the table."""


@dataclass(frozen=True, kw_only=True)
class Check(Options):
    """Compare what a table predicts with whole networks, measured now."""

    table: Path
    """File that build wrote."""
    structures: int = 30
    """Random structures, spread over the whole range."""
    seed: int = 0
    """Seed of the structures."""


COMMANDS = Build | Check


def main(options: Build | Check) -> None:
    """Run the command."""
    keep_freed_memory()
    if isinstance(options, Build):
        build(options)
    else:
        check(options)


# -- build ---------------------------------------------------------------------------------------------------------


def build(options: Build) -> None:
    """Measure, fit and write a table."""
    require_at_least(options, {"points": 2})
    if options.run is not None and options.architecture is not None:
        raise UserError("--run and --architecture say the same thing: give one of them")
    settings = _settings(options)
    if options.run is not None:
        space = open_run(options.run).space()
    else:
        space = architecture(options.architecture or DEFAULT_ARCHITECTURE).build(1000)
    space.check_resolution(settings.resolution)
    partial = options.out.with_name(options.out.name + ".partial")
    _check_output(options, partial)
    what: dict[str, Any] = {
        "architecture": space.architecture,
        "classes": space.classes,
        "settings": asdict(settings),
        "machine": machine(settings.device),
        "versions": versions_of(PACKAGES),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.overwrite:
        partial.unlink(missing_ok=True)
    measurements = Measurements(partial, {**what, "points": options.points}, settings)
    plans, rows, fitted, timings = _measure_all(measurements, space, options.points)

    grids = tuple(make_grid(plan, grid_rows) for plan, grid_rows in zip(plans, rows, strict=True))
    unfitted = for_space(LatencyTable(**what, grids=grids, constant_ms=0.0, scale=1.0), space)
    layers_ms = unfitted.predict(fitted).tolist()
    constant_ms, scale = fit(layers_ms, [timing.ms for timing in timings])
    entries = tuple(
        {"genome": genome, "layers_ms": layers, "measured_ms": timing.ms, "spread": timing.spread}
        for genome, layers, timing in zip(fitted.tolist(), layers_ms, timings, strict=True)
    )
    table = LatencyTable(**what, grids=grids, constant_ms=constant_ms, scale=scale, fitted=entries)
    table.save(options.out)
    partial.unlink()
    _print_table(for_space(table, space), space, options.out)


def _settings(options: Build) -> Settings:
    pad = options.pad
    if pad is None:
        pad = RUNTIMES[options.runtime].pad() if options.runtime in RUNTIMES else 1
    settings = Settings(options.runtime, options.device, options.batch, options.threads, options.resolution, pad)
    settings.check()
    return settings


def _check_output(options: Build, partial: Path) -> None:
    """Raise `UserError` unless the table may be written: it is new, to be resumed, or to be overwritten."""
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite contradict each other: give one of them")
    if options.out.is_dir():
        raise UserError(f"{options.out} is a folder: give --out a file")
    if options.resume and not partial.is_file():
        raise UserError(f"there is nothing to resume at {partial}: start without --resume")
    if partial.exists() and not (options.resume or options.overwrite):
        raise UserError(f"{partial} is an unfinished build: add --resume to continue or --overwrite to start anew")
    if options.out.exists() and not (options.resume or options.overwrite):
        raise UserError(f"{options.out} exists: add --overwrite to replace it, or choose another file with --out")


def _measure_all(
    measurements: Measurements, space: Space, points: int
) -> tuple[list[GridPlan], list[list[list[tuple[float, float]]]], Tensor, list[Timing]]:
    """Blocks and grids, and whole networks before, amid and after them; a signal stops between two groups."""
    settings = measurements.settings
    axes = kinds_of(space, settings.resolution)
    fitted = spread_genomes(space, FITTED, "latency build")
    networks = [Network(convolutions(space, genome), space.classes, settings.resolution) for genome in fitted]
    with Interruption() as interruption, _progress(Console(file=sys.stderr)) as progress:
        task = progress.add_task("measuring", total=None)

        def timed(group: str, kind: LayerKind, widths: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
            interruption.stop_if_asked()
            times = time_layers(measurements, group, kind, widths)
            progress.advance(task, len(times))
            return times

        def whole(visit: int) -> list[Timing]:
            interruption.stop_if_asked()
            return measurements.of(f"whole networks, visit {visit}", networks, cold=False)

        looking = scans(axes, settings.pad).values()
        progress.update(task, total=sum(len(scan.widths) for scan in looking) + _points(axes, points, settings.pad))
        visits = [whole(0)]
        plans = plan_grids(axes, points, find_steps(axes, settings.pad, timed))
        progress.update(task, total=sum(len(scan.widths) for scan in looking) + sum(len(p) for p in plans))
        rows: list[list[list[tuple[float, float]]]] = []
        for number, plan in enumerate(plans):
            if number == len(plans) // 2:
                visits.append(whole(1))
            rows.append([timed(name, plan.kind, widths) for name, widths in plan.rows()])
        visits.append(whole(2))
    pooled = [Timing(tuple(ms for timing in same for ms in timing.rounds)) for same in zip(*visits, strict=True)]
    return plans, rows, fitted, pooled


def _points(axes: Sequence[Axes], points: int, pad: int) -> int:
    """How many pairs of widths there are to measure if no blocks are found."""
    return sum(len(plan) for plan in plan_grids(axes, points, dict.fromkeys(blocks_wanted(axes), pad)))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("time left"), TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip


def _print_table(table: LatencyTable, space: Space, out: Path) -> None:
    least, greatest = table.legal_range(space)
    errors = [abs(_total(table, entry["layers_ms"]) / entry["measured_ms"] - 1) for entry in table.fitted]
    points = sum(len(grid.in_widths) * len(grid.out_widths) for grid in table.grids)
    for line in (
        f"{len(table.grids)} kinds of layers at {points} pairs of widths; structures take {least:.3g} to "
        f"{greatest:.3g} ms",
        f"{table.constant_ms:.3g} ms + {table.scale:.3g} × layers, fitted to {len(errors)} networks within "
        f"{100 * max(errors):.1f} %",
        f"table: {out}",
        f"next: python -m engine.latency check --table {shlex.quote(str(out))}",
    ):
        print(line)


def _total(table: LatencyTable, layers_ms: float) -> float:
    return table.constant_ms + table.scale * layers_ms


# -- check ---------------------------------------------------------------------------------------------------------


def check(options: Check) -> None:
    """Measure random structures and write how well the table predicts them."""
    require_at_least(options, {"structures": 2, "seed": 0})
    table = load_latency_table(options.table)
    settings = Settings.of(table.settings)
    settings.check()
    space = architecture(table.architecture).build(table.classes)
    here = {"machine": machine(settings.device), "versions": versions_of(PACKAGES)}
    console = Console(file=sys.stderr)
    if here != {"machine": dict(table.machine), "versions": dict(table.versions)}:
        console.print("note: the table was measured on another machine or with other versions", soft_wrap=True)
    genomes = spread_genomes(space, options.structures, "latency check", options.seed)
    structures = [convolutions(space, genome) for genome in genomes]
    with console.status(f"measuring {len(structures)} networks"):
        timings = measure_structures(structures, settings, space.classes)
    predicted, measured = table.predict(genomes), torch.tensor([timing.ms for timing in timings], dtype=torch.float64)
    macs = cost_model(space, settings.resolution).macs(genomes)
    result = {
        "table": table.digest,
        **here,
        "seed": options.seed,
        **agreement(predicted, measured),
        "structures": [
            {"genome": genome, "macs": count, "predicted_ms": ms, "measured_ms": timing.ms, "spread": timing.spread}
            for genome, count, ms, timing in zip(
                genomes.tolist(), macs.tolist(), predicted.tolist(), timings, strict=True
            )
        ],
    }
    path = options.table.with_suffix(".check.json")
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    _print_check(result, path)


def _print_check(result: dict[str, Any], path: Path) -> None:
    table = Table("MACs", "predicted", "measured", "error", title=None)
    for row in sorted(result["structures"], key=lambda row: row["measured_ms"]):
        error = row["predicted_ms"] / row["measured_ms"] - 1
        table.add_row(
            format_count(row["macs"]), f"{row['predicted_ms']:.3g} ms",
            f"{row['measured_ms']:.3g} ms ± {100 * row['spread']:.0f} %", f"{100 * error:+.1f} %",
        )  # fmt: skip
    Console().print(table)
    print(
        f"relative error: median {100 * result['median_relative_error']:.1f} %, greatest "
        f"{100 * result['greatest_relative_error']:.1f} %; Spearman {result['spearman']:.3f}, "
        f"Kendall {result['kendall']:.3f}"
    )
    print(f"result: {path}")


if __name__ == "__main__":
    sys.exit(run_command(main, COMMANDS))  # type: ignore[arg-type]
