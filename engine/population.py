"""Many structures scored in one pass: generate weights, calibrate BatchNorm, count correct images.

The definition of a score, given PruningNet weights, a genome, calibration images and sub-validation images:

1. generate the weights;
2. run all calibration images through the network as one batch, layer by layer, normalising each convolution's
   output by its own mean and variance over the whole batch (eps 1e-5);
3. fold those statistics into weights and biases and run the sub-validation images; the score is the number of
   correct top-1 answers, ties broken by the lower loss.

Two genomes that agree in every gene up to a layer have the same weights, statistics and activations up to it: a
population is a trie, and each of its nodes is computed once. A genome's score does not depend on the others.

Shape suffixes: P population, G genes, S instances of a layer (nodes of the trie), N images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from engine.data import Data, ImageSet, Preprocessing
from engine.pruningnet import NORM_EPSILON, PruningNet
from engine.rows import group_rows
from engine.space import IMAGE, Gene, Space, max_width
from engine.space.costs import cost_model
from kernels import layout

# Sub-validation images run at once: a constant, so that a score is reproducible.
IMAGE_CHUNK = 500
# Genomes per pass at most, and bytes of activations their calibration may take together. Scores depend on neither.
GENOMES_PER_PASS = 8
PASS_BYTES = 2 << 30


@dataclass(frozen=True)
class Instances:
    """The distinct computations of one layer for a population.

    ``genome_SG`` is one genome of each instance; ``source_S`` and ``shortcut_S`` the instance of the source and
    shortcut layers each one reads; ``instance_P`` the instance each genome of the population ends up in.
    """

    genome_SG: Tensor
    source_S: Tensor
    shortcut_S: Tensor | None
    instance_P: Tensor


@dataclass(frozen=True)
class Layer:
    """Packed weights of one layer's instances.

    ``bias_SO`` ``[S, O]`` is what folding BatchNorm into the weights leaves; None before they are folded.
    """

    instances: Instances
    cin_S: Tensor
    cout_S: Tensor
    weight: Tensor
    bias_SO: Tensor | None = None

    @property
    def identity_S(self) -> Tensor:
        """The source of an op that reads this layer's own output."""
        return torch.arange(len(self.cout_S), dtype=torch.int32, device=self.cout_S.device)


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

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The scored images, normalised, and their labels, in fixed order and chunks."""
        batches = torch.arange(len(self.subset)).split(IMAGE_CHUNK)
        for images_u8, labels in self.subset.stream(batches):
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


def plan(space: Space, genome_PG: Tensor) -> list[Instances]:
    """The instances of every layer: the trie of a population, exact common prefixes merged."""
    genes: set[Gene] = set()
    image_P = torch.zeros(len(genome_PG), dtype=torch.int64, device=genome_PG.device)
    instance_of = {IMAGE: image_P}
    layers = []
    for conv in space.convs:
        genes |= {width for width in (conv.cin, conv.cout, *conv.context) if isinstance(width, Gene)}
        columns = sorted(space.gene_index[gene] for gene in genes)
        instance_P, first_S = group_rows(genome_PG[:, columns])
        source_S = instance_of[conv.source][first_S].int()
        shortcut_S = None if conv.shortcut is None else instance_of[conv.shortcut][first_S].int()
        layers.append(Instances(genome_PG[first_S], source_S, shortcut_S, instance_P))
        instance_of[conv.name] = instance_P
    return layers


def score(net: PruningNet, genome_PG: Tensor, images: ScoringImages) -> Scores:
    """Score a population of valid genomes ``[P, G]`` by the definition above."""
    correct = torch.zeros(len(genome_PG), dtype=torch.int64, device=genome_PG.device)
    loss = torch.zeros(len(genome_PG), dtype=torch.float64, device=genome_PG.device)
    for members, scores in score_passes(net, genome_PG, images):
        correct[members], loss[members] = scores.correct, scores.loss
    return Scores(correct, loss, len(images.subset))


def score_passes(net: PruningNet, genome_PG: Tensor, images: ScoringImages) -> Iterator[tuple[Tensor, Scores]]:
    """Score a population a few genomes at a time: their positions in it, and their scores."""
    # Neighbours in lexicographic order share the longest prefixes.
    order = group_rows(genome_PG)[0].argsort(stable=True)
    for members in order.split(genomes_per_pass(net.space, images)):
        yield members, _score_pass(net, genome_PG[members], images)


def genomes_per_pass(space: Space, images: ScoringImages) -> int:
    """As many genomes as calibrate within `PASS_BYTES` if all were full networks; at least one."""
    full = space.uniform_choice(space.choices - 1)
    per_image = int(cost_model(space, images.preprocessing.resolution).peak_activation_bytes(full))
    # A convolution's output is there twice: raw, and normalised.
    per_genome = 2 * per_image * len(images.calibration_NCHW)
    return max(1, min(GENOMES_PER_PASS, PASS_BYTES // per_genome))


@torch.no_grad()
def _score_pass(net: PruningNet, genome_PG: Tensor, images: ScoringImages) -> Scores:
    layers = _calibrate(net, plan(net.space, genome_PG), images.calibration_NCHW)
    last = layers[-1]
    correct_S = torch.zeros(len(last.cout_S), dtype=torch.int64, device=genome_PG.device)
    loss_S = torch.zeros(len(last.cout_S), dtype=torch.float64, device=genome_PG.device)
    for images_NCHW, labels_N in images.chunks():
        features, image = _run_folded(net.space, layers, images_NCHW)
        chunk_correct_S, chunk_loss_S = kernels.score_logits(
            features,
            net.classifier.weight,
            net.classifier.bias,
            labels_N,
            last.cout_S,
            last.identity_S,
            image=image,
        )
        correct_S += chunk_correct_S
        loss_S += chunk_loss_S
    instance_P, count = last.instances.instance_P, len(images.subset)
    return Scores(correct_S[instance_P], loss_S[instance_P] / count, count)


def _calibrate(net: PruningNet, layers: list[Instances], images_NCHW: Tensor) -> list[Layer]:
    """Steps 1 and 2: the layers, with the statistics of these images folded in."""
    folded = []
    run = _Activations(net.space, images_NCHW)
    for index, (conv, instances) in enumerate(zip(net.space.convs, layers, strict=True)):
        generator = net.layer(index)
        widths_SG = net.space.gene_widths(instances.genome_SG).int()
        cin_S, cout_S = (net.space.width_of(width, widths_SG) for width in (conv.cin, conv.cout))
        codes_SH = net.codes(index, instances.genome_SG)
        raw = Layer(instances, cin_S, cout_S, generator(codes_SH, cin_S, cout_S))
        output, sums = run.convolve(index, raw)
        pixels = run.output_pixels(index)
        mean_SO = sums[:, 0] / pixels
        variance_SO = (sums[:, 1] / pixels - mean_SO**2).clamp(min=0)
        scale_SO = (variance_SO + NORM_EPSILON).rsqrt()
        shift_SO = (-mean_SO * scale_SO).to(codes_SH.dtype)
        scale_SO = scale_SO.to(codes_SH.dtype)
        run.normalise(index, raw, output, scale_SO, shift_SO)
        weight = generator(codes_SH, cin_S, cout_S, scale_SO=scale_SO)
        folded.append(Layer(instances, cin_S, cout_S, weight, shift_SO))
    return folded


def _run_folded(space: Space, layers: list[Layer], images_NCHW: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Step 3 up to the classifier: the last feature maps of all instances and their shape."""
    run = _Activations(space, images_NCHW)
    for index, layer in enumerate(layers):
        output, _ = run.convolve(index, layer)
        run.store(index, layer, output)
    return run.tensors[space.convs[-1].name], run.images[space.convs[-1].name]


