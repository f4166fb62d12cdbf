"""The training loop that the PruningNet and the final network share.

Everything a step needs is a function of (seed, step): the batch, its augmentation and the learning rate. A run
restored from a checkpoint (weights, momentum, step) therefore continues bit for bit.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from engine.data import Data, ImageSet, augment, index_batches
from engine.data.preprocessing import PIECE
from engine.errors import UserError
from engine.random import stream_key
from engine.run.ahead import StepTimer, made_ahead
from engine.run.average import EVERY, WeightAverage
from engine.run.checkpoint import (
    Checkpoint,
    CheckpointClock,
    check_disk_space,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from engine.run.command import Interruption
from engine.run.metrics import MetricsLog
from engine.run.optimizer import Optimizer
from engine.space.recipe import Recipe

# Weights are what is validated and searched with. Where that is an average, what goes on being trained lies beside it.
WEIGHTS, MOMENTUM, TRAINED = "weights", "momentum", "trained"
DATA_WAIT = "data_wait"
LOG_EVERY = 10
# Checkpoints on disk at once: the two that are kept and the one being written.
CHECKPOINTS_ON_DISK = 3


class NonFiniteLossError(RuntimeError):
    """Training produced a loss that is no number."""


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and for how long.

    ``loss(images, labels, step)`` is a number, and after a backward pass through it ``optimizer.step(lr)`` trains the
    module; ``validate()`` gives true accuracies in percent by name and is called every ``validate_every`` steps and at
    the end. ``manifest`` is stored with every checkpoint. If there is an ``average``, checkpoints have it for weights.
    """

    run: Path
    module: nn.Module
    recipe: Recipe
    steps: int
    seed: int
    data: Data
    images: ImageSet
    loss: Callable[[Tensor, Tensor, int], Tensor]
    optimizer: Optimizer
    validate: Callable[[], dict[str, float]]
    validate_every: int
    manifest: dict[str, Any]
    checkpoint_minutes: float
    tensorboard: bool
    average: WeightAverage | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.run / "checkpoints"

    def check_disk_space(self) -> None:
        """Raise `UserError` if the checkpoints will not fit on the disk."""
        size = sum(p.numel() * p.element_size() for p in self.module.parameters())
        files = 2 if self.average is None else 3
        check_disk_space(self.run, CHECKPOINTS_ON_DISK * files * size)

    def tensors(self, done: int) -> dict[str, dict[str, Tensor]]:
        """The files of the checkpoint after ``done`` steps."""
        trained = self.module.state_dict()
        averaged = self.average.values if self.average else {}
        files = {WEIGHTS: {**trained, **averaged}}
        if done < self.steps:
            files[MOMENTUM] = self.optimizer.momentum()
            if averaged:
                files[TRAINED] = trained
        return files


