"""Structures trained from scratch for several seeds, with what each network answers to the test images kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from engine.data import Data
from engine.errors import UserError
from engine.files import read_json, sha256_json, write_atomically
from engine.retrain import from_scratch, measured, right_answers
from engine.run.options import TrainingOptions
from engine.run.subjects import Subject
from engine.run.training import train
from engine.space.costs import format_count


def train_repeatedly(
    options: TrainingOptions, seeds: int, subjects: Sequence[Subject], out: Path, data: Data, console: Console
) -> Tensor:
    """Train every structure with ``--seed`` and the seeds that follow it, all structures with the first one first.

    Results go to ``out/STRUCTURE/seed-N/result.json``; what is there is not trained again. Returns which test images
    each training answers right, bool ``[M, K, N]``.
    """
    numbers = range(options.seed, options.seed + seeds)
    missing = [
        (seed, subject) for seed in numbers for subject in subjects if not _result_path(out, subject, seed).exists()
    ]
    began, work = time.monotonic(), [subject.structure.macs for _, subject in missing]
    for number, (seed, subject) in enumerate(missing):
        left = ""
        if number:
            seconds = (time.monotonic() - began) * sum(work[number:]) / sum(work[:number])
            left = f"; about {seconds / 60:.0f} min left"
        console.print(
            f"training {number + 1}/{len(missing)}: {subject.name}, {format_count(subject.structure.macs)} MACs, "
            f"seed {seed}{left}",
            highlight=False,
            soft_wrap=True,
        )
        _train_one(options, subject, seed, out, data, console)
    return torch.stack(
        [torch.stack([_read_answers(out, subject, seed, data) for seed in numbers]) for subject in subjects]
    )


def _train_one(options: TrainingOptions, subject: Subject, seed: int, out: Path, data: Data, console: Console) -> None:
    """Train one structure with one seed, from its checkpoint if there is one, and keep what it answers."""
    path = _result_path(out, subject, seed)
    path.parent.mkdir(exist_ok=True)
    training = from_scratch(dataclasses.replace(options, seed=seed), subject.structure, path.parent, data)
    train(training, console)
    right_N = right_answers(training.module, data).cpu()
    content = {
        **measured(training, subject.structure, int(right_N.sum())),
        "right": "".join("01"[right] for right in right_N.tolist()),
    }
    write_atomically(path, json.dumps({**content, "digest": sha256_json(content)}, indent=2) + "\n")
    shutil.rmtree(training.checkpoints)


def _result_path(out: Path, subject: Subject, seed: int) -> Path:
    return out / subject.name / f"seed-{seed}" / "result.json"


def _read_answers(out: Path, subject: Subject, seed: int, data: Data) -> Tensor:
    """Which test images a finished training answered right, bool ``[N]``. Raises `UserError` if it is not its own."""
    path = _result_path(out, subject, seed)
    content = read_json(path, "result of a training")
    digest, right = content.pop("digest", None), content.get("right")
    own = (content.get("structure"), content.get("seed")) == (subject.structure.to_dict()["digest"], seed)
    whole = isinstance(right, str) and len(right) == len(data.subset("test")) and set(right) <= {"0", "1"}
    if digest != sha256_json(content) or not own or not whole:
        raise UserError(f"{path} is damaged or of another training: delete it and resume")
    return torch.tensor([answer == "1" for answer in str(right)])