class _Activations:
    """The ragged activations of a batch of images as it moves through the layers; freed after their last use."""

    def __init__(self, space: Space, images_NCHW: Tensor) -> None:
        self.space = space
        n, channels, height, width = images_NCHW.shape
        self.images: dict[str, tuple[int, int, int]] = {IMAGE: (n, height, width)}
        self.tensors = {IMAGE: layout.pack_activations([images_NCHW], channels)}
        self.last_read = {name: i for i, c in enumerate(space.convs) for name in (c.source, c.shortcut) if name}

    def output_pixels(self, index: int) -> int:
        """Values per channel a convolution writes: images × height × width."""
        n, height, width = self._convolved(index)
        return n * height * width

    def convolve(self, index: int, layer: Layer) -> tuple[Tensor, Tensor]:
        """The raw convolution with its sums if the layer is not folded; else all of it, with its epilogue."""
        conv = self.space.convs[index]
        x, instances = self.tensors[conv.source], layer.instances
        calibrating = layer.bias_SO is None
        image = self.images[conv.source]
        activation = "none" if calibrating else conv.activation
        if conv.depthwise:
            return kernels.ragged_depthwise(
                x, layer.weight, layer.cout_S, instances.source_S, image=image, kernel=conv.kernel, stride=conv.stride,
                max_channels=max_width(conv.cout), bias_SC=layer.bias_SO, activation=activation, statistics=calibrating,
            )  # fmt: skip
        added = None if calibrating else conv.shortcut
        return kernels.ragged_conv(
            x, layer.weight, layer.cin_S, layer.cout_S, instances.source_S, image=image, kernel=conv.kernel,
            stride=conv.stride, max_cin=max_width(conv.cin), max_cout=max_width(conv.cout), bias_SO=layer.bias_SO,
            activation=activation, statistics=calibrating, shortcut=None if added is None else self.tensors[added],
            shortcut_source_S=None if added is None else instances.shortcut_S,
        )  # fmt: skip

    def normalise(self, index: int, layer: Layer, output: Tensor, scale_SO: Tensor, shift_SO: Tensor) -> None:
        """Store ``activation(output · scale + shift + shortcut)``."""
        conv = self.space.convs[index]
        normalised = kernels.ragged_normalise(
            output, scale_SO, shift_SO, layer.cout_S, layer.identity_S,
            image=self._convolved(index), max_channels=max_width(conv.cout), activation=conv.activation,
            shortcut=None if conv.shortcut is None else self.tensors[conv.shortcut],
            shortcut_source_S=layer.instances.shortcut_S,
        )  # fmt: skip
        self.store(index, layer, normalised)

    def store(self, index: int, layer: Layer, output: Tensor) -> None:
        """Keep a layer's output, pooled if the layer pools, and free what no later layer reads."""
        conv = self.space.convs[index]
        image = self._convolved(index)
        if conv.max_pool:
            output = kernels.ragged_max_pool(
                output, layer.cout_S, layer.identity_S, image=image, max_channels=max_width(conv.cout)
            )
            n, height, width = image
            image = (n, layout.output_size(height, 3, 2), layout.output_size(width, 3, 2))
        self.tensors[conv.name], self.images[conv.name] = output, image
        for name in [name for name in self.tensors if self.last_read.get(name, index + 1) <= index]:
            del self.tensors[name]

    def _convolved(self, index: int) -> tuple[int, int, int]:
        conv = self.space.convs[index]
        n, *sides = self.images[conv.source]
        height, width = (layout.output_size(side, conv.kernel, conv.stride) for side in sides)
        return n, height, width
