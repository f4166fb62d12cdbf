"""Commands on real digits, run in this process or in one of their own, with the smallest settings that do work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from engine import evolve, metatrain, retrain, trust
from engine.run.command import run_command

ROOT = Path(__file__).parents[2]
TINY_NET = ("--hidden", "2", "--steps", "3", "--calibration-images", "32")
TINY_SEARCH: tuple[str, ...] = (
    "--population",
    "4",
    "--mutants",
    "1",
    "--crossovers",
    "2",
    "--parents",
    "2",
    "--generations",
    "2",
)
TINY_SEARCH += ("--calibration-images", "32")
ErrorLine = Callable[[], str]
COMMANDS = {
    "metatrain": (metatrain.main, metatrain.Metatrain),
    "evolve": (evolve.main, evolve.Evolve),
    "retrain": (retrain.main, retrain.Retrain),
    "trust": (trust.main, trust.Trust),
}


def run(name: str, *arguments: object) -> int:
    """Run a command in this process and return its exit status."""
    main, config = COMMANDS[name]
    return run_command(main, config, [str(argument) for argument in arguments])  # type: ignore[arg-type]


def start(name: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    line = [sys.executable, "-m", f"engine.{name}", *map(str, arguments)]
    return subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
