"""What a search leaves on disk after every generation: ``candidates.csv`` to read, ``state.json`` to resume from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from engine.errors import UserError
from engine.evolution import Origin, SearchState
from engine.files import read_json, sha256_json, write_atomically
from engine.space.costs import CostModel

SCHEMA = "metaprune.search/1"
STATE = "state.json"

Identity = Mapping[str, str | int]


def save_state(out: Path, state: SearchState, costs: CostModel, images: int, identity: Identity) -> None:
    """Write both files; ``images`` is how many a structure is scored on, ``identity`` what the scores belong to."""
    columns = {
        "generation": state.generation_V.tolist(),
        "origin": [Origin(origin).name.lower() for origin in state.origin_V.tolist()],
        "correct": state.correct.tolist(),
        "images": [images] * len(state.correct),
        "loss": state.loss.tolist(),
        "macs": costs.macs(state.genome_VG).tolist(),
        "parameters": costs.parameters(state.genome_VG).tolist(),
        "peak_activation_bytes": costs.peak_activation_bytes(state.genome_VG).tolist(),
        "genome": [" ".join(map(str, row)) for row in state.genome_VG.tolist()],
    }
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomically(out / "candidates.csv", table.getvalue())
    content = {
        "schema": SCHEMA,
        **identity,
        "seed": state.seed,
        "generation": state.generation,
        "genomes": state.genome_VG.tolist(),
        "origins": state.origin_V.tolist(),
        "generations": state.generation_V.tolist(),
        "correct": state.correct.tolist(),
        "loss": state.loss.tolist(),
    }
    write_atomically(out / STATE, json.dumps({**content, "digest": sha256_json(content)}) + "\n")


def load_state(out: Path, identity: Identity, device: torch.device) -> SearchState | None:
    """Read and verify ``state.json``; None if the search was stopped before its first generation was scored.

    Raises `UserError` if the file is damaged or belongs to another PruningNet, other splits or another budget.
    """
    path = out / STATE
    if not path.exists():
        return None
    content = read_json(path, "search state")
    digest = content.pop("digest", None)
    if content.get("schema") != SCHEMA or digest != sha256_json(content):
        raise UserError(f"{path} is damaged or of another version: start the search anew with --overwrite")
    for name, value in identity.items():
        if content.get(name) != value:
            raise UserError(f"{path} is of another {name}: start the search anew with --overwrite")

    def column(name: str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(content[name], dtype=dtype, device=device)

    return SearchState(
        seed=content["seed"],
        generation=content["generation"],
        genome_VG=column("genomes"),
        origin_V=column("origins"),
        generation_V=column("generations"),
        correct=column("correct"),
        loss=column("loss", torch.float64),
    )
