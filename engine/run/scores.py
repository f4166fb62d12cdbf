"""Scores remembered across searches and budgets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import sha256_json
from engine.population import ScoringImages, score_passes
from engine.pruningnet import PruningNet


class ScoreCache:
    """Scores of one PruningNet, remembered across searches and budgets: ``RUN/scores/KEY.jsonl``.

    ``key`` says what a score depends on besides the genome: PruningNet, splits, calibration, precision, device
    and kernels.
    A line cut short by a crash is dropped.
    """

    def __init__(self, run: Path, key: Mapping[str, str | int]) -> None:
        self.path = run / "scores" / f"{sha256_json(key)[:16]}.jsonl"
        self.scores: dict[tuple[int, ...], tuple[int, float]] = {}
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
                self.scores[tuple(entry["genome"])] = (int(entry["correct"]), float(entry["loss"]))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise UserError(f"{self.path}, line {number} is damaged: delete the file to score anew") from None
        if lines and lines[-1]:
            with self.path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:-1]))

    def score_missing(
        self, net: PruningNet, genome_PG: Tensor, images: ScoringImages, memory: int | None = None
    ) -> Iterator[int]:
        """Score the genomes that are not cached, yielding how many each pass added once they are on disk.

        ``memory``: see `engine.population.score_passes`.
        """
        missing = [row for row in genome_PG.tolist() if tuple(row) not in self.scores]
        if not missing:
            return
        self.path.parent.mkdir(exist_ok=True)
        genome_MG = genome_PG.new_tensor(missing)
        for members, scores in score_passes(net, genome_MG, images, memory):
            with self.path.open("a", encoding="utf-8") as file:
                for row, correct, loss in zip(
                    genome_MG[members].tolist(), scores.correct.tolist(), scores.loss.tolist(), strict=True
                ):
                    self.scores[tuple(row)] = (correct, loss)
                    file.write(json.dumps({"genome": row, "correct": correct, "loss": loss}) + "\n")
            yield len(members)

    def lookup(self, genome_PG: Tensor) -> tuple[Tensor, Tensor]:
        """Correct images and loss of genomes that were scored."""
        correct, loss = zip(*(self.scores[tuple(row)] for row in genome_PG.tolist()), strict=True)
        return genome_PG.new_tensor(correct), torch.tensor(loss, dtype=torch.float64, device=genome_PG.device)
