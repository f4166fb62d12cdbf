"""Networks trained from scratch in a run, found again by the structure they have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import read_json
from engine.run.directory import read_config
from engine.space.structure import Structure, load_structure


@dataclass(frozen=True)
class Trained:
    """One network trained from scratch: ``correct`` of ``images`` test images, and how it was trained."""

    folder: Path
    structure: Structure
    correct: int
    images: int
    steps: int
    recipe: dict[str, Any]
    options: dict[str, Any]


def find_trained(folders: Iterable[Path], splits: str | None) -> list[Trained]:
    """Finished trainings directly inside ``folders``, on these splits, sorted by folder.

    Raises `UserError` if a result is damaged or not that of the structure beside it.
    """
    found = {path.resolve(): path for folder in folders for path in folder.glob("*/result.json")}
    trained = [_load(path.parent) for path in sorted(found.values())]
    return [network for network in trained if network.structure.splits == splits]


def _load(folder: Path) -> Trained:
    path = folder / "result.json"
    result, structure = read_json(path, "result"), load_structure(folder / "structure.json")
    if result.get("structure") != structure.to_dict()["digest"]:
        raise UserError(f"{path} is not the result of the structure beside it: train it again")
    numbers = [result.get(name) for name in ("test_correct", "test_images", "steps")]
    correct, images, steps = (n if type(n) is int else -1 for n in numbers)
    recipe = result.get("recipe")
    if not 0 <= correct <= images or images < 1 or steps < 0 or not isinstance(recipe, dict):
        raise UserError(f"{path} is damaged: train the structure again")
    return Trained(folder, structure, correct, images, steps, recipe, read_config(folder)["options"])
