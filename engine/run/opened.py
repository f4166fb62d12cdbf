"""A finished (or unfinished) PruningNet run, opened for use: its data and its network, verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.data import Data, Preprocessing, Splits, open_data
from engine.errors import UserError
from engine.pruningnet import PruningNet
from engine.run.checkpoint import Checkpoint, load_checkpoint, restore
from engine.run.directory import CONFIG, read_config
from engine.run.training import WEIGHTS
from engine.space import Space, architecture, rounded


@dataclass(frozen=True)
class PruningNetRun:
    """A run directory of ``engine.metatrain`` and its latest checkpoint."""

    folder: Path
    checkpoint: Checkpoint
    data_source: str
    cache: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the PruningNet's weights."""
        return self.checkpoint.digest(WEIGHTS)

    @property
    def steps_left(self) -> int:
        """Steps of training that are still missing."""
        return int(self.checkpoint.manifest["steps"]) - self.checkpoint.step

    def space(self, divisor: int = 1) -> Space:
        """The search space the PruningNet was trained for, or the part of it whose widths are multiples."""
        manifest = self.checkpoint.manifest
        return rounded(architecture(manifest["architecture"]).build(len(manifest["classes"])), divisor)

    def data(self, device: torch.device, cache: Path | None = None) -> Data:
        """Its images and splits. Raises `UserError` unless they are prepared as those it was trained with.

        Decoded images are kept in ``cache``; without one, those the run has kept are read where they are whole.
        """
        manifest = self.checkpoint.manifest
        preprocessing = Preprocessing.from_dict(manifest["preprocessing"])
        splits = Splits.load(self.folder / "splits.json")
        if splits.digest != manifest["splits"]:
            raise UserError(f"{self.folder / 'splits.json'} is not the one its PruningNet was trained with")
        data = open_data(
            self.data_source,
            resolution=preprocessing.resolution,
            device=device,
            splits=splits,
            cache=cache or self.cache,
            build_cache=cache is not None,
        )
        if data.preprocessing != preprocessing or list(data.classes) != manifest["classes"]:
            raise UserError(
                f"{self.data_source} gives other preprocessing or classes than {self.folder} was trained with"
            )
        return data

    def net(self, device: torch.device, divisor: int = 1) -> PruningNet:
        """The trained PruningNet, verified."""
        net = PruningNet(self.space(divisor), self.checkpoint.manifest["hidden"], device=device)
        restore(net, self.checkpoint.tensors(WEIGHTS), self.checkpoint.folder)
        return net.eval().requires_grad_(False)


def open_run(folder: Path) -> PruningNetRun:
    """Open a run directory, or raise a `UserError` that says which command makes one."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"there is no PruningNet in {folder}: train one with python -m engine.metatrain, or give --run")
    checkpoint = load_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"the run in {folder} has no checkpoint yet: let python -m engine.metatrain --resume go on")
    options = read_config(folder)["options"]
    return PruningNetRun(folder, checkpoint, options["data"], options.get("cache"))
