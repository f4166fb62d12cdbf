"""What may be pruned: genes, convolutions, and the genome that chooses a width for every gene.

A network is a list of convolutions, each reading one earlier tensor and optionally adding another. Layers that
must keep equal widths (they meet in a shortcut) share a gene, so an illegal structure cannot be written down.
Everything else (costs, PruningNet, batched forward, pruned module) is derived from this list.

Shape suffixes: P population, G genes, L convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from engine.errors import UserError

Activation = Literal["none", "relu", "relu6"]

IMAGE = "image"
IMAGE_CHANNELS = 3
# The paper's 31 ratios: 10 %, 13 %, …, 100 %.
RATIO_PERCENT = tuple(10 + 3 * i for i in range(31))


@dataclass(frozen=True)
class Gene:
    """One searched decision: ``widths[c]`` is the number of channels of choice ``c``."""

    name: str
    max_width: int
    widths: tuple[int, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """What the PruningNet is told of each choice: the nominal ratio, before truncation to a width."""
        return tuple(percent / 100 for percent in RATIO_PERCENT)


def gene(name: str, max_width: int) -> Gene:
    """The paper's gene: ``int(max_width * ratio)`` channels for each of the 31 ratios, at least one."""
    return Gene(name, max_width, tuple(max(1, max_width * percent // 100) for percent in RATIO_PERCENT))


Width = Gene | int


def max_width(width: Width) -> int:
    """The greatest number of channels of a searched or a fixed width."""
    return width if isinstance(width, int) else width.max_width


@dataclass(frozen=True)
class Conv:
    """One convolution, ``y = activation(BatchNorm(conv(x[source])) + x[shortcut])``, then an optional 3×3/2 max-pool.

    ``source`` and ``shortcut`` name earlier convolutions (``"image"`` for the input); ``cin`` and ``cout`` are a
    gene or a fixed number of channels; padding is ``kernel // 2``; ``context`` lists the genes whose ratios
    condition the generated weights, through a code of ``hidden`` numbers.
    """

    name: str
    source: str
    cin: Width
    cout: Width
    kernel: int
    stride: int
    depthwise: bool
    activation: Activation
    shortcut: str | None
    context: tuple[Gene, ...]
    hidden: int
    max_pool: bool = False

    @property
    def fan_in(self) -> int:
        """Input channels each filter of the unpruned convolution reads."""
        return 1 if self.depthwise else max_width(self.cin)

    @property
    def weights(self) -> int:
        """Weights of the unpruned convolution."""
        return max_width(self.cout) * self.fan_in * self.kernel**2


@dataclass(frozen=True)
class Space:
    """All structures of one architecture: its genes, its convolutions in execution order, and a linear classifier.

    ``fixed_size_pooling`` tells the ``metapruning`` FLOPs convention whether the original network pooled its last
    feature map with a window of fixed size, which its counter saw, or adaptively, which it did not. ``divisor`` is
    what the searched widths are multiples of (`rounded`).
    """

    architecture: str
    classes: int
    genes: tuple[Gene, ...]
    convs: tuple[Conv, ...]
    fixed_size_pooling: bool = True
    divisor: int = 1

    def __post_init__(self) -> None:
        index = self.conv_index
        names = {gene.name for gene in self.genes}
        if len(index) != len(self.convs) or len(names) != len(self.genes):
            raise ValueError(f"{self.architecture}: names of convolutions and of genes must be distinct")
        for position, conv in enumerate(self.convs):
            earlier = {IMAGE, *(other.name for other in self.convs[:position])}
            for read in (conv.source, conv.shortcut):
                if read is not None and read not in earlier:
                    raise ValueError(f"{conv.name} reads {read}, which is not computed yet")
            if self._width_after(conv.source) != conv.cin or (conv.depthwise and conv.cin != conv.cout):
                raise ValueError(f"{conv.name}: cin does not match what {conv.source} gives")
            if conv.shortcut is not None and self._width_after(conv.shortcut) != conv.cout:
                raise ValueError(f"{conv.name} adds {conv.shortcut}, whose width is another gene")
            if not {w for w in (conv.cin, conv.cout, *conv.context) if isinstance(w, Gene)} <= set(self.genes):
                raise ValueError(f"{conv.name} uses a gene the space does not list")

    def _width_after(self, name: str) -> Width:
        return IMAGE_CHANNELS if name == IMAGE else self.convs[self.conv_index[name]].cout

    @cached_property
    def conv_index(self) -> dict[str, int]:
        """Position of every convolution by name."""
        return {conv.name: i for i, conv in enumerate(self.convs)}

    @cached_property
    def gene_index(self) -> dict[Gene, int]:
        """Position of every gene."""
        return {gene: i for i, gene in enumerate(self.genes)}

    @property
    def choices(self) -> int:
        """Number of choices of every gene."""
        return len(RATIO_PERCENT)

    @property
    def features(self) -> Width:
        """Width of the classifier's input: the last convolution's output."""
        return self.convs[-1].cout

    @property
    def total_stride(self) -> int:
        """Input pixels per pixel of the last feature map, the least resolution that makes sense."""
        strides = {IMAGE: 1}
        for conv in self.convs:
            strides[conv.name] = strides[conv.source] * conv.stride * (2 if conv.max_pool else 1)
        return strides[self.convs[-1].name]

    def check_resolution(self, resolution: int) -> int:
        """Return ``resolution`` in pixels, or raise `UserError` if the strides do not allow it."""
        if resolution < self.total_stride:
            raise UserError(
                f"resolution {resolution} is too small: {self.architecture} has a total stride of "
                f"{self.total_stride}, so images need at least {self.total_stride} pixels"
            )
        return resolution

    # -- genomes -------------------------------------------------------------------------------------------------

    def check_genome(self, genome_PG: Tensor) -> Tensor:
        """Return the genomes, int64 ``[P, G]``, or raise `ValueError` if a choice is out of range."""
        if genome_PG.ndim != 2 or genome_PG.shape[1] != len(self.genes):
            raise ValueError(
                f"a {self.architecture} genome has {len(self.genes)} genes, got shape {tuple(genome_PG.shape)}"
            )
        if genome_PG.numel() and not (int(genome_PG.min()) >= 0 and int(genome_PG.max()) < self.choices):
            raise ValueError(f"choices must be 0 to {self.choices - 1}")
        return genome_PG.long()

    def uniform_choice(self, choice: int) -> Tensor:
        """The genome, ``[1, G]``, in which every gene takes the same choice; 0 is the smallest structure."""
        return torch.full((1, len(self.genes)), choice, dtype=torch.int64)

    def width_table(self, device: torch.device | str = "cpu") -> Tensor:
        """Channels of every choice of every gene, int64 ``[G, choices]``. Not to be changed: every caller gets it."""
        device = torch.device(device)
        if device not in self._width_tables:
            widths = [gene.widths for gene in self.genes]
            self._width_tables[device] = torch.tensor(widths, dtype=torch.int64, device=device)
        return self._width_tables[device]

    @cached_property
    def _width_tables(self) -> dict[torch.device, Tensor]:
        # Made once: a GPU would have to be waited for whenever numbers are copied to it.
        return {}

    def gene_widths(self, genome_PG: Tensor) -> Tensor:
        """Channels of every gene, int64 ``[P, G]``, of valid genomes ``[P, G]``."""
        table = self.width_table(genome_PG.device)
        return table[torch.arange(len(self.genes), device=genome_PG.device), genome_PG]

    def widths(self, genome_PG: Tensor) -> Tensor:
        """Output channels of every convolution, int32 ``[P, L]``, of valid genomes ``[P, G]``."""
        gene_widths_PG = self.gene_widths(genome_PG).int()
        columns = [self.width_of(conv.cout, gene_widths_PG) for conv in self.convs]
        return torch.stack(columns, dim=1)

    def width_of(self, width: Width, gene_widths_PG: Tensor) -> Tensor:
        """Channels ``[P]`` of one searched or fixed width, given the widths of all genes ``[P, G]``."""
        if isinstance(width, int):
            return gene_widths_PG.new_full((gene_widths_PG.shape[0],), width)
        return gene_widths_PG[:, self.gene_index[width]].contiguous()

    def encode(self, widths_PL: Tensor) -> Tensor:
        """The genomes, int64 ``[P, G]``, of convolution widths ``[P, L]``: the inverse of `widths`.

        Where several choices truncate to the same width the smallest is taken. Raises `ValueError`, naming the
        convolution, for a width its gene does not offer or that differs from that of a tied layer.
        """
        columns: dict[Gene, Tensor] = {}
        for conv, width_P in zip(self.convs, widths_PL.long().unbind(1), strict=True):
            if isinstance(conv.cout, int):
                if bool((width_P != conv.cout).any()):
                    raise ValueError(f"{conv.name} has a fixed width of {conv.cout}")
                continue
            offered = torch.tensor(conv.cout.widths, device=width_P.device)
            match_PC = width_P[:, None] == offered
            if not bool(match_PC.any(1).all()):
                raise ValueError(
                    f"{conv.name} cannot have {int(width_P[~match_PC.any(1)][0])} channels; legal widths are "
                    + ", ".join(map(str, sorted(set(conv.cout.widths))))
                )
            choice_P = match_PC.int().argmax(1)
            if bool((columns.setdefault(conv.cout, choice_P) != choice_P).any()):
                raise ValueError(f"{conv.name} must be as wide as the other layers of gene {conv.cout.name}")
        return torch.stack([columns[gene] for gene in self.genes], dim=1)


def rounded(space: Space, divisor: int) -> Space:
    """The space with every searched width rounded to a multiple of ``divisor``, for hardware that wants multiples.

    Widths stay between ``divisor`` and the greatest multiple that the full network has; a gene whose full width is
    below ``divisor`` keeps its widths. Raises `UserError` unless ``divisor`` is at least 1.
    """
    if divisor < 1:
        raise UserError(f"--divisor {divisor}: at least 1")
    gene_of = {gene: _rounded(gene, divisor) for gene in space.genes}

    def of(width: Width) -> Width:
        return width if isinstance(width, int) else gene_of[width]

    convs = tuple(
        replace(conv, cin=of(conv.cin), cout=of(conv.cout), context=tuple(gene_of[gene] for gene in conv.context))
        for conv in space.convs
    )
    return replace(space, genes=tuple(gene_of.values()), convs=convs, divisor=divisor)


def _rounded(gene: Gene, divisor: int) -> Gene:
    greatest = gene.max_width // divisor * divisor
    if not greatest:
        return gene
    multiples = ((2 * width + divisor) // (2 * divisor) * divisor for width in gene.widths)
    return replace(gene, widths=tuple(min(max(width, divisor), greatest) for width in multiples))


def genes_of(convs: Sequence[Conv]) -> tuple[Gene, ...]:
    """The distinct genes of the outputs of some convolutions, in order of first use."""
    return tuple(dict.fromkeys(conv.cout for conv in convs if isinstance(conv.cout, Gene)))
