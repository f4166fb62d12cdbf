"""How a search went: convergence, everything it scored, where its winner comes from, and what scoring took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from engine.evolution import ranking
from engine.reporting import figures
from engine.reporting.lineage import ancestors, changes, diversity, main_line
from engine.reporting.text import count, percent
from engine.run.search_state import COST_COLUMNS
from engine.run.searched import Candidates, Scored, Search

# How to read and label what a budget bounds.
AXES: dict[str, tuple[str, float]] = {
    "flops": ("million MACs", 1e6),
    "params": ("million parameters", 1e6),
    "memory_peak": ("peak activation memory, MB", 1e6),
    "latency": ("latency, ms", 1.0),
}
BEST_SHOWN = 8


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
    wanted = [name for name in AXES if name in named or COST_COLUMNS[name] in named] or ["flops"]
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
            cost = float(getattr(search.costs, COST_COLUMNS[name])(genome_1G)) / scale
            marked["uniform"] = (cost, 100 * score["correct"] / score["images"])
        axis, joined = (label, _reader(name)), len(search.objectives) <= 2
        svg = figures.scatter(f"{key}-{name}", axis, search.candidates, search.front, marked, bounds, joined)
        drawn.append((Markup(svg), bool(bounds)))
    return drawn


def _reader(name: str) -> Callable[[Scored], Tensor]:
    return lambda table: getattr(table, COST_COLUMNS[name]).double() / AXES[name][1]


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
