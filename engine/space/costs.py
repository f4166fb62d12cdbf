"""What a choice costs: exact MACs, parameters and peak activation memory of a whole population.

Every layer's MACs and parameters are products of at most two widths, so with ``v = (widths of the genes…, 1)`` the
total is a quadratic form ``v · Q · v`` with one small integer matrix per cost, and the memory held at each
execution step is a linear form of ``v``. Both are evaluated in float64, which is exact: all terms and partial sums
are integers far below 2^53.

Shape suffixes: P population, G genes (G1: genes and the constant one), T execution steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from engine.errors import UserError
from engine.space.space import IMAGE, IMAGE_CHANNELS, Space, Width

Convention = Literal["macs", "metapruning"]
BYTES_PER_ELEMENT = 4
DEFAULT_RESOLUTION = 224
# Genomes costed at once: small enough for the intermediates to stay in cache.
CHUNK = 4096


@dataclass(frozen=True)
class CostModel:
    """Costs of the structures of one space at one resolution.

    ``macs`` counts the multiply-accumulates of convolutions and the classifier, the convention of the pruning
    literature (half of what `torch.utils.flop_counter` reports). The ``metapruning`` convention adds what the
    original implementation counted besides (one operation per BatchNorm and ReLU input, per element of a pooling
    window and per classifier bias; ReLU6 and adaptive pooling went unseen), so that its published tables can be
    matched.
    """

    space: Space
    resolution: int
    convention: Convention
    width_table: Tensor  # float64 [G, choices]
    macs_form: Tensor  # float64 [G1, G1]
    parameters_form: Tensor  # float64 [G1, G1]
    memory_form: Tensor  # float64 [T, G1]: activation elements held at every step

    def to(self, device: torch.device | str) -> CostModel:
        """The same model with its tables on ``device``."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return CostModel(self.space, self.resolution, self.convention, **tensors)

    def macs(self, genome_PG: Tensor) -> Tensor:
        """Multiply-accumulates per image, int64 ``[P]``, of valid genomes."""
        return self._chunked(lambda v_PG1: _quadratic(v_PG1, self.macs_form), genome_PG)

    def parameters(self, genome_PG: Tensor) -> Tensor:
        """Parameters, int64 ``[P]``: convolutions, BatchNorm scale and shift, classifier weight and bias."""
        return self._chunked(lambda v_PG1: _quadratic(v_PG1, self.parameters_form), genome_PG)

    def peak_activation_bytes(self, genome_PG: Tensor) -> Tensor:
        """Greatest number of bytes of activations alive at once, int64 ``[P]``, for one image in fp32.

        A convolution holds its input, its output (BatchNorm, activation and shortcut happen in place) and every
        tensor a later layer still reads.
        """
        peak = self._chunked(lambda v_PG1: (v_PG1 @ self.memory_form.T).amax(1), genome_PG)
        return peak * BYTES_PER_ELEMENT

    def _chunked(self, cost: Callable[[Tensor], Tensor], genome_PG: Tensor) -> Tensor:
        genes, choices = self.width_table.shape
        # One gather from the table laid flat, whose last entry is the constant one.
        flat = torch.cat([self.width_table.flatten(), self.width_table.new_ones(1)])
        first = torch.arange(genes, device=genome_PG.device) * choices
        index_P1 = genome_PG.new_full((min(len(genome_PG), CHUNK), genes + 1), genes * choices, dtype=torch.int64)
        parts = []
        for chunk_PG in genome_PG.split(CHUNK):
            index = index_P1[: len(chunk_PG)]
            torch.add(chunk_PG, first, out=index[:, :-1])
            parts.append(cost(flat.index_select(0, index.view(-1)).view(index.shape)).long())
        return torch.cat(parts) if parts else genome_PG.new_zeros(0)


def _quadratic(v_PG1: Tensor, form: Tensor) -> Tensor:
    return (v_PG1 @ form).mul_(v_PG1).sum(1)


