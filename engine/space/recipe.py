"""A training recipe as data, and how the paper's ImageNet recipes are scaled to small datasets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Schedule = Literal["linear", "step"]


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum 0.9 and label smoothing 0.1 (MetaPruning, section 4).

    ``lr`` falls linearly to zero, or by ten at each of the ``milestones`` (fractions of the run).
    """

    batch: int
    epochs: int
    lr: float
    schedule: Schedule
    weight_decay: float
    milestones: tuple[float, ...] = ()
    momentum: float = 0.9
    label_smoothing: float = 0.1

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of ``step`` (from 0) of a run of ``steps``."""
        if self.schedule == "linear":
            return self.lr * (1 - step / steps)
        return self.lr * 0.1 ** sum(step >= milestone * steps for milestone in self.milestones)


# Fewer training images than this make a dataset "small": the paper's batches would leave a handful of steps.
SMALL_DATA = 20_000
SMALL_BATCH = 64


def scaled(recipe: Recipe, images: int, small_lr: float) -> Recipe:
    """The recipe for a training set of ``images``: the paper's own, or its small-data form.

    On small data the batch becomes 64 (the paper's would see a digit set of a thousand images in two steps) and
    the learning rate the given one, which experiments on 32 px images support: the paper's rate scaled down in
    proportion to the batch (0.03) is too small for the PruningNet to leave its start. Epochs, schedule, weight
    decay, momentum and label smoothing stay the paper's.
    """
    if images >= SMALL_DATA:
        return recipe
    return replace(recipe, batch=min(SMALL_BATCH, images), lr=small_lr)
