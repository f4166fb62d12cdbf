"""Scores remembered across searches and budgets."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import sha256_json
from engine.population import Scores
from engine.racing import Race
from engine.stages import stage

# Scores a population ``[P, G]`` pass by pass: positions, and what they answered.
Scorer = Callable[[Tensor, Race | None], Iterator[tuple[Tensor, Scores]]]


class Entry(NamedTuple):
    """A genome's score on so many images; ``right`` has one bit an image, the first one highest."""

    correct: int
    loss: float
    images: int
    right: bytes


class ScoreCache:
    """Scores of one PruningNet, remembered across searches and budgets: ``RUN/scores/KEY.jsonl``.

    ``key`` says what a score depends on besides the genome (`Scoring.cache_key`); ``images`` is how many a whole
    score takes. Scores cut short by a race are for this search alone. A line cut short by a crash is dropped.
    """

    def __init__(self, run: Path, key: Mapping[str, str | int], images: int) -> None:
        self.path = run / "scores" / f"{sha256_json({**key, 'images': images})[:16]}.jsonl"
        self.images = images
        self.scores: dict[tuple[int, ...], Entry] = {}
        self.raced: dict[tuple[int, ...], Entry] = {}
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
                self.scores[tuple(entry["genome"])] = self._read(entry)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise UserError(f"{self.path}, line {number} is damaged: delete the file to score anew") from None
        if lines and lines[-1]:
            with self.path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:-1]))

    def _read(self, entry: dict[str, Any]) -> Entry:
        right = base64.b64decode(entry["right"], validate=True)
        correct = int(entry["correct"])
        if len(right) != -(-self.images // 8) or int.from_bytes(right, "big").bit_count() != correct:
            raise ValueError("the images it is right about are not as many as it says")
        return Entry(correct, float(entry["loss"]), self.images, right)

    def score_missing(self, scorer: Scorer, genome_PG: Tensor, race: Race | None = None) -> Iterator[int]:
        """Score the genomes that are not known, yielding how many each pass added once they are on disk.

        Without a race a score that a race cut short does not count.
        """
        known = self.scores if race is None else {**self.scores, **self.raced}
        missing = [row for row in genome_PG.tolist() if tuple(row) not in known]
        if not missing:
            return
        genome_MG = genome_PG.new_tensor(missing)
        for members, scores in scorer(genome_MG, race):
            self.add(genome_MG[members], scores.right_PN & scores.seen_PN, scores.correct, scores.loss, scores.images)
            yield len(members)

    def add(self, genome_PG: Tensor, right_PN: Tensor, correct_P: Tensor, loss_P: Tensor, images_P: Tensor) -> None:
        """Remember what genomes scored: which images they are right about, bool ``[P, N]``, how many, and the loss."""
        columns = (correct_P.tolist(), loss_P.tolist(), images_P.tolist(), np.packbits(right_PN.cpu().numpy(), axis=1))
        self.path.parent.mkdir(exist_ok=True)
        with stage("state file"), self.path.open("a", encoding="utf-8") as file:
            for row, correct, loss, images, bits in zip(genome_PG.tolist(), *columns, strict=True):
                entry = Entry(correct, loss, images, bits.tobytes())
                if images < self.images:
                    self.raced[tuple(row)] = entry
                    continue
                self.scores[tuple(row)] = entry
                right = base64.b64encode(entry.right).decode()
                file.write(json.dumps({"genome": row, "correct": correct, "loss": loss, "right": right}) + "\n")

    def knows_any(self, genome_PG: Tensor) -> bool:
        """Whether one of these genomes was scored."""
        return any(tuple(row) in self.scores for row in genome_PG.tolist())

    def lookup(self, genome_PG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Correct images, loss, and the number of images of genomes that were scored, ``[P]`` each."""
        entries = [self.scores.get(tuple(row)) or self.raced[tuple(row)] for row in genome_PG.tolist()]
        correct_P, images_P = (genome_PG.new_tensor([entry[i] for entry in entries]) for i in (0, 2))
        loss = [entry.loss for entry in entries]
        return correct_P, torch.tensor(loss, dtype=torch.float64, device=genome_PG.device), images_P

    def right(self, genome_G: Tensor) -> Tensor:
        """Which images a genome that was scored on all of them is right about, bool ``[N]``."""
        bits = np.frombuffer(self.scores[tuple(genome_G.tolist())].right, np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self.images).astype(bool))
