"""Show a search space, a structure, or a run.

python -m engine.inspect mobilenet_v2
python -m engine.inspect runs/mobilenet_v1-digits/search-300M/structure.json
python -m engine.inspect runs/mobilenet_v1-digits
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from engine.errors import UserError
from engine.pruningnet import count_parameters
from engine.run.command import Options, run_command
from engine.run.directory import CONFIG, read_config
from engine.run.opened import open_run
from engine.space import ARCHITECTURES, Space, architecture, max_width
from engine.space.costs import DEFAULT_RESOLUTION, cost_model, format_count, macs_per_conv
from engine.space.structure import Structure, load_structure

BAR = 20


@dataclass(frozen=True, kw_only=True)
class Inspect(Options):
    """Show a search space, a structure, or a run."""

    what: Annotated[str, tyro.conf.Positional]
    """An architecture, a structure.json, or a run directory."""
    classes: int = 1000
    """Classes of an architecture."""
    resolution: int = DEFAULT_RESOLUTION
    """Image side in pixels at which the MACs of an architecture are counted."""


def main(options: Inspect) -> None:
    """Run the command."""
    console, path = Console(), Path(options.what)
    if options.what in ARCHITECTURES:
        if options.classes < 1:
            raise UserError(f"--classes {options.classes}: at least 1")
        show_space(console, architecture(options.what).build(options.classes), options.resolution)
    elif path.is_file():
        show_structure(console, load_structure(path))
    elif (path / CONFIG).is_file():
        show_run(console, path)
    else:
        raise UserError(
            f"{options.what} is no architecture ({', '.join(ARCHITECTURES)}), structure.json or run directory"
        )


def show_space(console: Console, space: Space, resolution: int) -> None:
    """Print genes, ranges, costs and the size of the PruningNet."""
    costs = cost_model(space, resolution)
    table = Table(title=f"{space.architecture}: {len(space.genes)} genes, {len(space.convs)} convolutions")
    for heading in ("gene", "choices", "least", "greatest", "sets the width of"):
        table.add_column(heading, justify="right" if heading in ("choices", "least", "greatest") else "left")
    for gene in space.genes:
        convs = [conv.name for conv in space.convs if conv.cout == gene]
        named = ", ".join(convs[:3]) + (f" and {len(convs) - 3} more" if len(convs) > 3 else "")
        table.add_row(gene.name, str(len(gene.widths)), str(min(gene.widths)), str(gene.max_width), named)
    console.print(table)
    extremes = torch.cat([space.uniform_choice(0), space.uniform_choice(space.choices - 1)])
    quantities = {
        f"MACs at {resolution} px": [format_count(n) for n in costs.macs(extremes).tolist()],
        "parameters": [format_count(n) for n in costs.parameters(extremes).tolist()],
        "peak activations (fp32, 1 image)": [
            f"{format_count(n)}B" for n in costs.peak_activation_bytes(extremes).tolist()
        ],
    }
    for name, (least, greatest) in quantities.items():
        console.print(f"{name}: {least} to {greatest}", highlight=False, soft_wrap=True)
    console.print(f"structures: {space.choices}^{len(space.genes)}", highlight=False, soft_wrap=True)
    console.print(f"PruningNet: {count_parameters(space) / 1e6:.1f} M parameters", highlight=False, soft_wrap=True)


def show_structure(console: Console, structure: Structure) -> None:
    """Print every layer: kept and full width with a bar, and its share of the MACs."""
    space = structure.space
    costs = cost_model(space, structure.flops_resolution)
    genome_G = torch.tensor(structure.genome)
    counts, widths = macs_per_conv(costs, genome_G), space.widths(genome_G[None])[0].tolist()
    table = Table(title=f"{structure.architecture}, {structure.classes} classes, {structure.resolution} px")
    for heading in ("layer", "kept", "full", "", "MACs", "share"):
        table.add_column(heading, justify="left" if heading in ("layer", "") else "right")
    total = sum(counts)
    for conv, kept, macs in zip(space.convs, widths, counts, strict=False):
        full = max_width(conv.cout)
        filled = round(BAR * kept / full)
        bar = "█" * filled + "░" * (BAR - filled)
        table.add_row(conv.name, str(kept), str(full), bar, format_count(macs), f"{100 * macs / total:.1f} %")
    table.add_row("classifier", "", "", "", format_count(counts[-1]), f"{100 * counts[-1] / total:.1f} %")
    console.print(table)
    console.print(
        f"{format_count(structure.macs)} MACs at {structure.flops_resolution} px ({structure.flops_convention}), "
        f"{format_count(structure.parameters)} parameters",
        highlight=False,
        soft_wrap=True,
    )
    if structure.score:
        score = structure.score
        console.print(
            f"score: {score['correct']}/{score['images']} on {score['split']}; {score['method']}",
            highlight=False,
            soft_wrap=True,
        )


def show_run(console: Console, folder: Path) -> None:
    """Print the options of a run, how far it is, its last accuracies, and what was made from it."""
    config = read_config(folder)
    table = Table(title=str(folder), show_header=False)
    for name, value in {**config["options"], **config["resolved"]}.items():
        table.add_row(name, str(value))
    console.print(table)
    if (folder / "checkpoints").is_dir() and (folder / "splits.json").is_file():
        run = open_run(folder)
        manifest = run.checkpoint.manifest
        console.print(
            f"step {run.checkpoint.step} of {manifest['steps']}; PruningNet {run.digest}",
            highlight=False,
            soft_wrap=True,
        )
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    if lines:
        last = json.loads(lines[-1])
        console.print("  ".join(f"{name} {value:g}" for name, value in last.items()), highlight=False, soft_wrap=True)
    for path in sorted([*folder.rglob("structure.json"), *folder.rglob("result.json")]):
        console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main, Inspect))
