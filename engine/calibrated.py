"""A population with its BatchNorm calibrated, ready to look at images.

Calibration runs layer by layer, each convolution normalising its input as it reads it and summing its output as it
writes it; looking at images afterwards runs whole blocks. What genomes have in common is computed once
(`engine.trie`). Activations have the precision of the PruningNet's bases. Nothing is read back from a GPU.

Shape suffixes: P population, G genes, S instances of a layer, O output channels, N images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kernels
from engine.pruningnet import NORM_EPSILON, PruningNet
from engine.space import IMAGE, Conv, Space, max_width
from engine.stages import stage
from engine.trie import Instances, blocks, last_reads, materialised
from kernels import BlockConv, backends, layout
from kernels.layout import Image

SCORING_OPS = (
    "generate_weights", "ragged_conv", "ragged_depthwise", "fused_block", "ragged_normalise", "ragged_max_pool",
    "score_logits",
)  # fmt: skip
# Backends whose kernels take subnetworks of no channels (tests/kernels/gpu/idle.py).
NONE_IS_LEGAL = ("triton", "cuda")


@dataclass(frozen=True)
class Layer:
    """The weights of one layer's instances, and the BatchNorm ``scale_SO``, ``shift_SO`` of their outputs."""

    instances: Instances
    cin_S: Tensor
    cout_S: Tensor
    weight: Tensor
    scale_SO: Tensor
    shift_SO: Tensor


# What a convolution of a block has one of for each instance.
INSTANCE_FIELDS = ("weight_source_S", "width_S", "scale_SO", "shift_SO")


@dataclass(frozen=True)
class Block:
    """A chain of calibrated convolutions of all instances, run as one."""

    convs: list[Conv]
    cin_S: Tensor
    source_S: Tensor
    shortcut_S: Tensor | None
    stages: list[BlockConv]

    def only(self, kept_S: Tensor) -> Block:
        """Some of its instances: they read what they read."""
        stages = [
            replace(stage, **{name: getattr(stage, name)[kept_S] for name in INSTANCE_FIELDS}) for stage in self.stages
        ]
        shortcut_S = None if self.shortcut_S is None else self.shortcut_S[kept_S]
        return replace(
            self, cin_S=self.cin_S[kept_S], source_S=self.source_S[kept_S], shortcut_S=shortcut_S, stages=stages
        )


@dataclass(frozen=True)
class Calibrated:
    """A population ready to look at images: ``instance_P`` is the instance of the last layer of each genome."""

    net: PruningNet
    blocks: list[Block]
    instance_P: Tensor

    def only(self, chosen_P: Tensor) -> Calibrated:
        """Some of its genomes, bool ``[P]``: the instances that nobody else needs are left out."""
        needed = {self.blocks[-1].convs[-1].name: self.instance_P[chosen_P]}
        kept_blocks: list[Block] = []
        for block in reversed(self.blocks):
            tail = block.convs[-1]
            kept_S = needed[tail.name].unique()
            kept_blocks.append(block.only(kept_S))
            for name, source_S in ((block.convs[0].source, block.source_S), (tail.shortcut, block.shortcut_S)):
                if name and source_S is not None:
                    needed[name] = torch.cat([needed.get(name, kept_S[:0]), source_S[kept_S].long()])
        # Instances are numbered anew, and so is what refers to them.
        new = {name: torch.unique(used) for name, used in needed.items()}

        def renumbered(name: str, old_S: Tensor) -> Tensor:
            return torch.searchsorted(new[name], old_S.long()).to(old_S.dtype)

        blocks = []
        for block in reversed(kept_blocks):
            shortcut, shortcut_S = block.convs[-1].shortcut, block.shortcut_S
            if shortcut is not None and shortcut_S is not None:
                shortcut_S = renumbered(shortcut, shortcut_S)
            source_S = renumbered(block.convs[0].source, block.source_S)
            blocks.append(replace(block, source_S=source_S, shortcut_S=shortcut_S))
        last = blocks[-1].convs[-1].name
        return replace(self, blocks=blocks, instance_P=renumbered(last, self.instance_P[chosen_P]))


@torch.no_grad()
def calibrate(net: PruningNet, layers: list[Instances], images_NCHW: Tensor) -> Calibrated:
    """Steps 1 and 2 for a population with this plan: its weights, and the statistics of these images."""
    run = _Calibration(net.space, images_NCHW.to(net.precision))
    calibrated = [run.layer(net, index, instances) for index, instances in enumerate(layers)]
    layer_of = {conv.name: layer for conv, layer in zip(net.space.convs, calibrated, strict=True)}
    return Calibrated(net, [_block(chain, layer_of, run.least) for chain in blocks(net.space)], layers[-1].instance_P)


