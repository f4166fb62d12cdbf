"""Milliseconds of a whole population on one device: the sum of what every layer was measured to take at its widths.

Structures of one space differ in nothing but widths, so a layer's time is a function of its input and output width. It
is measured on a grid of widths, once for all layers of the same kind. Between the points of a grid

    ms(i, o) = bilinear in (up(i, in_step), up(o, out_step)),    up(w, step) = ceil(w / step) · step

Hardware and runtimes work in blocks of channels: 9 to 16 cost the same where a block is 16, and a straight line from 8
to 16 would sell 12 for less than it costs. The steps are those blocks, found by measuring widths within a block and
beside it, and a width costs what its full block does. The points of a grid are full blocks, so a straight line between
two of them joins treads of the stairs and is taken at treads only. A width below the first point costs what that does.

Times are measured and may fall where they should rise; ``(U + D) / 2`` of the running maximum from below and the
running minimum from above takes their place, which is the measured grid itself where that never falls. Predictions
therefore never fall when any width grows.

Shape suffixes: P population, G genes, C choices, K pairs of widths, A input widths, B output widths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import read_json, sha256_json, write_atomically
from engine.space import Space, architecture
from engine.space.space import IMAGE, Conv, Gene, Width

SCHEMA = "metaprune.latency/1"
# Where the input width of a depthwise convolution would stand: it has none of its own.
DEPTHWISE_IN = (1,)


@dataclass(frozen=True)
class LayerKind:
    """What two layers must have in common to take the same time at the same widths; ``side`` is of the input."""

    side: int
    kernel: int
    stride: int
    depthwise: bool
    activation: str
    shortcut: bool
    max_pool: bool
    reads_image: bool


@dataclass(frozen=True)
class LayerGrid:
    """Milliseconds of one kind of layer, ``ms[a][b]`` at ``in_widths[a]`` and ``out_widths[b]``.

    ``spread`` is relative, of the rounds of the same measurement. A depthwise layer has the one input width 1.
    """

    kind: LayerKind
    in_widths: tuple[int, ...]
    out_widths: tuple[int, ...]
    in_step: int
    out_step: int
    ms: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[float, ...], ...]

    def at(self, in_width: Tensor, out_width: Tensor) -> Tensor:
        """Milliseconds, float64, of widths of one shape, or shapes that broadcast."""
        grid_AB = _never_falling(torch.tensor(self.ms, dtype=torch.float64))
        a0, a1, u = _cell(self.in_widths, self.in_step, in_width)
        b0, b1, v = _cell(self.out_widths, self.out_step, out_width)
        below = torch.lerp(grid_AB[a0, b0], grid_AB[a0, b1], v)
        above = torch.lerp(grid_AB[a1, b0], grid_AB[a1, b1], v)
        return torch.lerp(below, above, u)


def _cell(points: Sequence[int], step: int, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The points on both sides of every width, rounded up to its block, and where between them it lies, 0 to 1."""
    axis = torch.tensor(points, dtype=torch.float64)
    block = (torch.ceil(width / step) * step).double().clamp(axis[0], axis[-1])
    upper = torch.searchsorted(axis, block).clamp(max=len(axis) - 1)
    lower = (upper - 1).clamp(min=0)
    gap = (axis[upper] - axis[lower]).clamp(min=1)
    return lower, upper, (block - axis[lower]) / gap


def _never_falling(grid_AB: Tensor) -> Tensor:
    from_below = grid_AB.cummax(0).values.cummax(1).values
    from_above = grid_AB.flip(0, 1).cummin(0).values.cummin(1).values.flip(0, 1)
    return (from_below + from_above) / 2


