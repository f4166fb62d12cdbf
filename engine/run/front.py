"""The result of a Pareto search on disk.

OUT/front/001.json …   the structures of the front, in the order they are given
OUT/front.csv          one row for each: its file, its score and its costs
OUT/front.png          accuracy over the first cost, with everything that was scored behind
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import csv_text, sync_folder, write_atomically
from engine.space.structure import Structure

FRONT = "front"
TABLE, PICTURE = "front.csv", "front.png"
STRUCTURE_FILE = re.compile(r"\d{3,}\.json")

Columns = Mapping[str, Sequence[Any]]

# What a picture calls a cost, and its unit in those of the column.
COSTS = {
    "macs": ("M MACs", 1e6),
    "parameters": ("M parameters", 1e6),
    "peak_activation_bytes": ("MB of activations at the peak", 1e6),
    "latency_ms": ("latency in ms", 1),
}


def write_front(
    out: Path,
    structures: Sequence[Structure],
    columns: Columns,
    scored: Columns,
    uniform: Columns | None = None,
    cost: str = "macs",
) -> None:
    """Write the front to ``out``, in place of an earlier one.

    ``columns`` are those of ``front.csv`` after ``file``, one value for each structure. The picture is over the
    column ``cost`` of `COSTS`; ``scored`` and ``uniform`` hold that, ``correct`` and ``images`` of all that was
    scored and of the uniform structures.

    At every moment ``front/`` holds the old front or the new one, whole (but for the one between two renames, when the
    old one is ``.front.replaced/``), and a table or picture that is there is of that front. Whatever else lies in the
    folder, a retrained network for instance, stays. Raises `ValueError` for columns that do not fit the structures,
    before anything is written.
    """
    files = [f"{number:03d}.json" for number in range(1, len(structures) + 1)]
    table = csv_text({"file": [f"{FRONT}/{file}" for file in files], **columns})
    picture = front_picture(columns, scored, uniform, cost)
    folder, new, replaced = out / FRONT, out / f".{FRONT}.new", out / f".{FRONT}.replaced"
    _clear_up(folder, replaced)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for file, structure in zip(files, structures, strict=True):
        structure.save(new / file)
    for stale in (TABLE, PICTURE):
        (out / stale).unlink(missing_ok=True)
    if folder.exists():
        folder.rename(replaced)
    new.rename(folder)
    sync_folder(out)
    write_atomically(out / TABLE, table)
    write_atomically(out / PICTURE, picture)
    _clear_up(folder, replaced)


def _clear_up(folder: Path, replaced: Path) -> None:
    """Delete a front that was replaced, all but what is no structure of it; one that was not replaced comes back."""
    if not replaced.exists():
        return
    if not folder.exists():
        replaced.rename(folder)
        return
    for path in replaced.iterdir():
        if not STRUCTURE_FILE.fullmatch(path.name) and not (folder / path.name).exists():
            path.rename(folder / path.name)
    shutil.rmtree(replaced)


def front_picture(front: Columns, scored: Columns, uniform: Columns | None = None, cost: str = "macs") -> bytes:
    """A PNG of the accuracy in % over a cost: the same bytes for the same points and version of matplotlib."""
    # Importing it takes a third of a second, which only this is worth.
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    label, unit = COSTS[cost]
    picture = io.BytesIO()
    # A figure of its own, drawn as matplotlib comes: nothing global is read or left changed.
    with style.context("default"):
        figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
        axes = FigureCanvasAgg(figure).figure.add_subplot()
        axes.plot(*_points(scored, cost, unit), ".", color="0.75", markersize=4, label="scored")
        if uniform is not None:
            axes.plot(*_points(uniform, cost, unit), "--s", color="tab:orange", markersize=4, label="uniform")
        x, y = _points(front, cost, unit)
        axes.plot(x, y, "o", color="tab:blue", markersize=5, label="front")
        # In a search for more than two objectives the others lie below, on the front for another cost's sake.
        best = y > np.maximum.accumulate(np.concatenate([[-np.inf], y[:-1]]))
        axes.plot(x[best], y[best], color="tab:blue")
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy in %")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.legend(loc="lower right")
        figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _points(columns: Columns, cost: str, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """Cost in units and accuracy in %, from the least cost to the greatest, the more accurate of equals first."""
    x = np.asarray(columns[cost], dtype=float) / unit
    y = 100 * np.asarray(columns["correct"], dtype=float) / np.asarray(columns["images"], dtype=float)
    order = np.lexsort((-y, x))
    return x[order], y[order]
