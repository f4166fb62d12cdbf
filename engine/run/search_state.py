"""What a search leaves on disk after every generation: ``candidates.csv`` to read, ``state.json`` to resume from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.evolution import Origin, SearchState
from engine.files import csv_text, read_sealed, sha256_json, write_atomically
from engine.space.budget import Quantity

SCHEMA = "metaprune.search/2"
STATE = "state.json"

Identity = dict[str, Any]
# The columns of the costs of a structure.
COST_COLUMNS = {
    "flops": "macs", "params": "parameters", "memory_peak": "peak_activation_bytes", "latency": "latency_ms",
}  # fmt: skip


def save_state(out: Path, state: SearchState, costs: Mapping[str, Quantity], identity: Identity) -> None:
    """Write both files; ``costs`` are the quantities to list, ``identity`` what the scores belong to."""
    columns = {
        "generation": state.generation_V.tolist(),
        "origin": [Origin(origin).name.lower() for origin in state.origin_V.tolist()],
        "parents": [" ".join(str(parent) for parent in row if parent >= 0) for row in state.parent_V2.tolist()],
        **columns_of(state, torch.arange(len(state.correct)), costs),
    }
    write_atomically(out / "candidates.csv", csv_text(columns))
    content = {
        "schema": SCHEMA,
        **identity,
        "seed": state.seed,
        "generation": state.generation,
        "genomes": state.genome_VG.tolist(),
        "origins": state.origin_V.tolist(),
        "generations": state.generation_V.tolist(),
        "parents": state.parent_V2.tolist(),
        "correct": state.correct.tolist(),
        "loss": state.loss.tolist(),
        "images": state.images.tolist(),
    }
    write_atomically(out / STATE, json.dumps({**content, "digest": sha256_json(content)}) + "\n")


def columns_of(state: SearchState, chosen: Tensor, costs: Mapping[str, Quantity]) -> dict[str, list[Any]]:
    """Score, costs (on the host) and genome of some genomes told, as columns of a table."""
    # Costs for a file are those on the host: a GPU is not asked for each of them.
    genome_PG = state.genome_VG[chosen].cpu()
    return {
        "correct": state.correct[chosen].tolist(),
        "images": state.images[chosen].tolist(),
        "loss": state.loss[chosen].tolist(),
        **{COST_COLUMNS[name]: cost.of(genome_PG).tolist() for name, cost in costs.items()},
        "genome": [" ".join(map(str, row)) for row in genome_PG.tolist()],
    }


def load_state(out: Path, identity: Identity, device: torch.device) -> SearchState | None:
    """Read and verify ``state.json``; None if the search was stopped before its first generation was scored.

    Raises `UserError` if the file is damaged or belongs to another PruningNet, other splits or another budget.
    """
    path = out / STATE
    if not path.exists():
        return None
    content = read_sealed(path, "search state", SCHEMA, "start the search anew with --overwrite")
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
        parent_V2=column("parents").reshape(-1, 2),
        correct=column("correct"),
        loss=column("loss", torch.float64),
        images=column("images"),
    )
