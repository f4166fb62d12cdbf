"""Many structures scored in one pass: generate weights, calibrate BatchNorm, count correct images.

The definition of a score, given PruningNet weights, a genome, calibration images and sub-validation images:

1. generate the weights;
2. run all calibration images through the network as one batch, layer by layer, normalising each convolution's
   output by its own mean and variance over the whole batch (eps 1e-5);
3. normalise by those statistics and run the sub-validation images; the score is the number of correct top-1
   answers, ties broken by the lower loss.

What genomes have in common is computed once (`engine.trie`). On a GPU nothing is read back, unless there is a race or
images are decoded as they are needed. A genome's score is the same bit for bit alone and in
any population, whatever memory it is given. Activations have the precision of the PruningNet's bases.

Shape suffixes: P population, G genes, N images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.calibrated import calibrate, count_correct
from engine.data import Data, ImageSet, Preprocessing
from engine.errors import UserError
from engine.memory import default_memory, is_out_of_memory
from engine.pruningnet import PruningNet
from engine.racing import Race
from engine.rows import lexicographic_order
from engine.stages import each, stage
from engine.trie import activation_bytes, fixed_shape_on, plan


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

    def positions(self) -> Tensor:
        """All scored images, where they are looked up: on the device, or by the processes that decode them."""
        device = self.subset.labels.device if self.subset.resident else "cpu"
        return torch.arange(len(self.subset), device=device)

    def chunks(self, positions: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """These of the scored images ``size`` at a time: their positions, the normalised images and their labels."""
        parts = positions.split(size)
        for part, (images_u8, labels) in zip(parts, self.subset.stream(parts), strict=True):
            yield part, self.preprocessing(images_u8), labels


def scoring_images(data: Data, calibration_images: int) -> ScoringImages:
    """The first sub-training images for calibration, without augmentation, and the sub-validation images."""
    sub_train = data.subset("sub_train")
    first = torch.arange(min(calibration_images, len(sub_train)))
    return ScoringImages(data.preprocessing(sub_train.images(first)), data.subset("sub_validation"), data.preprocessing)


@dataclass(frozen=True)
class Scores:
    """What a population answered: whether it is right, bool ``[P, N]``, and its cross-entropy, float64 ``[P, N]``.

    ``seen_PN`` says which images each genome was shown: all, unless it lost a race or the images are shared out.
    """

    right_PN: Tensor
    loss_PN: Tensor
    seen_PN: Tensor

    @classmethod
    def empty(cls, genomes: int, images: int, device: torch.device) -> Scores:
        """No image shown to anybody yet."""
        unseen = torch.zeros(genomes, images, dtype=torch.bool, device=device)
        return cls(unseen, unseen.double(), unseen.clone())

    @property
    def correct(self) -> Tensor:
        """Top-1 correct images, int64 ``[P]``."""
        return (self.right_PN & self.seen_PN).sum(1)

    @property
    def loss(self) -> Tensor:
        """Mean cross-entropy of the images seen, float64 ``[P]``."""
        # `sum` adds in an order that depends on the shape; a running sum goes from image to image.
        return self.loss_PN.where(self.seen_PN, 0).cumsum(1)[:, -1] / self.images

    @property
    def images(self) -> Tensor:
        """Images seen, int64 ``[P]``."""
        return self.seen_PN.sum(1)


def score(net: PruningNet, genome_PG: Tensor, images: ScoringImages, memory: int | None = None) -> Scores:
    """Score a population of valid genomes ``[P, G]`` by the definition above, in ``memory`` bytes of activations."""
    scores = Scores.empty(len(genome_PG), len(images.subset), genome_PG.device)
    for members, part in score_passes(net, genome_PG, images, memory):
        for name, whole in vars(scores).items():
            whole[members] = getattr(part, name)
    return scores


def score_passes(
    net: PruningNet,
    genome_PG: Tensor,
    images: ScoringImages,
    memory: int | None = None,
    race: Race | None = None,
    positions: Tensor | None = None,
) -> Iterator[tuple[Tensor, Scores]]:
    """Score a population as many genomes at a time as ``memory`` allows: their positions, and their scores.

    ``memory`` in bytes bounds the activations alive at once (default: a fraction of what is free). If it runs out
    all the same, half as much is tried; raises `UserError` when a single genome does not fit. ``race`` lets a genome
    stop early; ``positions`` are the images to score on (default: all), and exclude a race.
    """
    memory = memory or default_memory(genome_PG.device)
    slices = race.slices if race else [images.positions() if positions is None else positions]
    # Neighbours in lexicographic order share the longest prefixes.
    with stage("sharing"):
        order = lexicographic_order(genome_PG, 0, net.space.choices - 1)
    while len(order):
        with stage("sharing"):
            count = genomes_per_pass(net, genome_PG[order], images, memory)
        try:
            scores = _score_pass(net, genome_PG[order[:count]], images, memory, slices, race)
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
    if fixed_shape_on(genome_PG.device):
        # The shape alone decides.
        genome_PG = genome_PG.to("meta")
    return activation_bytes(net.space, plan(net.space, genome_PG), (n, height, width), net.precision.itemsize)


def _score_pass(
    net: PruningNet,
    genome_PG: Tensor,
    images: ScoringImages,
    memory: int,
    slices: list[Tensor],
    race: Race | None,
) -> Scores:
    with stage("sharing"):
        layers = plan(net.space, genome_PG)
    with stage("calibration"):
        calibrated = calibrate(net, layers, images.calibration_NCHW)
    resolution = images.preprocessing.resolution
    per_image = activation_bytes(net.space, layers, (1, resolution, resolution), net.precision.itemsize)
    size = max(1, min(len(images.subset), memory // per_image))
    scores = Scores.empty(len(genome_PG), len(images.subset), genome_PG.device)
    running_P = torch.arange(len(genome_PG), device=genome_PG.device)
    for number, positions in enumerate(slices):
        for part, images_NCHW, labels_N in each("images", images.chunks(positions, size)):
            with stage("scoring"):
                right_PN, loss_PN = count_correct(calibrated, images_NCHW, labels_N)
                cells = running_P[:, None], part.to(running_P.device)
                scores.right_PN[cells], scores.loss_PN[cells], scores.seen_PN[cells] = right_PN, loss_PN, True
        if race and number + 1 < len(slices):
            with stage("selection"):
                goes_on_P = race.goes_on(scores.right_PN[running_P], torch.cat(slices[: number + 1]))
            if not bool(goes_on_P.any()):
                break
            if not bool(goes_on_P.all()):
                calibrated, running_P = calibrated.only(goes_on_P), running_P[goes_on_P]
    return scores
