"""Figures as inline SVG that takes its colours and fonts from the page, the same bytes every time.

matplotlib draws with stand-in colours; here they become CSS variables, so a figure follows a page into dark mode.
What refers outside the figure (namespaces, metadata, clip paths) is taken out.
"""

from __future__ import annotations

import html
import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Stand-ins, and the CSS variables they become.
INK, MUTED, RULE, FIRST, SECOND, PAPER = (f"#0{n}0f0e" for n in range(1, 7))
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", FIRST: "first", SECOND: "second", PAPER: "paper"}
LONG_FRACTION = re.compile(r"(\.\d\d)\d+")
INCHES = (6.0, 3.7)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "path.simplify": False,
    "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.linewidth": 0.8, "axes.labelsize": 11, "grid.color": RULE, "grid.linewidth": 0.8,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.major.size": 3, "ytick.major.size": 0, "lines.linewidth": 2, "lines.markersize": 5,
    "legend.frameon": False, "legend.fontsize": 11, "legend.handlelength": 1.4, "legend.columnspacing": 1.2,
    "legend.borderpad": 0, "legend.borderaxespad": 0.2, "figure.facecolor": "none",
}  # fmt: skip


def new_figure(rows: float = 1) -> tuple[Figure, Axes]:
    """A figure with one set of axes, ``rows`` times as tall as usual. Call inside ``matplotlib.rc_context(STYLE)``."""
    figure = Figure(figsize=(INCHES[0], INCHES[1] * rows), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def legend(axes: Axes, columns: int = 4) -> None:
    """A legend above the axes, from their left edge."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns)


def to_svg(figure: Figure, name: str, title: str) -> str:
    """An ``svg`` element for a page. ``name`` makes its ids its own; ``title`` is what a screen reader says."""
    written = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(written, format="svg", metadata=metadata)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    head = f'<svg {box[0]} role="img" aria-label="{html.escape(title)}">'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>|<clipPath.*?</clipPath>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' clip-path="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"\*\{stroke-linejoin: round; stroke-linecap: butt\}", "", text)
    text = re.sub(r"<defs>\s*(<style type=\"text/css\"></style>)?\s*</defs>", "", text)
    text = re.sub(r" ?font-family: [^;\"]*;", "", text)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda m: LONG_FRACTION.sub(r"\1", m[0]), text)
    used = set(re.findall(r'href="#([^"]+)"', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = text.replace('href="#', f'href="#{name}-')
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text).strip()