def cost_model(space: Space, resolution: int = DEFAULT_RESOLUTION, convention: Convention = "macs") -> CostModel:
    """Build the forms of a space at a resolution in pixels. Raises `UserError` if the strides do not allow it."""
    space.check_resolution(resolution)
    if convention not in get_args(Convention):
        raise UserError(f"unknown FLOPs convention {convention!r}: choose one of {', '.join(get_args(Convention))}")
    size = len(space.genes) + 1
    macs, parameters = torch.zeros(2, size, size, dtype=torch.float64)
    row = _Rows(space)
    pixels = {IMAGE: resolution}
    for conv in space.convs:
        side = -(-pixels[conv.source] // conv.stride)
        fan_in, cout = row.constant(1) if conv.depthwise else row(conv.cin), row(conv.cout)
        weights = conv.kernel**2 * torch.outer(fan_in, cout)
        macs += side**2 * weights
        parameters += weights + torch.outer(row.constant(2), cout)
        if convention == "metapruning":
            macs += torch.outer(row.constant(side**2 * (1 + (conv.activation == "relu"))), cout)
        if conv.max_pool:
            side = -(-side // 2)
            if convention == "metapruning":
                macs += torch.outer(row.constant(9 * side**2), cout)
        pixels[conv.name] = side
    head = torch.outer(row.constant(space.classes), row(space.features))
    bias = torch.outer(row.constant(space.classes), row.constant(1))
    macs += head
    parameters += head + bias
    if convention == "metapruning":
        macs += bias
        if space.fixed_size_pooling:
            macs += torch.outer(row.constant(side**2), row(space.features))
    widths = space.width_table().double()
    return CostModel(space, resolution, convention, widths, macs, parameters, _memory_form(space, row, pixels))


class _Rows:
    """Linear forms over ``v = (widths…, 1)``: a gene's width, or a constant."""

    def __init__(self, space: Space) -> None:
        self.index = space.gene_index

    def constant(self, value: float) -> Tensor:
        form = torch.zeros(len(self.index) + 1, dtype=torch.float64)
        form[-1] = value
        return form

    def __call__(self, width: Width) -> Tensor:
        if isinstance(width, int):
            return self.constant(width)
        form = self.constant(0)
        form[self.index[width]] = 1
        return form


def _memory_form(space: Space, row: _Rows, pixels: dict[str, int]) -> Tensor:
    """Elements alive at each step, ``[T, G1]``: what the step writes and everything read now or later."""
    last_read = {conv.name: step for step, conv in enumerate(space.convs)}
    for step, conv in enumerate(space.convs):
        last_read[conv.source] = step
        if conv.shortcut is not None:
            last_read[conv.shortcut] = step
    sizes = {IMAGE: row.constant(IMAGE_CHANNELS * pixels[IMAGE] ** 2)}
    steps = []
    for step, conv in enumerate(space.convs):
        held = [size for name, size in sizes.items() if last_read[name] >= step]
        output = pixels[conv.name] ** 2 * row(conv.cout)
        if conv.max_pool:
            before_pool = (-(-pixels[conv.source] // conv.stride)) ** 2 * row(conv.cout)
            steps.append(sum(held, before_pool))
            held = [size for name, size in sizes.items() if last_read[name] > step] + [before_pool]
        steps.append(sum(held, output))
        sizes[conv.name] = output
    return torch.stack(steps)


def format_count(count: float) -> str:
    """A count with three decimals at most and its magnitude: ``568.74M``, ``4.089G``, ``512``."""
    for unit, scale in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= scale:
            return f"{count / scale:.3f}".rstrip("0").rstrip(".") + unit
    return f"{count:.4g}"


def macs_per_conv(costs: CostModel, genome_G: Tensor) -> list[int]:
    """MACs of every convolution of one structure, then of its classifier; their sum is ``costs.macs``."""
    space, resolution = costs.space, costs.resolution
    widths = dict(zip(space.conv_index, space.widths(genome_G[None])[0].tolist(), strict=True))
    pixels, channels = {IMAGE: resolution}, {IMAGE: IMAGE_CHANNELS} | widths
    counts = []
    for conv in space.convs:
        side = -(-pixels[conv.source] // conv.stride)
        fan_in = 1 if conv.depthwise else channels[conv.source]
        counts.append(side**2 * conv.kernel**2 * fan_in * channels[conv.name])
        pixels[conv.name] = -(-side // 2) if conv.max_pool else side
    return [*counts, channels[space.convs[-1].name] * space.classes]