def train(training: Training, console: Console) -> Checkpoint:
    """Train to the end, from the latest checkpoint if there is one, and return the final checkpoint.

    Ctrl-C and SIGTERM save and raise `engine.run.command.Interrupted`; a loss that is not finite raises
    `NonFiniteLossError` before it is applied. The final checkpoint holds weights alone.
    """
    latest = load_checkpoint(training.checkpoints)
    if latest is not None:
        _check_provenance(training, latest)
        restore(training.module, latest.tensors(WEIGHTS), latest.folder)
        if latest.step == training.steps:
            return latest
        if training.average is not None and latest.step >= EVERY:
            training.average.start()
            restore(training.module, latest.tensors(TRAINED), latest.folder)
        _restore_momentum(training, latest)
    start = 0 if latest is None else latest.step
    log = MetricsLog(training.run, 0 if latest is None else latest.manifest["metrics_bytes"], training.tensorboard)
    clock = CheckpointClock(training.checkpoint_minutes)

    def save(done: int) -> Checkpoint:
        began = time.monotonic()
        manifest = {**training.manifest, "steps": training.steps, "metrics_bytes": log.size()}
        checkpoint = save_checkpoint(training.checkpoints, done, training.tensors(done), manifest)
        clock.saved(time.monotonic() - began)
        return checkpoint

    timer = StepTimer()
    with Interruption() as interruption, _progress(console) as progress, closing(_batches(training, start)) as batches:
        task = progress.add_task("", total=training.steps, completed=start, status="")
        for step in range(start, training.steps):
            timer.begin()
            images, labels = next(batches)
            timer.ready()
            loss = _step(training, images, labels, step)
            done = step + 1
            if training.average is not None and training.average.due(done):
                training.optimizer.settle()
                training.average.take(done)
            timer.done()
            status = f"loss {loss:.3f}  data wait {timer.data_wait:.0f} %"
            progress.update(task, completed=done, status=status)
            if done % LOG_EVERY == 0 or done == training.steps:
                lr = training.recipe.lr_at(step, training.steps)
                log.write(done, {"loss": loss, "lr": lr, DATA_WAIT: round(timer.data_wait, 1)})
            if done % training.validate_every == 0 or done == training.steps:
                training.optimizer.settle()
                accuracies = training.validate()
                log.write(done, accuracies)
                shown = "  ".join(f"{name} {value:.1f} %" for name, value in accuracies.items())
                progress.console.print(
                    f"step {done}/{training.steps}  {status}  {shown}", highlight=False, soft_wrap=True
                )
            # An optimizer comes to rest after steps of its own choice: to make it would change what comes after.
            if done < training.steps and training.optimizer.at_rest:
                interruption.stop_if_asked(lambda done=done: save(done))  # type: ignore[misc]
                if clock.due():
                    save(done)
        final = save(training.steps)
    log.close()
    return final


def _check_provenance(training: Training, latest: Checkpoint) -> None:
    """Raise `UserError` unless a checkpoint is of the same network, images and preprocessing as this training."""
    for name, value in training.manifest.items():
        if latest.manifest.get(name) != value:
            raise UserError(f"{latest.folder} was trained with another {name}: restore what it was, or start anew")


def _step(training: Training, images: Tensor, labels: Tensor, step: int) -> float:
    """One update; returns the loss. Raises `NonFiniteLossError` before anything is changed."""
    loss = training.loss(images, labels, step)
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the loss of step {step + 1} is {value}; nothing was updated with it; lower --lr ({training.recipe.lr:g})"
        )
    loss.backward()
    training.optimizer.step(training.recipe.lr_at(step, training.steps))
    return value


def _batches(training: Training, start: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Augmented images and labels of every step from ``start`` on, made while the steps before it are done."""
    made = _make_batches(training, start)
    # Queueing work for a GPU that holds the images, or augmenting a few small ones, is over before a thread is awake.
    on_gpu = training.data.device.type == "cuda"
    small = training.recipe.batch * 3 * training.data.preprocessing.resize**2 <= PIECE
    return made if training.images.resident and (on_gpu or small) else made_ahead(made)


def _make_batches(training: Training, start: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    count, batch = len(training.images), training.recipe.batch
    positions = index_batches(count, batch, training.seed, start, training.steps - start)
    for step, (images_u8, labels) in enumerate(training.images.stream(positions), start):
        generator = torch.Generator().manual_seed(stream_key(training.seed, "augmentation", step) >> 1)
        images = augment(images_u8, training.data.augmentation, training.data.preprocessing, generator)
        yield images, labels


def _restore_momentum(training: Training, checkpoint: Checkpoint) -> None:
    """Take over the momentum, or raise `UserError` if it has not the parameters' shapes or is not finite."""
    momentum, parameters = checkpoint.tensors(MOMENTUM), dict(training.module.named_parameters())
    for name, buffer in momentum.items():
        if name not in parameters or buffer.shape != parameters[name].shape:
            raise UserError(f"{checkpoint.folder}: the momentum of {name} does not fit this network")
        if not bool(torch.isfinite(buffer).all()):
            raise UserError(f"{checkpoint.folder}: the momentum of {name} holds values that are not finite")
    training.optimizer.restore(momentum)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[status]}"),
        TextColumn("time left"), TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip


def keep_freed_memory() -> None:
    """Let the C allocator keep freed memory instead of handing it back to the system.

    Every step allocates gradients of hundreds of megabytes; taking them anew from the system costs a page fault per
    4 KB, which doubled the time of a backward pass. Has an effect with glibc on Linux; elsewhere it does nothing.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
