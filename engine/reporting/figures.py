"""The figures of a report. Each returns an ``svg`` element; values are those the page's tables show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from engine.reporting.svg import FIRST, INK, MUTED, PAPER, RULE, SECOND, STYLE, legend, new_figure, to_svg
from engine.run.searched import Candidates, Scored

ORIGIN_COLOURS = {"random": MUTED, "mutation": FIRST, "crossover": SECOND}


def styled(draw: Callable[..., str]) -> Callable[..., str]:
    """Draw in the style of the page, whatever the style of the process is."""

    @wraps(draw)
    def inner(*arguments: Any, **named: Any) -> str:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*arguments, **named)

    return inner


@styled
def convergence(name: str, percent_by_generation: Mapping[str, Sequence[float]], uniform: float | None) -> str:
    """Best so far, and median and quartiles of every generation, in percent."""
    figure, axes = new_figure()
    best, median = percent_by_generation["best"], percent_by_generation["median"]
    generations = range(1, len(best) + 1)
    lower, upper = percent_by_generation["lower"], percent_by_generation["upper"]
    axes.fill_between(generations, lower, upper, color=FIRST, alpha=0.18, linewidth=0, label="middle half")
    axes.plot(generations, median, color=FIRST, label="median", marker="o", markersize=3.5, linewidth=1.5)
    axes.plot(generations, best, color=SECOND, label="best so far", drawstyle="steps-post")
    axes.plot(generations, best, color=SECOND, linestyle="none", marker="o", markersize=3.5)
    if uniform is not None:
        axes.axhline(uniform, color=INK, linestyle=(0, (2, 2)), linewidth=1.2, label="uniform")
    _generation_axis(axes, len(best))
    axes.set_ylabel("search score, %")
    legend(axes)
    return to_svg(figure, name, "Search score over the generations: best so far, median and middle half")


@styled
def diversity(name: str, distance_by_generation: Sequence[float], random: float) -> str:
    """Mean gene distance within every generation, and that of structures drawn at random."""
    figure, axes = new_figure()
    generations = range(1, len(distance_by_generation) + 1)
    axes.axhline(random, color=INK, linestyle=(0, (2, 2)), linewidth=1.2, label="drawn at random")
    axes.plot(generations, distance_by_generation, color=FIRST, marker="o", markersize=3.5, label="generation")
    _generation_axis(axes, len(distance_by_generation))
    axes.set_ylim(0, 1.15 * max(random, *distance_by_generation))
    axes.set_ylabel("mean gene distance")
    legend(axes)
    return to_svg(figure, name, "Diversity over the generations: mean distance between two structures")


@styled
def scatter(
    name: str,
    cost: tuple[str, Callable[[Scored], Tensor]],
    candidates: Candidates,
    front: Scored | None,
    marked: Mapping[str, tuple[float, float]],
    bounds: Sequence[float],
    joined: bool,
) -> str:
    """Score against a cost (its label, and how to read it): all candidates, the front, and structures by name.

    A front of two objectives is ``joined`` by a line; one of more is no line in any two of them.
    """
    label, read = cost
    figure, axes = new_figure()
    kept = ~candidates.loss.isnan()
    _dots(axes, read(candidates)[kept].tolist(), (100 * candidates.accuracy[kept]).tolist())
    if front is not None:
        order = read(front).argsort(stable=True)
        points = read(front)[order].tolist(), (100 * front.accuracy[order]).tolist()
        line = "-" if joined else "none"
        axes.plot(*points, color=FIRST, marker="o", markersize=4, linestyle=line, linewidth=1.2, label="Pareto front")
    for bound in bounds:
        axes.axvline(bound, color=INK, linestyle=(0, (2, 2)), linewidth=1.2)
    for (what, (x, y)), marker, colour in zip(marked.items(), ("D", "s"), (SECOND, INK), strict=False):
        axes.plot(
            [x], [y], linestyle="none", marker=marker, color=colour, markeredgecolor=PAPER, markersize=8, label=what
        )
    axes.set_xlabel(label)
    axes.set_ylabel("search score, %")
    legend(axes)
    return to_svg(figure, name, f"Search score against {label} of every structure scored")


@styled
def layers(name: str, label: str, values: Mapping[str, Sequence[float]]) -> str:
    """One value a layer: the winner as bars, the full network as bars behind, the uniform structure as ticks."""
    figure, axes = new_figure()
    for what, series in values.items():
        numbers = range(1, len(series) + 1)
        if what == "uniform":
            ticks = [((n - 0.48, value), (n + 0.48, value)) for n, value in zip(numbers, series, strict=True)]
            _segments(axes, ticks, edgecolor=SECOND, linewidth=2, zorder=3)
            axes.plot([], [], color=SECOND, label=what)
        else:
            axes.bar(numbers, series, width=0.84, color=FIRST if what == "winner" else RULE, label=what, zorder=2)
    axes.set_xlim(0.5, max(map(len, values.values())) + 0.5)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(False, axis="x")
    axes.set_xlabel("layer, in order of execution")
    axes.set_ylabel(label)
    legend(axes)
    return to_svg(figure, name, f"{label} of every layer of the winner, the uniform structure and the full network")


@styled
def family(name: str, candidates: Candidates, rows: Sequence[int], line: Sequence[int]) -> str:
    """The ancestors of a structure by generation and score, joined to their parents; the main line in bold."""
    figure, axes = new_figure()
    x = {row: int(candidates.generation_V[row]) + 1 for row in rows}
    y = {row: 100 * float(candidates.accuracy[row]) for row in rows}
    _segments(
        axes,
        [((x[parent], y[parent]), (x[row], y[row])) for row in rows for parent in candidates.parents[row]],
        edgecolor=MUTED,
        linewidth=0.8,
        alpha=0.6,
    )
    axes.plot([x[row] for row in line], [y[row] for row in line], color=INK, linewidth=2, zorder=2)
    for origin, colour in ORIGIN_COLOURS.items():
        own = [row for row in rows if candidates.origin[row] == origin]
        if own:
            points = [x[row] for row in own], [y[row] for row in own]
            style = {"color": colour, "markeredgecolor": PAPER, "markersize": 7}
            axes.plot(*points, linestyle="none", marker="o", label=origin, zorder=3, **style)  # type: ignore[arg-type]
    _generation_axis(axes, max(x.values()))
    axes.set_ylabel("search score, %")
    legend(axes)
    return to_svg(figure, name, "Ancestors of the winner by generation and search score")


def random_distance(choices: int) -> float:
    """Mean normalised distance of two uniform choices out of n: ``(n² - 1) / 3n / (n - 1)``."""
    return (choices + 1) / (3 * choices)


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Quantiles of the numbers among ``values``; NaN if there are none."""
    numbers = values[~values.isnan()]
    return torch.quantile(numbers, numbers.new_tensor(shares)).tolist() if len(numbers) else [torch.nan] * len(shares)


def _generation_axis(axes: Axes, generations: int) -> None:
    axes.set_xlim(0.7, generations + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.set_xlabel("generation")


def _dots(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Points as segments of no length with round ends: a tenth of the bytes of a marker each."""
    axes.plot(x, y, linestyle="none")
    points = list(zip(x, y, strict=True))
    _segments(axes, list(zip(points, points, strict=True)), edgecolor=MUTED, linewidth=3.5, capstyle="round", alpha=0.5)
    axes.plot([], [], linestyle="none", marker="o", color=MUTED, alpha=0.6, markersize=4, label="scored")


def _segments(axes: Axes, segments: Sequence[tuple[tuple[float, float], tuple[float, float]]], **style: Any) -> None:
    """Straight lines, drawn as one path."""
    if segments:
        codes = [Outline.MOVETO, Outline.LINETO] * len(segments)
        corners = [corner for segment in segments for corner in segment]
        axes.add_patch(PathPatch(Outline(corners, codes), fill=False, **{"zorder": 1, **style}))
