"""Many structures scored in one pass: generate weights, calibrate BatchNorm, count correct images.

The definition of a score, given PruningNet weights, a genome, calibration images and sub-validation images:

1. generate the weights;
2. run all calibration images through the network as one batch, layer by layer, normalising each convolution's
   output by its own mean and variance over the whole batch (eps 1e-5);
3. normalise by those statistics and run the sub-validation images; the score is the number of correct top-1
   answers, ties broken by the lower loss.

What genomes have in common is computed once (`engine.trie`). A genome's score is the same bit for bit alone and in
any population, whatever memory it is given. Activations have the precision of the PruningNet's bases.

Shape suffixes: P population, G genes, S instances of a layer, O output channels, N images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from engine.data import Data, ImageSet, Preprocessing
from engine.errors import UserError
from engine.memory import default_memory, is_out_of_memory
from engine.pruningnet import NORM_EPSILON, PruningNet
from engine.rows import group_rows
from engine.space import IMAGE, Conv, Space, max_width
from engine.trie import Instances, activation_bytes, blocks, last_reads, materialised, plan
from kernels import BlockConv, layout
from kernels.layout import Image


@dataclass(frozen=True)
class ScoringImages:
    """The calibration images, normalised ``[C, 3, R, R]``, and the labelled images that are scored.

    Raises `ValueError` for the test split: it is for the final number alone.
    """

    calibration_NCHW: Tensor
    subset: ImageSet
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        if self.subset.name == "test":
            raise ValueError("candidates are never scored on the test split; use sub_validation")

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The scored images, normalised, and their labels, in fixed order, ``size`` at a time."""
        for images_u8, labels in self.subset.stream(torch.arange(len(self.subset)).split(size)):
            yield self.preprocessing(images_u8), labels


def scoring_images(data: Data, calibration_images: int) -> ScoringImages:
    """The first sub-training images for calibration, without augmentation, and the sub-validation images."""
    sub_train = data.subset("sub_train")
    first = torch.arange(min(calibration_images, len(sub_train)))
    return ScoringImages(data.preprocessing(sub_train.images(first)), data.subset("sub_validation"), data.preprocessing)


@dataclass(frozen=True)
class Scores:
    """Top-1 correct images, int64 ``[P]``, and mean cross-entropy, float64 ``[P]``, of a population."""

    correct: Tensor
    loss: Tensor
    images: int


@dataclass(frozen=True)
class Layer:
    """The weights of one layer's instances, and the BatchNorm ``scale_SO``, ``shift_SO`` of their outputs."""

    instances: Instances
    cin_S: Tensor
    cout_S: Tensor
    weight: Tensor
    scale_SO: Tensor
    shift_SO: Tensor


@dataclass(frozen=True)
class Block:
    """A chain of calibrated convolutions of all instances, run as one."""

    convs: list[Conv]
    cin_S: Tensor
    source_S: Tensor
    shortcut_S: Tensor | None
    stages: list[BlockConv]


@dataclass(frozen=True)
class Calibrated:
    """A population ready to look at images: ``instance_P`` is the instance of the last layer of each genome."""

    net: PruningNet
    blocks: list[Block]
    instance_P: Tensor


def score(net: PruningNet, genome_PG: Tensor, images: ScoringImages, memory: int | None = None) -> Scores:
    """Score a population of valid genomes ``[P, G]`` by the definition above, in ``memory`` bytes of activations."""
    correct = torch.zeros(len(genome_PG), dtype=torch.int64, device=genome_PG.device)
    loss = torch.zeros(len(genome_PG), dtype=torch.float64, device=genome_PG.device)
    for members, scores in score_passes(net, genome_PG, images, memory):
        correct[members], loss[members] = scores.correct, scores.loss
    return Scores(correct, loss, len(images.subset))


def score_passes(
    net: PruningNet, genome_PG: Tensor, images: ScoringImages, memory: int | None = None
) -> Iterator[tuple[Tensor, Scores]]:
    """Score a population as many genomes at a time as ``memory`` allows: their positions, and their scores.

    ``memory`` in bytes bounds the activations alive at once (default: a fraction of what is free). If it runs out
    all the same, half as much is tried; raises `UserError` when a single genome does not fit.
    """
    memory = memory or default_memory(genome_PG.device)
    # Neighbours in lexicographic order share the longest prefixes.
    order = group_rows(genome_PG)[0].argsort(stable=True)
    while len(order):
        count = genomes_per_pass(net, genome_PG[order], images, memory)
        try:
            scores = _score_pass(net, genome_PG[order[:count]], images, memory)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            memory //= 2
            if count == 1 and memory < _calibration_bytes(net, genome_PG[order[:1]], images) // 4:
                raise UserError(
                    f"one structure needs more memory than there is for {len(images.calibration_NCHW)} calibration "
                    f"images of {images.preprocessing.resolution} px: lower --calibration-images"
                ) from error
            continue
        yield order[:count], scores
        order = order[count:]


