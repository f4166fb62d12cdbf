"""Checkpoints that are whole or not there, verified before they are believed.

A checkpoint is a folder ``step-00000640`` with safetensors files and a ``manifest.json`` that names each file's
SHA-256. It is written under a temporary name, synced, and renamed; the last two are kept. Loading executes nothing
from the files and checks digest, names, shapes and finiteness.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import UserError
from engine.files import free_space, read_json, sha256_file, sha256_json, sync_folder, write_atomically

SCHEMA = "metaprune.checkpoint/1"
KEPT = 2
# Checkpoints are at least this many times their own cost apart: at most 5 % of a run is spent writing them.
COST_SPACING = 20

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: where it is, its manifest, and the digest of each of its files."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps completed."""
        return int(self.manifest["step"])

    def digest(self, stem: str) -> str:
        """SHA-256 of one file of tensors."""
        return str(self.manifest["files"][f"{stem}.safetensors"])

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """Load one file of tensors, or raise `UserError` if it is missing or not what the manifest says."""
        path = self.folder / f"{stem}.safetensors"
        try:
            if self.manifest["files"].get(path.name) != sha256_file(path):
                raise UserError(
                    f"{path} is damaged: its SHA-256 is not the manifest's; restore or delete {self.folder}"
                )
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path}: {error}") from None


def save_checkpoint(root: Path, step: int, files: Mapping[str, Tensors], manifest: Mapping[str, Any]) -> Checkpoint:
    """Write ``root/step-N`` with one safetensors file per entry of ``files``; keep the last two checkpoints."""
    root.mkdir(parents=True, exist_ok=True)
    folder, temporary = root / f"step-{step:08d}", root / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    digests = {}
    for stem, tensors in files.items():
        path = temporary / f"{stem}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        digests[path.name] = sha256_file(path)
    content = {"schema": SCHEMA, "step": step, "files": digests, **manifest}
    content["digest"] = sha256_json(content)
    write_atomically(temporary / "manifest.json", json.dumps(content, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(root)
    for old in sorted(root.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return Checkpoint(folder, content)


def load_checkpoint(root: Path) -> Checkpoint | None:
    """The latest checkpoint in ``root``, its manifest verified, or None if there is none."""
    folders = sorted(root.glob("step-*"))
    if not folders:
        return None
    manifest = read_json(folders[-1] / "manifest.json", "checkpoint manifest")
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"{folders[-1]}: schema {manifest.get('schema')!r} is not supported; this version reads {SCHEMA!r}"
        )
    content = {key: value for key, value in manifest.items() if key != "digest"}
    if manifest.get("digest") != sha256_json(content):
        raise UserError(
            f"{folders[-1]}: the manifest was changed after it was written; restore or delete the checkpoint"
        )
    return Checkpoint(folders[-1], content)


def restore(module: nn.Module, tensors: Tensors, source: Path) -> None:
    """Copy tensors into a module, after checking that names and shapes agree and that all values are finite."""
    own = module.state_dict()
    if set(own) != set(tensors):
        different = sorted(set(own) ^ set(tensors))
        raise UserError(f"{source} does not fit this network: {different[0]} and {len(different) - 1} more differ")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            expected, found = tuple(own[name].shape), tuple(tensor.shape)
            raise UserError(f"{source} does not fit this network: {name} has shape {found}, not {expected}")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{source}: {name} holds values that are not finite; take an earlier checkpoint")
    module.load_state_dict(dict(tensors))


class CheckpointClock:
    """Says when the next checkpoint is due: after an interval, but never so often that saving costs over 5 %."""

    def __init__(self, minutes: float) -> None:
        self.interval, self.cost, self.last = minutes * 60, 0.0, time.monotonic()

    def due(self) -> bool:
        """Whether enough time has passed since the last checkpoint."""
        return time.monotonic() - self.last >= max(self.interval, COST_SPACING * self.cost)

    def saved(self, seconds: float) -> None:
        """Note that a checkpoint was just written, and how long that took."""
        self.cost, self.last = seconds, time.monotonic()


def check_disk_space(folder: Path, needed: int) -> None:
    """Raise `UserError` unless the disk that will hold ``folder`` has ``needed`` bytes free."""
    existing, free = free_space(folder)
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB for its checkpoints and {existing} has {free / 1e9:.1f} GB free; "
            "free some space or choose another folder with --out"
        )
