"""What single layers take inside a network, measured in small networks that differ by that layer.

A layer alone would also be charged for starting a session and for bringing its input into the layout the runtime
prefers, which in a network the layer before has done. So two networks are timed in turn,

    base     image → 1×1 convolution to the layer's input width → reader
    chain    image → 1×1 convolution to the layer's input width → layer → reader

and the layer's time is the median of their differences. The reader, a 1×1 convolution whose stride is the side of what
it reads, touches one pixel. The layer keeps what runtimes fuse with it: BatchNorm, activation and the addition of a
shortcut (to which the base has the same convolution). The nearest caches are overwritten before every call: in a
network, other layers' weights were there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.run.measurements import Measurements
from engine.runtimes import ROUNDS, Network, Timing
from engine.space import Space
from engine.space.latency_table import DEPTHWISE_IN, LayerGrid, LayerKind, layer_kinds
from engine.space.space import IMAGE, IMAGE_CHANNELS, Width

READER_CHANNELS = 8
# Few cost nothing; one answer alone may be close to zero, where rounding looks large.
CLASSES = 16
# Blocks of channels that are looked for, in multiples of the padding.
LARGEST_STEP = 64
# Where blocks are looked for: past a multiple of SCAN_START, near SCAN_WIDTH.
SCAN, SCAN_ROUNDS = "blocks", 3 * ROUNDS
SCAN_START, SCAN_WIDTH = 32, 128
SCAN_OFFSETS = (1, 2, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 25, 28, 31, 32, 48, 64)
# A block is believed when it leaves less than this part of the squared error that no blocks leave.
CONVINCING = 0.5


Widths = Sequence[tuple[int, int]]
# Milliseconds and spread of a layer of some kind at some pairs of widths, under the name of a group.
TimeLayers = Callable[[str, LayerKind, Widths], list[tuple[float, float]]]


@dataclass(frozen=True)
class Axes:
    """Least and greatest input and output width of the layers of one kind."""

    kind: LayerKind
    ins: tuple[int, int]
    outs: tuple[int, int]

    @property
    def category(self) -> str:
        """Kinds that share their blocks."""
        kind = self.kind
        return f"{kind.kernel}x{kind.kernel}{' depthwise' * kind.depthwise}{' of images' * kind.reads_image}"


def kinds_of(space: Space, resolution: int) -> list[Axes]:
    """Every kind of layer in a space once, with the widths its layers can have."""
    widths_CG = torch.cat([space.gene_widths(space.uniform_choice(choice)) for choice in range(space.choices)])

    def ends(width: Width) -> tuple[int, int]:
        column = space.width_of(width, widths_CG)
        return int(column.min()), int(column.max())

    ranges: dict[LayerKind, tuple[list[int], list[int]]] = {}
    for conv, kind in zip(space.convs, layer_kinds(space, resolution), strict=True):
        ins, outs = ranges.setdefault(kind, ([], []))
        ins += DEPTHWISE_IN if conv.depthwise else ends(conv.cin)
        outs += ends(conv.cout)
    return [Axes(k, (min(ins), max(ins)), (min(outs), max(outs))) for k, (ins, outs) in ranges.items()]


def axis_points(ends: tuple[int, int], points: int, step: int) -> tuple[int, ...]:
    """At most ``points`` widths from the least to the greatest, whole blocks but the last, denser where narrow."""
    least, greatest = ends
    roots = torch.linspace(least**0.5, greatest**0.5, points, dtype=torch.float64)
    blocks = [-(-round(float(root) ** 2) // step) * step for root in roots]
    return tuple(sorted({min(block, greatest) for block in blocks} | {greatest}))


# -- small networks ------------------------------------------------------------------------------------------------


def _conv(name: str, source: str, cin: int, cout: int, **given: Any) -> dict[str, Any]:
    plain = {"kernel": 1, "stride": 1, "depthwise": False, "activation": "none", "shortcut": None, "max_pool": False}
    return {"name": name, "source": source, "in_channels": cin, "out_channels": cout, **plain, **given}


def base_and_chain(kind: LayerKind, cin: int, cout: int) -> tuple[Network, Network]:
    """The two networks whose difference is one layer; a depthwise layer has ``cout`` input channels."""
    cin = cout if kind.depthwise else cin
    source, convs = (IMAGE if kind.reads_image else "input"), []
    after = -(-kind.side // kind.stride)
    if not kind.reads_image:
        convs.append(_conv("input", IMAGE, IMAGE_CHANNELS, cin, activation="relu"))
    read = _conv("read", source, cin, READER_CHANNELS, stride=kind.side)
    base, added = [*convs, read], None
    if kind.shortcut:
        added = "added"
        convs.append(_conv(added, IMAGE, IMAGE_CHANNELS, cout, stride=kind.stride))
        base = [*convs, read, _conv("both", added, cout, READER_CHANNELS, stride=after, shortcut="read")]
    layer = _conv(
        "layer", source, cin, cout, kernel=kind.kernel, stride=kind.stride, depthwise=kind.depthwise,
        activation=kind.activation, shortcut=added, max_pool=kind.max_pool,
    )  # fmt: skip
    side = -(-after // 2) if kind.max_pool else after
    chain = [*convs, layer, _conv("read", "layer", cout, READER_CHANNELS, stride=side)]
    return Network(base, CLASSES, kind.side), Network(chain, CLASSES, kind.side)


def layer_networks(kind: LayerKind, widths: Widths) -> tuple[list[Network], list[tuple[int, int]]]:
    """The networks to time for some pairs of widths, and the positions of base and chain of every pair."""
    networks: list[Network] = []
    positions = []
    for cin, cout in widths:
        pair = base_and_chain(kind, cin, cout)
        networks += [network for network in pair if network not in networks]
        positions.append((networks.index(pair[0]), networks.index(pair[1])))
    return networks, positions


# -- measuring -----------------------------------------------------------------------------------------------------


def time_layers(measurements: Measurements, group: str, kind: LayerKind, widths: Widths) -> list[tuple[float, float]]:
    """Milliseconds of a layer at some pairs of widths, and their interquartile range over the rounds.

    Where blocks are looked for only the shape of the stairs matters: caches stay warm, which disturbs less.
    """
    networks, positions = layer_networks(kind, widths)
    scan = group.startswith(SCAN)
    timings = measurements.of(group, networks, cold=not scan, rounds=SCAN_ROUNDS if scan else ROUNDS)
    return [_difference(timings[base], timings[chain]) for base, chain in positions]


def _difference(base: Timing, chain: Timing) -> tuple[float, float]:
    differences = [b - a for a, b in zip(base.rounds, chain.rounds, strict=True)]
    low, median, high = statistics.quantiles(differences, n=4, method="inclusive")
    return max(0.0, median), high - low


# -- blocks of channels --------------------------------------------------------------------------------------------


def find_step(widths: Sequence[int], ms: Sequence[float], least: int) -> int:
    """The block of channels, ``least`` times a power of two, in whose multiples a layer's time grows.

    The one for which ``ms = a + b · ceil(w / step) · step`` leaves the least squared error, if that is convincingly
    less than with ``least``.
    """
    width, time = (torch.tensor(list(values), dtype=torch.float64) for values in (widths, ms))
    steps = [least * 2**power for power in range(7) if least * 2**power <= max(least, LARGEST_STEP)]
    errors = {}
    for step in steps:
        block = torch.ceil(width / step) * step
        design = torch.stack([torch.ones_like(block), block], 1)
        rest = time - design @ torch.linalg.lstsq(design, time[:, None], driver="gelsd").solution[:, 0]
        errors[step] = float((rest**2).sum())
    best = min(errors, key=lambda step: errors[step])
    return best if errors[best] < CONVINCING * errors[least] else least


@dataclass(frozen=True)
class Scan:
    """Where the blocks of one category are looked for on one axis: a kind, and the pairs of widths to time."""

    name: str
    kind: LayerKind
    scanned: tuple[int, ...]
    widths: tuple[tuple[int, int], ...]


def scans(axes: Iterable[Axes], pad: int) -> dict[tuple[str, str], Scan]:
    """One scan for every category and axis that has room for blocks, on the kind closest to `SCAN_WIDTH` channels."""
    found: dict[tuple[str, str], Scan] = {}
    for one in sorted(axes, key=lambda one: abs(one.outs[1] - SCAN_WIDTH) + abs(one.ins[1] - SCAN_WIDTH)):
        for name, ends, other in (("in", one.ins, one.outs), ("out", one.outs, one.ins)):
            start = min(ends[1] // 2, SCAN_WIDTH) // SCAN_START * SCAN_START
            blocks = {-(-offset // pad) * pad + start for offset in SCAN_OFFSETS}
            scanned = tuple(sorted(width for width in blocks if ends[0] <= width <= ends[1]))
            fixed = min(other[1], SCAN_WIDTH)
            pairs = tuple((width, fixed) if name == "in" else (fixed, width) for width in scanned)
            if len(scanned) >= 6 and scanned[-1] - scanned[0] >= 4 * pad:
                found.setdefault((one.category, name), Scan(f"{SCAN} {one.category} {name}", one.kind, scanned, pairs))
    return found


def blocks_wanted(axes: Iterable[Axes]) -> list[tuple[str, str]]:
    """Every category with both of its axes: what `find_steps` gives a block for."""
    return list(dict.fromkeys((one.category, name) for one in axes for name in ("in", "out")))


def find_steps(axes: Sequence[Axes], pad: int, timed: TimeLayers) -> dict[tuple[str, str], int]:
    """The block of channels of every category and axis; ``pad`` where none is found."""
    steps = dict.fromkeys(blocks_wanted(axes), pad)
    for key, scan in scans(axes, pad).items():
        times = timed(scan.name, scan.kind, scan.widths)
        steps[key] = find_step(scan.scanned, [ms for ms, _ in times], pad)
    return steps


# -- grids ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridPlan:
    """The widths at which one kind is to be measured."""

    kind: LayerKind
    in_widths: tuple[int, ...]
    out_widths: tuple[int, ...]
    in_step: int
    out_step: int

    def __len__(self) -> int:
        return len(self.in_widths) * len(self.out_widths)

    def rows(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """Names and pairs of widths of the groups that are timed together: one input width each."""
        return [(f"{self.kind} {cin}", [(cin, cout) for cout in self.out_widths]) for cin in self.in_widths]


def plan_grids(axes: Sequence[Axes], points: int, steps: Mapping[tuple[str, str], int]) -> list[GridPlan]:
    """The grid of every kind, with ``points`` widths on an axis or as many as there are blocks."""
    plans = []
    for one in axes:
        in_step = 1 if one.ins[0] == one.ins[1] else steps[one.category, "in"]
        out_step = 1 if one.outs[0] == one.outs[1] else steps[one.category, "out"]
        in_widths, out_widths = axis_points(one.ins, points, in_step), axis_points(one.outs, points, out_step)
        plans.append(GridPlan(one.kind, in_widths, out_widths, in_step, out_step))
    return plans


def make_grid(plan: GridPlan, rows: Sequence[Sequence[tuple[float, float]]]) -> LayerGrid:
    """The grid of what its rows gave."""
    ms, spread = (tuple(tuple(point[i] for point in row) for row in rows) for i in (0, 1))
    return LayerGrid(plan.kind, plan.in_widths, plan.out_widths, plan.in_step, plan.out_step, ms, spread)