def genomes_per_pass(net: PruningNet, genome_PG: Tensor, images: ScoringImages, memory: int) -> int:
    """How many of the first genomes calibrate within ``memory`` bytes of activations; at least one."""
    fits, too_many = 1, len(genome_PG) + 1
    while fits + 1 < too_many:
        # Doubling, then bisection: a plan costs less the fewer genomes it has.
        count = min(2 * fits, (fits + too_many) // 2)
        if _calibration_bytes(net, genome_PG[:count], images) <= memory:
            fits = count
        else:
            too_many = count
    return fits


def _calibration_bytes(net: PruningNet, genome_PG: Tensor, images: ScoringImages) -> int:
    n, _, height, width = images.calibration_NCHW.shape
    return activation_bytes(net.space, plan(net.space, genome_PG), (n, height, width), net.precision.itemsize)


def _score_pass(net: PruningNet, genome_PG: Tensor, images: ScoringImages, memory: int) -> Scores:
    layers = plan(net.space, genome_PG)
    calibrated = calibrate(net, layers, images.calibration_NCHW)
    resolution = images.preprocessing.resolution
    per_image = activation_bytes(net.space, layers, (1, resolution, resolution), net.precision.itemsize)
    size = max(1, min(len(images.subset), memory // per_image))
    parts = [count_correct(calibrated, images_NCHW, labels_N) for images_NCHW, labels_N in images.chunks(size)]
    correct_PN, loss_PN = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    # `sum` adds in an order that depends on the shape; a running sum goes from image to image.
    return Scores(correct_PN.sum(1), loss_PN.cumsum(1)[:, -1] / len(images.subset), len(images.subset))


@torch.no_grad()
def calibrate(net: PruningNet, layers: list[Instances], images_NCHW: Tensor) -> Calibrated:
    """Steps 1 and 2 for a population with this plan: its weights, and the statistics of these images."""
    run = _Calibration(net.space, images_NCHW.to(net.precision))
    calibrated = [run.layer(net, index, instances) for index, instances in enumerate(layers)]
    layer_of = {conv.name: layer for conv, layer in zip(net.space.convs, calibrated, strict=True)}
    return Calibrated(net, [_block(chain, layer_of) for chain in blocks(net.space)], layers[-1].instance_P)


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


def _block(convs: list[Conv], layer_of: dict[str, Layer]) -> Block:
    """A chain for the instances of its last convolution: an inner instance serves several of them."""
    head, tail = layer_of[convs[0].name], layer_of[convs[-1].name]
    stages = []
    for conv in convs:
        layer = layer_of[conv.name]
        inner_S = layer.instances.instance_P[tail.instances.member_S]
        stages.append(
            BlockConv(
                weight=layer.weight,
                weight_source_S=layer.instances.weight_S[inner_S],
                width_S=layer.cout_S[inner_S],
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
    return Block(convs, head.cin_S[head_S], head.instances.source_S[head_S], tail.instances.shortcut_S, stages)


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

    def layer(self, net: PruningNet, index: int, instances: Instances) -> Layer:
        """Generate the weights of one layer, run it, and keep its output."""
        conv = self.space.convs[index]
        weight = self._weights(net, index, instances.weight_genome_WG)
        genome_SG = instances.weight_genome_WG[instances.weight_S]
        cin_S, cout_S = self._widths(conv, genome_SG)
        image = layout.output_image(self.images[conv.source], conv.kernel, conv.stride)
        raw, sums = self._convolve(conv, instances, weight, cin_S, cout_S)
        pixels = image[0] * image[1] * image[2]
        mean_SO = sums[:, 0] / pixels
        variance_SO = (sums[:, 1] / pixels - mean_SO**2).clamp(min=0)
        scale_SO = (variance_SO + NORM_EPSILON).rsqrt()
        layer = Layer(instances, cin_S, cout_S, weight, scale_SO.float(), (-mean_SO * scale_SO).float())
        self._keep(conv, layer, raw, image)
        return layer

    def _widths(self, conv: Conv, genome_SG: Tensor) -> tuple[Tensor, Tensor]:
        widths_SG = self.space.gene_widths(genome_SG).int()
        return self.space.width_of(conv.cin, widths_SG), self.space.width_of(conv.cout, widths_SG)

    def _weights(self, net: PruningNet, index: int, genome_WG: Tensor) -> Tensor:
        return net.layer(index)(net.codes(index, genome_WG), *self._widths(self.space.convs[index], genome_WG))

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


def _identity(width_S: Tensor) -> Tensor:
    """The slots of a buffer in order: each subnetwork reads its own."""
    return torch.arange(len(width_S), dtype=torch.int32, device=width_S.device)
