"""The whole job on real handwritten digits, in minutes on two cores.

    python -m engine.demo

Trains a PruningNet of MobileNetV1, searches the best structure under 300 M MACs, and trains it from scratch next to
the uniform structure of equal MACs. It runs the same commands a user would, with shorter schedules.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.metatrain import RUNS
from engine.run.command import Options, run_command
from engine.run.directory import CONFIG
from engine.space.costs import format_count
from engine.space.structure import load_structure

BUDGET = "300M"
METATRAIN = ("--epochs", "30")
EVOLVE = ("--population", "20", "--mutants", "10", "--crossovers", "10", "--parents", "5", "--generations", "4")
RETRAIN = ("--epochs", "15")


@dataclass(frozen=True, kw_only=True)
class Demo(Options):
    """Run the whole job on real handwritten digits: PruningNet, search under 300 M MACs, training from scratch."""

    out: Path = RUNS / "demo"
    """Run directory; the demo that is there is replaced."""


class CommandFailedError(SystemExit):
    """One of the commands failed, and has said why."""


def main(options: Demo) -> None:
    """Run the command."""
    run, began = options.out, time.monotonic()
    search = run / f"search-{BUDGET}"
    replace = ["--overwrite"] if (run / CONFIG).is_file() else []
    _command("metatrain", "--out", str(run), *METATRAIN, *replace)
    _command("evolve", "--flops", BUDGET, "--run", str(run), *EVOLVE)
    trained = {"best": search / "retrained", "uniform": run / f"uniform-{BUDGET}"}
    _command("retrain", "--run", str(run), "--structure", str(search / "structure.json"), *RETRAIN)
    _command("retrain", "--run", str(run), "--uniform", BUDGET, *RETRAIN)

    table = Table(title=f"MobileNetV1 on handwritten digits, budget {BUDGET} MACs")
    for heading in ("structure", "MACs", "parameters", "search score", "test accuracy"):
        table.add_column(heading, justify="left" if heading == "structure" else "right")
    for name, file in (("best", "structure.json"), ("uniform", "uniform.json")):
        result = json.loads((trained[name] / "result.json").read_text(encoding="utf-8"))
        score = load_structure(search / file).score or {}
        table.add_row(
            name,
            format_count(result["macs"]),
            format_count(result["parameters"]),
            f"{100 * score['correct'] / score['images']:.1f} %",
            f"{100 * result['test_accuracy']:.1f} % ({result['test_correct']}/{result['test_images']})",
        )
    console = Console()
    console.print(table)
    for what, path in (
        ("PruningNet", run),
        ("structure", search / "structure.json"),
        ("everything scored", search / "candidates.csv"),
        ("trained networks", f"{trained['best']}, {trained['uniform']}"),
    ):
        console.print(f"{what}: {path}", highlight=False, soft_wrap=True)
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes", highlight=False, soft_wrap=True)


def _command(name: str, *arguments: str) -> None:
    print(f"\n$ python -m engine.{name} {' '.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, "-m", f"engine.{name}", *arguments], check=False).returncode
    if status:
        raise CommandFailedError(status)


if __name__ == "__main__":
    sys.exit(run_command(main, Demo))
