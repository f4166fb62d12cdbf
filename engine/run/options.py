"""The options that training commands share, checked and turned into a recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError
from engine.run.command import Options
from engine.run.metrics import check_tensorboard
from engine.space.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """How long, how fast, and where to train."""

    epochs: int | None = None
    """Passes over the training images (default: the paper's)."""
    steps: int | None = None
    """Steps, instead of epochs."""
    batch: int | None = None
    """Images per step (default: the paper's; 64 on fewer than 20,000 images)."""
    lr: float | None = None
    """First learning rate (default: the paper's; smaller on fewer than 20,000 images)."""
    weight_decay: float | None = None
    """Weight decay (default: the paper's)."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu or cuda."""
    cache: Path | None = None
    """Folder that keeps the decoded images of a class folder: later epochs and runs decode none. Made and renewed as
    needed; takes 0.2 MB per image at 224 px. Commands that use this run read it too (default: decode every time)."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    resume: bool = False
    """Continue an interrupted run, bit for bit."""
    overwrite: bool = False
    """Replace the run in the output folder."""

    def check(self) -> None:
        """Raise `UserError` for a value that makes no sense, before any work."""
        require_at_least(self, {"epochs": 1, "steps": 1, "batch": 2, "seed": 0})
        if self.epochs is not None and self.steps is not None:
            raise UserError("--epochs and --steps say the same thing: give one of them")
        for name in ("lr", "weight_decay", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} {value}: a number from 0")
        if self.tensorboard:
            check_tensorboard()

    def recipe(self, default: Recipe) -> Recipe:
        """The recipe with the options that were given in place of its own values."""
        given = {name: getattr(self, name) for name in ("epochs", "batch", "lr", "weight_decay")}
        return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})


def require_at_least(options: Options, least: dict[str, int]) -> None:
    """Raise `UserError` for the first option below its least value; options left at None pass."""
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least {minimum}")