@torch.no_grad()
def count_correct(calibrated: Calibrated, images_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Step 3: whether each genome is right about each image, bool ``[P, N]``, and its loss, float64 ``[P, N]``."""
    net, last = calibrated.net, calibrated.blocks[-1].stages[-1]
    features, image = run_blocks(calibrated, images_NCHW)
    correct_SN, loss_SN = kernels.score_logits(
        features, net.classifier.weight, net.classifier.bias, labels_N, last.width_S, _identity(last.width_S),
        image=image,
    )  # fmt: skip
    return correct_SN[calibrated.instance_P], loss_SN[calibrated.instance_P]


@torch.no_grad()
def run_blocks(calibrated: Calibrated, images_NCHW: Tensor) -> tuple[Tensor, Image]:
    """The last feature maps of all instances, one buffer of activations, and their (N, H, W)."""
    space = calibrated.net.space
    tensors = _Tensors([block.convs for block in calibrated.blocks], images_NCHW.to(calibrated.net.precision))
    for block in calibrated.blocks:
        source, tail = block.convs[0].source, block.convs[-1]
        image = tensors.images[source]
        y = kernels.fused_block(
            tensors[source], block.cin_S, block.source_S, block.stages, image=image,
            max_channels=max_width(block.convs[0].cin),
            shortcut=None if tail.shortcut is None else tensors[tail.shortcut], shortcut_source_S=block.shortcut_S,
        )  # fmt: skip
        for conv in block.convs:
            image = layout.output_image(image, conv.kernel, conv.stride)
        tensors.store(tail, y, block.stages[-1].width_S, image)
    return tensors[space.convs[-1].name], tensors.images[space.convs[-1].name]


def _block(convs: list[Conv], layer_of: dict[str, Layer], least: int) -> Block:
    """A chain for the instances of its last convolution: an inner instance serves several of them.

    Those that stay idle have ``least`` channels.
    """
    head, tail = layer_of[convs[0].name], layer_of[convs[-1].name]
    stages = []
    for conv in convs:
        layer = layer_of[conv.name]
        inner_S = layer.instances.instance_P[tail.instances.member_S]
        stages.append(
            BlockConv(
                weight=layer.weight,
                weight_source_S=layer.instances.weight_S[inner_S],
                width_S=_at_work(layer.cout_S[inner_S], tail.instances.idle_S, least),
                scale_SO=layer.scale_SO[inner_S],
                shift_SO=layer.shift_SO[inner_S],
                max_width=max_width(conv.cout),
                depthwise=conv.depthwise,
                kernel=conv.kernel,
                stride=conv.stride,
                activation=conv.activation,
            )
        )
    head_S = head.instances.instance_P[tail.instances.member_S]
    cin_S = _at_work(head.cin_S[head_S], tail.instances.idle_S, least)
    return Block(convs, cin_S, head.instances.source_S[head_S], tail.instances.shortcut_S, stages)


class _Tensors:
    """The ragged activations of a batch of images as it moves through the layers; freed after their last use."""

    def __init__(self, steps: list[list[Conv]], images_NCHW: Tensor) -> None:
        n, channels, height, width = images_NCHW.shape
        self.last_read = last_reads(steps)
        self.step = -1
        self.images: dict[str, Image] = {IMAGE: (n, height, width)}
        self.buffers = {IMAGE: layout.pack_activations([images_NCHW], channels)}

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name]

    def store(self, conv: Conv, output: Tensor, cout_S: Tensor, image: Image) -> None:
        """Keep the output of the next step, pooled if the layer pools, and free what no later step reads."""
        if conv.max_pool:
            output = kernels.ragged_max_pool(
                output, cout_S, _identity(cout_S), image=image, max_channels=max_width(conv.cout)
            )
            image = layout.output_image(image, 3, 2)
        self.buffers[conv.name], self.images[conv.name] = output, image
        self.step += 1
        for name in [name for name in self.buffers if self.last_read.get(name, self.step + 1) <= self.step]:
            del self.buffers[name]


class _Calibration(_Tensors):
    """Calibration images on their way through the layers.

    A convolution's output is kept as it is, with the BatchNorm and activation that whoever reads it applies
    (``pending``), unless a shortcut or a pooling needs the normalised tensor itself.
    """

    def __init__(self, space: Space, images_NCHW: Tensor) -> None:
        super().__init__([[conv] for conv in space.convs], images_NCHW)
        self.space = space
        self.pending: dict[str, tuple[Tensor, Tensor, str]] = {}
        self.materialised = materialised(space)
        self.least = least_channels(images_NCHW)

    def layer(self, net: PruningNet, index: int, instances: Instances) -> Layer:
        """Generate the weights of one layer, run it, and keep its output."""
        conv = self.space.convs[index]
        with stage("weights"):
            weight = self._weights(net, index, instances)
        genome_SG = instances.weight_genome_WG[instances.weight_S]
        cin_S, cout_S = self._widths(conv, genome_SG, instances.idle_S)
        image = layout.output_image(self.images[conv.source], conv.kernel, conv.stride)
        raw, sums = self._convolve(conv, instances, weight, cin_S, cout_S)
        scale_SO, shift_SO = kernels.scale_and_shift(sums, image[0] * image[1] * image[2], NORM_EPSILON)
        layer = Layer(instances, cin_S, cout_S, weight, scale_SO, shift_SO)
        self._keep(conv, layer, raw, image)
        return layer

    def _widths(self, conv: Conv, genome_SG: Tensor, idle_S: Tensor | None) -> tuple[Tensor, Tensor]:
        widths_SG = self.space.gene_widths(genome_SG).int()
        cin_S, cout_S = (self.space.width_of(width, widths_SG) for width in (conv.cin, conv.cout))
        return _at_work(cin_S, idle_S, self.least), _at_work(cout_S, idle_S, self.least)

    def _weights(self, net: PruningNet, index: int, instances: Instances) -> Tensor:
        genome_WG = instances.weight_genome_WG
        widths = self._widths(self.space.convs[index], genome_WG, instances.idle_W)
        return net.layer(index)(net.codes(index, genome_WG), *widths)

    def _convolve(
        self, conv: Conv, instances: Instances, weight: Tensor, cin_S: Tensor, cout_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        scale, shift, activation = self.pending.get(conv.source, (None, None, "none"))
        x, image = self[conv.source], self.images[conv.source]
        if conv.depthwise:
            return kernels.ragged_depthwise(
                x, weight, cout_S, instances.source_S, weight_source_S=instances.weight_S, image=image,
                kernel=conv.kernel, stride=conv.stride, max_channels=max_width(conv.cout),
                input_scale_LC=scale, input_shift_LC=shift, input_activation=activation, statistics=True,
            )  # fmt: skip
        return kernels.ragged_conv(
            x, weight, cin_S, cout_S, instances.source_S, weight_source_S=instances.weight_S, image=image,
            kernel=conv.kernel, stride=conv.stride, max_cin=max_width(conv.cin), max_cout=max_width(conv.cout),
            input_scale_LC=scale, input_shift_LC=shift, input_activation=activation, statistics=True,
        )  # fmt: skip

    def _keep(self, conv: Conv, layer: Layer, raw: Tensor, image: Image) -> None:
        if conv.name not in self.materialised:
            self.pending[conv.name] = (layer.scale_SO, layer.shift_SO, conv.activation)
        else:
            raw = kernels.ragged_normalise(
                raw, layer.scale_SO, layer.shift_SO, layer.cout_S, _identity(layer.cout_S), image=image,
                max_channels=max_width(conv.cout), activation=conv.activation,
                shortcut=None if conv.shortcut is None else self[conv.shortcut],
                shortcut_source_S=layer.instances.shortcut_S,
            )  # fmt: skip
        self.store(conv, raw, layer.cout_S, image)


def _at_work(width_S: Tensor, idle_S: Tensor | None, least: int) -> Tensor:
    """Widths of instances, ``least`` of the idle ones."""
    return width_S if idle_S is None else width_S.masked_fill(idle_S, least)


def least_channels(like: Tensor) -> int:
    """Channels of an instance that is not to be computed: none where all kernels end the tiles of such a one at once.

    Other kernels refuse it; of one channel they compute it, and nobody looks.
    """
    return 1 - all(backends.chosen(op, like.device, like.dtype) in NONE_IS_LEGAL for op in SCORING_OPS)


def _identity(width_S: Tensor) -> Tensor:
    """The slots of a buffer in order: each subnetwork reads its own."""
    return torch.arange(len(width_S), dtype=torch.int32, device=width_S.device)
