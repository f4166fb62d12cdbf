"""What a report says about one search: plain values for the template, in the order of the page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from engine.evolution import ranking
from engine.reporting import figures
from engine.reporting.lineage import ancestors, changes, diversity, main_line
from engine.reporting.text import NONE, amount, confidence, count, milliseconds, percent, share_of, size
from engine.run.searched import BUDGETED, Candidates, Scored, Search
from engine.run.trained import Trained
from engine.space import max_width
from engine.space.costs import macs_per_conv
from engine.space.structure import Structure

# How to read and label what a budget bounds.
AXES: dict[str, tuple[str, float]] = {
    "flops": ("million MACs", 1e6),
    "params": ("million parameters", 1e6),
    "memory_peak": ("peak activation memory, MB", 1e6),
    "latency": ("latency, ms", 1.0),
}
NAMES = {"mobilenet_v1": "MobileNetV1", "mobilenet_v2": "MobileNetV2", "resnet50": "ResNet-50"}
BEST_SHOWN = 8
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


def convergence(search: Search, key: str) -> dict[str, Any]:
    """Two figures over the generations: scores, and diversity."""
    candidates, whole = search.candidates, _scored_on_all(search)
    accuracy, best = candidates.accuracy, list[float]()
    series: dict[str, list[float]] = {"lower": [], "median": [], "upper": []}
    distances = []
    for generation in range(int(candidates.generation_V[-1]) + 1):
        own = candidates.generation_V == generation
        eligible = accuracy[(candidates.generation_V <= generation) & whole & ~accuracy.isnan()]
        best.append(100 * float(eligible.max()) if len(eligible) else torch.nan)
        for values, quantile in zip(
            series.values(), figures.quantiles(100 * accuracy[own], (0.25, 0.5, 0.75)), strict=True
        ):
            values.append(quantile)
        distances.append(diversity(candidates.genome_VG[own], search.costs.space.choices))
    random = figures.random_distance(search.costs.space.choices)
    uniform = search.uniform.score if search.uniform is not None else None
    uniform_percent = 100 * uniform["correct"] / uniform["images"] if uniform else None
    return {
        "scores": Markup(figures.convergence(f"{key}-scores", {"best": best, **series}, uniform_percent)),
        "diversity": Markup(figures.diversity(f"{key}-diversity", distances, random)),
        "raced": not bool(whole.all()),
        "first": (_percent(best[0]), _percent(series["median"][0]), f"{distances[0]:.2f}"),
        "last": (_percent(best[-1]), _percent(series["median"][-1]), f"{distances[-1]:.2f}"),
        "random": f"{random:.2f}",
    }


def _percent(value: float) -> str:
    return percent(value / 100)


def _scored_on_all(search: Search) -> Tensor:
    return search.candidates.images >= _all_images(search)


def _all_images(search: Search) -> int:
    return max(int(search.candidates.images.max()), int((search.structure.score or {})["images"]))


def scatters(search: Search, key: str) -> list[tuple[Markup, bool]]:
    """Score against every cost that is an objective or has a budget: figures, and whether a bound is drawn."""
    named = {*search.objectives, *(budget.name for budget in search.budgets)}
    wanted = [name for name in AXES if name in named or BUDGETED[name] in named] or ["flops"]
    if search.candidates.latency_ms is None:
        wanted = [name for name in wanted if name != "latency"]
    drawn = []
    for name in wanted:
        label, scale = AXES[name]
        bounds = [
            bound / scale for b in search.budgets if b.name == name for bound in (b.low, b.high) if bound is not None
        ]
        marked = {"winner": _point(search.candidates, search.row, _reader(name))}
        if search.uniform is not None and name != "latency":
            score, genome_1G = search.uniform.score or {}, torch.tensor([search.uniform.genome])
            cost = float(getattr(search.costs, BUDGETED[name])(genome_1G)) / scale
            marked["uniform"] = (cost, 100 * score["correct"] / score["images"])
        axis, joined = (label, _reader(name)), len(search.objectives) <= 2
        svg = figures.scatter(f"{key}-{name}", axis, search.candidates, search.front, marked, bounds, joined)
        drawn.append((Markup(svg), bool(bounds)))
    return drawn


def _reader(name: str) -> Callable[[Scored], Tensor]:
    return lambda table: getattr(table, BUDGETED[name]).double() / AXES[name][1]


def _point(table: Candidates, row: int, read: Callable[[Scored], Tensor]) -> tuple[float, float]:
    return float(read(table)[row]), 100 * float(table.accuracy[row])


def best(search: Search) -> list[tuple[int, int, str, str, str]]:
    """The best structures scored on all images: row, generation, origin, score, MACs."""
    candidates, whole = search.candidates, _scored_on_all(search)
    order = ranking(candidates.correct.where(whole, -1), candidates.loss).tolist()
    rows = [row for row in order if bool(whole[row]) and not bool(candidates.loss[row].isnan())][:BEST_SHOWN]
    return [
        (
            row,
            int(candidates.generation_V[row]) + 1,
            candidates.origin[row],
            percent(float(candidates.accuracy[row])),
            count(int(candidates.macs[row])),
        )
        for row in rows
    ]


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


def lineage(search: Search, key: str) -> dict[str, Any]:
    """The winner's ancestors: a figure, the main line, and all of them."""
    candidates = search.candidates
    rows, line = ancestors(candidates, search.row), main_line(candidates, search.row)
    svg = Markup(figures.family(f"{key}-family", candidates, rows, line)) if len(rows) > 1 else None
    return {
        "figure": svg,
        "line": [_ancestor(search, row) for row in line],
        "all": [_ancestor(search, row) for row in rows] if len(rows) > len(line) else [],
        "ancestors": len(rows) - 1,
        "founders": sum(not candidates.parents[row] for row in rows),
    }


def _ancestor(search: Search, row: int) -> dict[str, Any]:
    candidates = search.candidates
    return {
        "row": row,
        "generation": int(candidates.generation_V[row]) + 1,
        "origin": candidates.origin[row],
        "parents": list(dict.fromkeys(candidates.parents[row])),
        "score": percent(float(candidates.accuracy[row])),
        "macs": count(int(candidates.macs[row])),
        "changes": changes(candidates, row, search.costs.space),
    }


def effort(search: Search) -> dict[str, Any]:
    """How many images were scored, against all images for every structure."""
    images, every = search.candidates.images, _all_images(search)
    used, most = int(images.sum()), every * len(search.candidates)
    return {
        "used": f"{used:,}",
        "most": f"{most:,}",
        "saved": percent(1 - used / most),
        "stopped": int((images < every).sum()),
        "every": every,
        "scored": f"{len(search.candidates):,}",
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