@dataclass(frozen=True)
class LatencyTable:
    """What was measured of the layers of one space, and how it adds up:

        ms = constant_ms + scale · Σ layers

    The constant stands for what belongs to no layer (input, pooling, classifier, starting a session); it and the scale
    were fitted to whole networks, which ``fitted`` lists (genome, layers_ms, measured_ms, spread). ``settings`` say how
    the networks were run, ``machine`` and ``versions`` on what.
    """

    architecture: str
    classes: int
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    grids: tuple[LayerGrid, ...]
    constant_ms: float
    scale: float
    fitted: tuple[Mapping[str, Any], ...] = ()
    # The same in the form that predictions read: positions of two genes, and milliseconds by their choices. What has
    # no gene reads the position after the last one, where all choices are alike.
    pairs: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    lookup_KCC: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False, compare=False)

    def predict(self, genome_PG: Tensor) -> Tensor:
        """Milliseconds of valid genomes ``[P, G]`` on the device of the table, float64 ``[P]``.

        A genome gets the same milliseconds alone and among others, bit for bit.
        """
        choice_GP = torch.cat([genome_PG.T, genome_PG.new_zeros(1, len(genome_PG))]).contiguous()
        total_P = self.lookup_KCC.new_full((len(genome_PG),), self.constant_ms)
        for (first, second), ms_CC in zip(self.pairs, self.lookup_KCC, strict=True):
            total_P += ms_CC.flatten()[choice_GP[first] * len(ms_CC) + choice_GP[second]]
        return total_P

    @property
    def digest(self) -> str:
        """SHA-256 of everything that was measured."""
        return str(self.to_dict()["digest"])

    def legal_range(self, space: Space) -> tuple[float, float]:
        """Milliseconds of the smallest and the largest structure."""
        extremes = torch.cat([space.uniform_choice(0), space.uniform_choice(space.choices - 1)])
        least, greatest = self.predict(extremes.to(self.lookup_KCC.device)).tolist()
        return least, greatest

    def to(self, device: torch.device | str) -> LatencyTable:
        """The same table, predicting on ``device``."""
        return replace(self, lookup_KCC=self.lookup_KCC.to(device))

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        content = {"schema": SCHEMA, **{name: getattr(self, name) for name in WRITTEN}}
        content["grids"] = [asdict(grid) for grid in self.grids]
        content = json.loads(json.dumps(content))
        return {**content, "digest": sha256_json(content)}

    def save(self, path: Path) -> None:
        """Write the table atomically."""
        write_atomically(path, json.dumps(self.to_dict()) + "\n")


WRITTEN = [f.name for f in fields(LatencyTable) if f.name not in ("pairs", "lookup_KCC")]


def for_space(table: LatencyTable, space: Space) -> LatencyTable:
    """The table made ready to predict structures of a space.

    Raises `UserError` if it is of another architecture, lacks a layer or does not reach a width.
    """
    if table.architecture != space.architecture:
        raise UserError(f"it is of {table.architecture}, not of {space.architecture}: measure one with engine.latency")
    if table.classes != space.classes:
        # The constant holds the classifier, which may take a tenth of a small network's time.
        raise UserError(
            f"it is of {table.classes} classes, not of {space.classes}: measure one with engine.latency build --run RUN"
        )
    grids = {grid.kind: grid for grid in table.grids}
    genes = len(space.genes)
    widths_CG = torch.cat([space.gene_widths(space.uniform_choice(choice)) for choice in range(space.choices)])
    by_pair: dict[tuple[int, int], Tensor] = {}
    for conv, kind in zip(space.convs, layer_kinds(space, table.settings["resolution"]), strict=True):
        if kind not in grids:
            raise UserError(f"it lacks the layer {conv.name}: it was made for another version; measure it anew")
        cin: Width = DEPTHWISE_IN[0] if conv.depthwise else conv.cin
        column = {width: _choices(space, width, widths_CG) for width in (cin, conv.cout)}
        for points, width in ((grids[kind].in_widths, cin), (grids[kind].out_widths, conv.cout)):
            if int(column[width].max()) > points[-1]:
                raise UserError(
                    f"it ends at {points[-1]} channels where {conv.name} may have {int(column[width].max())}: "
                    "measure it anew"
                )
        pair = _position(space, cin), _position(space, conv.cout)
        ms_CC = grids[kind].at(column[cin][:, None], column[conv.cout][None, :])
        by_pair[pair] = by_pair.get(pair, torch.zeros(())) + table.scale * ms_CC
    assert all(max(pair) <= genes for pair in by_pair)
    return replace(table, pairs=tuple(by_pair), lookup_KCC=torch.stack(list(by_pair.values())))


