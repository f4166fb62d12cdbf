"""How structures of a run are scored: with its PruningNet, on its images, and with the settings that decide a score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.data import Data
from engine.errors import UserError
from engine.population import Scores, ScoringImages, score_passes, scoring_images
from engine.pruningnet import PruningNet
from engine.racing import Race
from engine.run.machine import machine_facts
from engine.run.opened import PruningNetRun
from engine.run.training import keep_freed_memory
from kernels import backends

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What decides a score besides PruningNet, images and genome: options of ``engine.evolve``."""

    calibration_images: int
    precision: str
    backend: str
    divisor: int

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """Those among the options of a search. Raises `UserError` if one is missing or of another type."""
        values: dict[str, Any] = {name: options.get(name) for name in cls.__dataclass_fields__}
        words = isinstance(values["backend"], str) and values["precision"] in DTYPES
        if not words or not all(type(values[n]) is int and values[n] >= 1 for n in ("calibration_images", "divisor")):
            raise UserError(f"these settings are not those of a search: {values}")
        return cls(**values)


@dataclass(frozen=True)
class Scoring:
    """A PruningNet and images ready to score, in ``memory`` bytes of activations.

    ``key`` says what a score depends on besides the genome.
    """

    net: PruningNet
    images: ScoringImages
    key: Mapping[str, str | int]
    device: torch.device
    memory: int

    @property
    def cache_key(self) -> dict[str, str | int]:
        """What the bits of a score depend on besides the genome: ``key``, the machine, and its kernels."""
        return {**self.key, **machine_facts(self.device), "kernels": backends.digest()}

    def score(
        self, genome_PG: Tensor, race: Race | None = None, positions: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Scores]]:
        """Score a population pass by pass: `engine.population.score_passes`."""
        return score_passes(self.net, genome_PG, self.images, self.memory, race, positions)


def open_scoring(run: PruningNetRun, data: Data, memory: int, settings: Settings) -> Scoring:
    """Open the PruningNet of a run for scoring with these settings on its opened images, where they live."""
    device = data.device
    images = scoring_images(data, settings.calibration_images)
    keep_freed_memory()
    net = run.net(device, settings.divisor).to_precision(DTYPES[settings.precision])
    key: dict[str, str | int] = {
        "pruningnet": run.digest, "splits": data.splits.digest, "calibration": len(images.calibration_NCHW),
        "precision": settings.precision, "device": device.type, "backend": settings.backend,
        "divisor": settings.divisor,
    }  # fmt: skip
    return Scoring(net, images, key, device, memory)
