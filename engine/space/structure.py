"""The artefact of a search: ``structure.json``, one pruned network by name and width, written and verified."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import read_json, sha256_json, write_atomically
from engine.space import Space, architecture, max_width, rounded
from engine.space.costs import Convention, CostModel, cost_model
from engine.space.space import IMAGE, IMAGE_CHANNELS

SCHEMA = "metaprune.structure/2"
INTEGERS = ("classes", "divisor", "resolution", "macs", "parameters", "flops_resolution")


@dataclass(frozen=True)
class Structure:
    """One pruned network: what it is, what it costs, and where its score comes from.

    ``divisor`` is what its searched widths are multiples of; ``resolution`` that of the images it is trained on, in
    pixels; ``macs`` are counted at ``flops_resolution`` in ``flops_convention``. ``score`` says how the PruningNet
    judged it (``correct`` of ``images``, ``loss``, on which split, after which calibration), or is None.
    ``pruningnet`` and ``splits`` are SHA-256 digests of what it was scored with.
    """

    architecture: str
    classes: int
    divisor: int
    resolution: int
    genome: tuple[int, ...]
    macs: int
    parameters: int
    flops_resolution: int
    flops_convention: Convention
    score: Mapping[str, Any] | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    pruningnet: str | None = None
    splits: str | None = None

    @property
    def space(self) -> Space:
        """The search space it was chosen from."""
        return rounded(architecture(self.architecture).build(self.classes), self.divisor)

    @property
    def convolutions(self) -> list[dict[str, Any]]:
        """Every convolution as `engine.pruned.PrunedNet` takes it, with its unpruned width beside."""
        return convolutions(self.space, torch.tensor(self.genome))

    def to_dict(self) -> dict[str, Any]:
        """The content of ``structure.json``."""
        fields = {**vars(self), "genome": list(self.genome), "preprocessing": dict(self.preprocessing)}
        content = {"schema": SCHEMA, **fields, "convolutions": self.convolutions}
        return {**content, "digest": sha256_json(content)}

    def save(self, path: Path) -> None:
        """Write ``structure.json`` atomically."""
        write_atomically(path, json.dumps(self.to_dict(), indent=2) + "\n")


def convolutions(space: Space, genome_G: Tensor) -> list[dict[str, Any]]:
    """The convolutions of one structure in execution order, as plain data."""
    out_channels = space.widths(genome_G[None])[0].tolist()
    channels = {IMAGE: IMAGE_CHANNELS, **dict(zip(space.conv_index, out_channels, strict=True))}
    return [
        {
            "name": conv.name,
            "source": conv.source,
            "in_channels": channels[conv.source],
            "out_channels": channels[conv.name],
            "full_width": max_width(conv.cout),
            "kernel": conv.kernel,
            "stride": conv.stride,
            "depthwise": conv.depthwise,
            "activation": conv.activation,
            "shortcut": conv.shortcut,
            "max_pool": conv.max_pool,
        }
        for conv in space.convs
    ]


def make_structure(costs: CostModel, genome_G: Tensor, resolution: int, **provenance: Any) -> Structure:
    """Describe one genome ``[G]``, costed by ``costs``; ``provenance`` fills the remaining fields of `Structure`."""
    return Structure(
        architecture=costs.space.architecture,
        classes=costs.space.classes,
        divisor=costs.space.divisor,
        resolution=resolution,
        genome=tuple(genome_G.tolist()),
        macs=int(costs.macs(genome_G[None])),
        parameters=int(costs.parameters(genome_G[None])),
        flops_resolution=costs.resolution,
        flops_convention=costs.convention,
        **provenance,
    )


def load_structure(path: Path) -> Structure:
    """Read and verify a ``structure.json``.

    Raises `UserError`, one line each, for an unknown schema, a digest that does not match, an unknown architecture,
    an illegal genome or width, and costs that are not those of the widths.
    """
    content = read_json(path, "structure")
    if content.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {content.get('schema')!r} is not supported; this version reads {SCHEMA!r}")
    digest = content.pop("digest", None)
    names = set(Structure.__dataclass_fields__)
    missing = sorted((names | {"convolutions"}) - set(content))
    if missing:
        raise UserError(f"{path}: fields are missing: {', '.join(missing)}")
    structure = Structure(**{name: content[name] for name in names})
    try:
        _verify_content(structure, content["convolutions"])
        if digest != sha256_json(content):
            raise UserError("the digest does not match: the file was changed after it was written; search again")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a valid structure: {reason}") from None
    return replace(structure, genome=tuple(structure.genome))


def _verify_content(structure: Structure, written: Any) -> None:
    """Raise `UserError` or an error of Python for a field of the wrong type, or fields that contradict each other."""
    if not isinstance(structure.genome, list):
        raise ValueError("genome must be a list of integers")
    integers = [getattr(structure, name) for name in INTEGERS]
    if not all(type(value) is int for value in (*integers, *structure.genome)) or structure.classes < 1:
        raise ValueError(f"{', '.join(INTEGERS)} and genome must be integers")
    if not isinstance(structure.preprocessing, dict) or not isinstance(structure.score, dict | None):
        raise ValueError("preprocessing and score must be objects")
    space = structure.space
    genome_PG = space.check_genome(torch.tensor([structure.genome], dtype=torch.int64))
    if structure.flops_convention not in get_args(Convention):
        raise ValueError(f"unknown FLOPs convention {structure.flops_convention!r}")
    if [conv["name"] for conv in written] != list(space.conv_index):
        raise ValueError(f"its convolutions are not those of {structure.architecture}")
    widths = [conv["out_channels"] for conv in written]
    encoded_PG = space.encode(torch.tensor([widths]))
    if not torch.equal(space.widths(encoded_PG), space.widths(genome_PG)) or written != structure.convolutions:
        raise ValueError("its convolutions are not those of its genome")
    costs = cost_model(space, structure.flops_resolution, structure.flops_convention)
    counted = int(costs.macs(genome_PG)), int(costs.parameters(genome_PG))
    if counted != (structure.macs, structure.parameters):
        raise ValueError(f"its widths have {counted[0]} MACs and {counted[1]} parameters, not what it says")
