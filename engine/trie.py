"""What a population shares: the distinct computations of every layer, and what they need in memory.

Two genomes that agree in every gene up to a layer have the same weights, statistics and activations up to it: a
population is a trie, and each of its nodes (an instance of a layer) is computed once. Weights depend on fewer genes, so
that several instances may use the same ones.

How many nodes there are depends on the genomes, and a GPU would have to be waited for to learn it. There a plan has a
fixed shape: an instance for every genome, at its position, of which those that equal an earlier one stay idle.

Shape suffixes: P population, G genes, S instances of a layer, W distinct weights of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.rows import group_by_first, group_keys
from engine.space import IMAGE, IMAGE_CHANNELS, Conv, Gene, Space, max_width
from kernels.layout import Image, activation_slot, output_image

MAX_BLOCK = 3


@dataclass(frozen=True)
class Instances:
    """The distinct computations of one layer for a population.

    ``member_S`` is one genome's position in the population for each instance and ``instance_P`` the instance each
    genome ends up in. ``source_S`` and ``shortcut_S`` are the instances of the source and shortcut layers each one
    reads, ``weight_S`` the weights it uses: those of ``weight_genome_WG``. Nobody reads an idle instance.
    """

    member_S: Tensor
    instance_P: Tensor
    source_S: Tensor
    shortcut_S: Tensor | None
    weight_S: Tensor
    weight_genome_WG: Tensor
    fixed_shape: bool = False

    @property
    def idle_S(self) -> Tensor | None:
        """Which instances are not computed, bool ``[S]``; None if all are."""
        return self.instance_P != _positions(self.instance_P) if self.fixed_shape else None

    @property
    def idle_W(self) -> Tensor | None:
        """Which weights nobody uses, bool ``[W]``; None if all are used."""
        return self.weight_S != _positions(self.weight_S) if self.fixed_shape else None


def _positions(x: Tensor) -> Tensor:
    return torch.arange(len(x), dtype=x.dtype, device=x.device)


def fixed_shape_on(device: torch.device) -> bool:
    """Whether plans on a device have a fixed shape: wherever reading a number back is waiting."""
    return device.type != "cpu"


def plan(space: Space, genome_PG: Tensor) -> list[Instances]:
    """The instances of every layer: the trie of a population, exact common prefixes merged."""
    fixed_shape = fixed_shape_on(genome_PG.device)
    group = group_by_first if fixed_shape else group_keys
    image_P = torch.zeros(len(genome_PG), dtype=torch.int64, device=genome_PG.device)
    used: set[Gene] = set()
    node_P, member_S = group(image_P)
    instance_of = {IMAGE: image_P}
    weights: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    layers = []
    for conv in space.convs:
        own = tuple(sorted({space.gene_index[g] for g in (conv.cin, conv.cout, *conv.context) if isinstance(g, Gene)}))
        if new := [gene for gene in own if space.genes[gene] not in used]:
            # A node is its parent and the choices of the genes that this layer is the first to use.
            used |= {space.genes[gene] for gene in new}
            node_P, member_S = group(_key(space, node_P, genome_PG, new))
        if own not in weights:
            weights[own] = group(_key(space, image_P, genome_PG, own))
        weight_P, weight_member_W = weights[own]
        layers.append(
            Instances(
                member_S,
                node_P,
                instance_of[conv.source][member_S].int(),
                None if conv.shortcut is None else instance_of[conv.shortcut][member_S].int(),
                weight_P[member_S].int(),
                genome_PG[weight_member_W],
                fixed_shape,
            )
        )
        instance_of[conv.name] = node_P
    return layers


def _key(space: Space, key_P: Tensor, genome_PG: Tensor, genes: Sequence[int]) -> Tensor:
    """One integer ``[P]`` for a key and the choices of at most a few genes: they fit into 63 bits."""
    for gene in genes:
        key_P = key_P * space.choices + genome_PG[:, gene]
    return key_P


def blocks(space: Space) -> list[list[Conv]]:
    """The convolutions as chains whose inner tensors nobody else reads, in an order in which they can be run.

    A chain is a convolution with a window, with a 1×1 convolution before or after it: an inverted residual, a
    depthwise-separable pair, a bottleneck.
    """
    reads = Counter(name for conv in space.convs for name in (conv.source, conv.shortcut) if name)
    chains: list[list[Conv]] = []
    chain_of: dict[str, list[Conv]] = {}
    for conv in space.convs:
        chain = chain_of.get(conv.source, [])
        if chain and reads[conv.source] == 1 and _continues(conv, chain[-1], len(chain)):
            # The chain runs where its last convolution stands: its shortcut has been computed by then.
            chains.remove(chain)
            chain.append(conv)
        else:
            chain = [conv]
        chains.append(chain)
        chain_of[conv.name] = chain
    return chains


def _continues(conv: Conv, tail: Conv, length: int) -> bool:
    ends = tail.max_pool or tail.shortcut is not None or length == MAX_BLOCK
    pointwise, after_pointwise = conv.kernel == 1 and not conv.depthwise, tail.kernel == 1 and not tail.depthwise
    return not ends and (pointwise != after_pointwise) and (pointwise or length == 1)


def materialised(space: Space) -> set[str]:
    """The convolutions whose normalised output is stored when calibrating: a shortcut or a pooling needs it.

    Whoever reads another one normalises on reading.
    """
    added = {conv.shortcut for conv in space.convs}
    return {conv.name for conv in space.convs if conv.shortcut or conv.max_pool or conv.name in added}


def last_reads(steps: Sequence[Sequence[Conv]]) -> dict[str, int]:
    """The last of these chains of convolutions, run in this order, that reads each tensor."""
    return {name: i for i, chain in enumerate(steps) for name in (chain[0].source, chain[-1].shortcut) if name}


def output_images(space: Space, image: Image) -> tuple[dict[str, Image], dict[str, Image]]:
    """(N, H, W) of what every convolution reads and of what it leaves after pooling, for images (N, H, W)."""
    convolved: dict[str, Image] = {}
    stored: dict[str, Image] = {IMAGE: image}
    for conv in space.convs:
        convolved[conv.name] = output_image(stored[conv.source], conv.kernel, conv.stride)
        stored[conv.name] = output_image(convolved[conv.name], 3, 2) if conv.max_pool else convolved[conv.name]
    return convolved, stored


def activation_bytes(space: Space, layers: list[Instances], image: Image, element_bytes: int) -> int:
    """Bytes of activations alive at once, at most, when a population is calibrated on images (N, H, W).

    Where the normalised output is stored it is there beside the bare one for a while.
    """
    stored_normalised = materialised(space)
    convolved, stored = output_images(space, image)
    last_read = last_reads([[conv] for conv in space.convs])
    alive = {IMAGE: activation_slot(image, IMAGE_CHANNELS)}
    peak = 0
    for index, (conv, instances) in enumerate(zip(space.convs, layers, strict=True)):
        count, width = len(instances.member_S), max_width(conv.cout)
        bare = count * activation_slot(convolved[conv.name], width) if conv.name in stored_normalised else 0
        alive[conv.name] = count * activation_slot(stored[conv.name], width)
        peak = max(peak, bare + sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last_read.get(name, index + 1) > index}
    return peak * element_bytes