def _choices(space: Space, width: Width, widths_CG: Tensor) -> Tensor:
    """Channels of every choice of one searched or fixed width, ``[C]``."""
    return space.width_of(width, widths_CG)


def _position(space: Space, width: Width) -> int:
    return space.gene_index[width] if isinstance(width, Gene) else len(space.genes)


def layer_kinds(space: Space, resolution: int) -> list[LayerKind]:
    """The kind of every convolution at a resolution in pixels, in execution order."""
    pixels, kinds = {IMAGE: space.check_resolution(resolution)}, []
    for conv in space.convs:
        side = pixels[conv.source]
        kinds.append(_kind(conv, side))
        after = -(-side // conv.stride)
        pixels[conv.name] = -(-after // 2) if conv.max_pool else after
    return kinds


def _kind(conv: Conv, side: int) -> LayerKind:
    return LayerKind(
        side, conv.kernel, conv.stride, conv.depthwise, conv.activation, conv.shortcut is not None, conv.max_pool,
        conv.source == IMAGE,
    )  # fmt: skip


# -- reading -------------------------------------------------------------------------------------------------------


def load_latency_table(path: Path, space: Space | None = None) -> LatencyTable:
    """Read and verify a table, ready to predict structures of ``space`` (default: of the space it was measured for).

    Raises `UserError`, one line each, for an unknown schema, a digest that does not match, another architecture, and
    numbers that cannot have been measured: not finite, negative, of a wrong shape.
    """
    content = read_json(path, "latency table")
    if content.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {content.get('schema')!r} is not supported; this version reads {SCHEMA!r}")
    digest = content.pop("digest", None)
    missing = sorted(set(WRITTEN) - set(content))
    if missing:
        raise UserError(f"{path}: fields are missing: {', '.join(missing)}")
    try:
        table = _verified(content)
        if digest != sha256_json(content):
            raise UserError("the digest does not match: the file was changed after it was written; measure it anew")
        return for_space(table, space or architecture(table.architecture).build(table.classes))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a valid latency table: {reason}") from None


def _verified(content: Mapping[str, Any]) -> LatencyTable:
    if not isinstance(content["architecture"], str):
        raise ValueError("architecture must be a name")
    settings = content["settings"]
    if not all(isinstance(content[name], dict) for name in ("settings", "machine", "versions")):
        raise ValueError("settings, machine and versions must be objects")
    for value in (content["classes"], settings["resolution"]):
        if type(value) is not int or value < 1:
            raise ValueError("classes and resolution must be integers from 1")
    if not (_is_time(content["constant_ms"]) and _is_time(content["scale"]) and content["scale"] > 0):
        raise ValueError("constant_ms must be a finite number from 0, and scale one above 0")
    if not isinstance(content["fitted"], list) or not all(isinstance(entry, dict) for entry in content["fitted"]):
        raise ValueError("fitted must be a list of objects")
    values = {name: content[name] for name in WRITTEN}
    grids = tuple(_verified_grid(entry) for entry in content["grids"])
    return LatencyTable(**{**values, "grids": grids, "fitted": tuple(content["fitted"])})


def _verified_grid(entry: Mapping[str, Any]) -> LayerGrid:
    kind = LayerKind(**entry["kind"])
    axes = tuple(entry["in_widths"]), tuple(entry["out_widths"])
    for axis, step in zip(axes, (entry["in_step"], entry["out_step"]), strict=True):
        integers = all(type(value) is int and value >= 1 for value in (step, *axis))
        if not integers or not axis or list(axis) != sorted(set(axis)):
            raise ValueError("widths must be growing integers from 1, and steps integers from 1")
    tables = {}
    for name in ("ms", "spread"):
        tables[name] = tuple(tuple(row) for row in entry[name])
        if [len(row) for row in tables[name]] != [len(axes[1])] * len(axes[0]):
            raise ValueError(f"{name} must have one number for every pair of widths")
        if not all(_is_time(value) for row in tables[name] for value in row):
            raise ValueError(f"{name} must be finite numbers from 0")
    return LayerGrid(kind, *axes, entry["in_step"], entry["out_step"], tables["ms"], tables["spread"])


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
