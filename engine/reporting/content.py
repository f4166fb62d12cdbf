"""What a report says about what a search found: plain values for the template."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from engine.reporting import figures
from engine.reporting.text import NONE, amount, confidence, count, milliseconds, percent, share_of, size
from engine.run.searched import Search
from engine.run.trained import Trained
from engine.space import max_width
from engine.space.costs import macs_per_conv
from engine.space.structure import Structure

NAMES = {"mobilenet_v1": "MobileNetV1", "mobilenet_v2": "MobileNetV2", "resnet50": "ResNet-50"}
Genome = tuple[int, ...]


def genomes(search: Search) -> dict[str, Genome]:
    """The genomes a report compares, by name: winner, uniform where the search wrote one, and full."""
    full = tuple(search.costs.space.uniform_choice(search.costs.space.choices - 1)[0].tolist())
    uniform = {"uniform": search.uniform.genome} if search.uniform is not None else {}
    return {"winner": search.structure.genome, **uniform, "full": full}


def describe(search: Search) -> str:
    """One line: architecture, classes, resolutions."""
    structure = search.structure
    classes = f"{structure.classes} class" + ("es" if structure.classes != 1 else "")
    convention = "" if structure.flops_convention == "macs" else f" by the {structure.flops_convention} convention"
    return (
        f"{NAMES.get(structure.architecture, structure.architecture)}, {classes}, {structure.resolution} px images; "
        f"MACs and memory of one {structure.flops_resolution} px image{convention}"
    )


def budgets(search: Search) -> list[str]:
    """Each budget in words."""
    lines = []
    for budget in search.budgets:
        low, high = (amount(budget.name, n) if n else None for n in (budget.low, budget.high))
        if low is not None and high is not None:
            lines.append(f"{low} to {high}")
        elif high is not None:
            lines.append(f"at most {high}")
        elif low is not None:
            lines.append(f"at least {low}")
    return lines


def result(search: Search, trained: Sequence[Trained]) -> dict[str, Any]:
    """The table of winner, uniform and full: costs, search score, and accuracies on the test split."""
    compared = genomes(search)
    table = torch.tensor(list(compared.values()))
    costs = {
        "MACs": search.costs.macs(table).tolist(),
        "parameters": search.costs.parameters(table).tolist(),
        "peak memory": search.costs.peak_activation_bytes(table).tolist(),
    }
    rows = []
    for name, values in costs.items():
        write = size if name == "peak memory" else count
        cells = [(write(n), f"{percent(n / values[-1], 0)} of full") for n in values]
        rows.append((name, [*cells[:-1], cells[-1][:1]]))
    if search.candidates.latency_ms is not None:
        rows.append(("latency", [(_latency(search, genome),) for genome in compared.values()]))
    structures = {"winner": search.structure, "uniform": search.uniform}
    scores = [_score(structures.get(name)) for name in compared]
    rows.append(("search score", scores))
    found = [[network for network in trained if network.structure.genome == genome] for genome in compared.values()]
    for networks in itertools.zip_longest(*found):
        rows.append(("test accuracy", [_test(network) for network in networks]))
    used = [network for networks in found for network in networks]
    recipes = {repr((sorted(n.recipe.items()), n.steps)) for n in used}
    return {"names": list(compared), "rows": rows, "trained": len(used), "recipes_differ": len(recipes) > 1}


def _latency(search: Search, genome: Genome) -> str:
    row = search.candidates.row_of(genome)
    latency = search.candidates.latency_ms
    return NONE if row is None or latency is None else milliseconds(float(latency[row]))


def _score(structure: Structure | None) -> tuple[str, ...]:
    if structure is None or structure.score is None:
        return (NONE,)
    score = structure.score
    return percent(score["correct"] / score["images"]), f"{score['correct']}/{score['images']}"


def _test(network: Trained | None) -> tuple[str, ...]:
    if network is None:
        return (NONE,)
    counts = f"{network.correct}/{network.images}"
    return percent(network.correct / network.images), counts, confidence(network.correct, network.images)


def lead(search: Search) -> dict[str, Any]:
    """What the opening sentence says."""
    score = search.structure.score or {}
    candidates = search.candidates
    return {
        "scored": f"{len(candidates):,}",
        "generations": int(candidates.generation_V[-1]) + 1,
        "budgets": budgets(search),
        "winner": share_of(score["correct"], score["images"]),
        "uniform": share_of(search.uniform.score["correct"], search.uniform.score["images"])
        if search.uniform is not None and search.uniform.score
        else None,
        "failed": int(candidates.loss.isnan().sum()),
    }


def front(search: Search) -> dict[str, Any] | None:
    """The Pareto front as a table, from the cheapest to the dearest in MACs; None where there is none."""
    table = search.front
    if table is None:
        return None
    rows = []
    for i in table.macs.argsort(stable=True).tolist():
        costs = [count(int(table.macs[i])), count(int(table.parameters[i])), size(int(table.peak_activation_bytes[i]))]
        latency = [milliseconds(float(table.latency_ms[i]))] if table.latency_ms is not None else []
        winner = tuple(table.genome_VG[i].tolist()) == search.structure.genome
        rows.append((table.file[i], winner, [percent(float(table.accuracy[i])), *costs, *latency]))
    latency = ["latency"] if table.latency_ms is not None else []
    return {
        "names": ["score", "MACs", "parameters", "peak memory", *latency],
        "rows": rows,
        "objectives": search.objectives,
    }


def layers(search: Search, key: str) -> dict[str, Any]:
    """Widths and MACs of every layer: two figures and a table."""
    space, compared = search.costs.space, genomes(search)
    widths = {name: space.widths(torch.tensor([genome]))[0].tolist() for name, genome in compared.items()}
    macs = {name: macs_per_conv(search.costs, torch.tensor(genome)) for name, genome in compared.items()}
    full = [max_width(conv.cout) for conv in space.convs]
    shares = {name: [100 * n / m for n, m in zip(row, full, strict=True)] for name, row in widths.items()}
    names = [conv.name for conv in space.convs]
    total = sum(macs["winner"])
    rows = [
        {
            "name": name,
            "kept": widths["winner"][i],
            "full": full[i],
            "percent": round(shares["winner"][i]),
            "uniform": widths.get("uniform", full)[i],
            "macs": count(macs["winner"][i]),
            "share": percent(macs["winner"][i] / total),
        }
        for i, name in enumerate(names)
    ]
    heaviest = sorted(range(len(full)), key=lambda i: -macs["winner"][i])[:3]
    drawn = {name: [n / 1e6 for n in macs[name]] for name in ("full", "winner", "uniform") if name in macs}
    percents = {name: shares[name] for name in ("full", "winner", "uniform") if name in shares}
    return {
        "rows": rows,
        "classifier": (count(macs["winner"][-1]), percent(macs["winner"][-1] / total)),
        "uniform": "uniform" in widths,
        "widths": Markup(figures.layers(f"{key}-widths", "channels kept, %", percents)),
        "macs": Markup(figures.layers(f"{key}-macs", "million MACs", drawn)),
        "heaviest": [(names[i], percent(macs["winner"][i] / total, 0)) for i in heaviest],
        "plain": search.costs.convention == "macs",
    }


def digests(search: Search) -> list[tuple[str, str]]:
    """What identifies the search, SHA-256."""
    structure = search.structure
    named = {
        "PruningNet": structure.pruningnet,
        "splits": structure.splits,
        "structure": structure.to_dict()["digest"],
        "search state": search.state_digest,
    }
    return [(name, str(digest)) for name, digest in named.items() if digest is not None]


def folders_of(search: Search, run: Path | None) -> list[Path]:
    """Folders whose subfolders may hold networks trained from this search's structures."""
    return [search.folder, search.folder / "front", *([run] if run is not None else [])]
