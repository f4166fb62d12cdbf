"""Write what a search found as one HTML file that needs nothing else.

    python -m engine.report runs/mobilenet_v1-digits/search-300M      # one search
    python -m engine.report runs/mobilenet_v1-digits                  # every finished search of a run

The page holds its figures and its style, asks for nothing from the network and runs no script. The same search gives
the same bytes.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from jinja2 import Environment, PackageLoader, StrictUndefined

from engine.errors import UserError
from engine.files import write_atomically
from engine.reporting import commands, content, history
from engine.reporting.trust import trust
from engine.run.command import Options, run_command
from engine.run.directory import CONFIG
from engine.run.searched import is_finished, is_search, load_search
from engine.run.trained import find_trained
from engine.versions import NOT_INSTALLED, versions_of

REPORT = "report.html"
# How every report begins, and nothing else is overwritten.
OPENING = '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="metaprune'
PACKAGES = ("metaprune", "torch", "matplotlib", "jinja2")


@dataclass(frozen=True, kw_only=True)
class Report(Options):
    """Write what a search found as one HTML file that needs nothing else."""

    what: Annotated[Path, tyro.conf.Positional]
    """A search folder, or a run directory for all its finished searches."""
    out: Path | None = None
    """The file to write (default: report.html in that folder)."""
    overwrite: bool = False
    """Replace the report that is there."""


def main(options: Report) -> None:
    """Run the command."""
    out = options.out or options.what / REPORT
    finished, unfinished = find_searches(options.what)
    check_out(out, options.overwrite)
    page = render(options.what, finished, unfinished)
    write_atomically(out, page)
    print(f"report: {out}")


def find_searches(folder: Path) -> tuple[list[Path], list[Path]]:
    """The finished and the unfinished searches a report of this folder is about.

    Raises `UserError` if it is neither a search nor a run with a finished one.
    """
    if is_search(folder):
        return [folder], []
    searches = [path for path in sorted(folder.glob("*/")) if is_search(path)] if folder.is_dir() else []
    finished = [path for path in searches if is_finished(path)]
    if not finished:
        run = (folder / CONFIG).is_file()
        raise UserError(
            f"there is no finished search in {folder}: "
            + ("search with python -m engine.evolve" if run else "give a search folder or a run directory")
        )
    return finished, [path for path in searches if not is_finished(path)]


def check_out(out: Path, overwrite: bool) -> None:
    """Raise `UserError` unless ``out`` is new, or a report that may be replaced."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give a file")
    if out.exists():
        with out.open("rb") as file:
            is_report = file.read(len(OPENING)) == OPENING.encode()
        if not is_report:
            raise UserError(f"{out} exists and is no report: choose another file with --out")
        if not overwrite:
            raise UserError(f"{out} exists: add --overwrite to replace it, or choose another file with --out")


def render(what: Path, finished: Sequence[Path], unfinished: Sequence[Path]) -> str:
    """The page about some searches."""
    environment = Environment(
        loader=PackageLoader("engine", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    sections = [section(folder, f"s{number}") for number, folder in enumerate(finished, start=1)]
    return environment.get_template("report.html.jinja").render(
        name=what.resolve().name,
        sections=sections,
        unfinished=[path.name for path in unfinished],
        versions=versions(),
    )


def section(folder: Path, key: str) -> dict[str, Any]:
    """Everything the page says about one search; ``key`` makes its anchors its own."""
    search = load_search(folder)
    run = commands.run_of(search)
    trained = find_trained(content.folders_of(search, run), search.structure.splits)
    return {
        "key": key,
        "name": folder.resolve().name,
        "description": content.describe(search),
        "lead": content.lead(search),
        "result": content.result(search, trained),
        "convergence": history.convergence(search, key),
        "scatters": history.scatters(search, key),
        "best": history.best(search),
        "front": content.front(search),
        "layers": content.layers(search, key),
        "lineage": history.lineage(search, key),
        "effort": history.effort(search),
        "trust": trust(folder / "trust" / "trust.json"),
        "made_by": commands.made_by(search, run, trained),
        "next": commands.to_run_next(search, run, trained),
        "digests": content.digests(search),
    }


def versions() -> list[tuple[str, str]]:
    """Versions of what wrote the report."""
    found = {"python": platform.python_version()} | versions_of(PACKAGES)
    return [(name, version) for name, version in found.items() if version != NOT_INSTALLED]


if __name__ == "__main__":
    sys.exit(run_command(main, Report))
