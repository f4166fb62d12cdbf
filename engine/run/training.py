"""The training loop that the PruningNet and the final network share.

Everything a step needs is a function of (seed, step): the batch, its augmentation and the learning rate. A run
restored from a checkpoint (weights, momentum, step) therefore continues bit for bit.

Several ranks (`Team`) do every step together, each on its part of the batch. Rank 0 trains as a single process does and
keeps the run directory (`train`); the others do nothing besides the steps (`follow`).
"""

from __future__ import annotations

import ctypes
import math
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from engine.data import Data, ImageSet, augment, index_batches
from engine.data.preprocessing import PIECE
from engine.errors import RankError, UserError
from engine.random import stream_key
from engine.run import ranks
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
from engine.run.team import ALONE, Team
from engine.space.recipe import Recipe

# Weights are what is validated and searched with. Where that is an average, what goes on being trained lies beside it.
WEIGHTS, MOMENTUM, TRAINED = "weights", "momentum", "trained"
DATA_WAIT = "data_wait"
FROM_CHECKPOINT = "the same command with --resume goes on from the last checkpoint"
LOG_EVERY = 10
# Checkpoints on disk at once: the two that are kept and the one being written.
CHECKPOINTS_ON_DISK = 3


class NonFiniteLossError(RuntimeError):
    """Training produced a loss that is no number."""


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and for how long.

    ``loss(images, labels, step)`` is a number or several that are added, as are those of all ranks, and after a
    backward pass through it ``optimizer.step(lr)`` trains the module; ``validate()`` gives true accuracies in percent
    by name and is called every ``validate_every`` steps and at the end. ``manifest`` is stored with every checkpoint.
    All ranks call these functions at the same time. If there is an ``average``, checkpoints have it for weights.
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
    team: Team = ALONE
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
        """Everything that changes from step to step: the files of the checkpoint after ``done`` steps."""
        trained = self.module.state_dict()
        averaged = self.average.values if self.average else {}
        files = {WEIGHTS: {**trained, **averaged}}
        if done < self.steps:
            files[MOMENTUM] = self.optimizer.momentum()
            if averaged:
                files[TRAINED] = trained
        return files


class Wishes(NamedTuple):
    """What is to be done after a step: to stop because of a signal (0: none came), to save."""

    signal: int
    save: bool


class Step(NamedTuple):
    """What came of a step that all ranks have done.

    ``exchanged`` counts the bytes they gave each other for it; ``data_wait`` is the percentage of the time so far that
    steps waited for their images.
    """

    done: int
    loss: float
    accuracies: dict[str, float]
    wishes: Wishes
    exchanged: int
    data_wait: float


def train(training: Training, console: Console) -> Checkpoint:
    """Train to the end, from the latest checkpoint if there is one, and return the final checkpoint.

    Ctrl-C and SIGTERM save and raise `engine.run.command.Interrupted`; a loss that is not finite raises
    `NonFiniteLossError` before it is applied. The final checkpoint holds weights alone.
    """
    latest = _restore_latest(training)
    start = 0 if latest is None else latest.step
    if latest is not None and start == training.steps:
        return latest
    log = MetricsLog(training.run, 0 if latest is None else latest.manifest["metrics_bytes"], training.tensorboard)
    clock = CheckpointClock(training.checkpoint_minutes)

    def save(done: int) -> Checkpoint:
        began = time.monotonic()
        manifest = {**training.manifest, "steps": training.steps, "metrics_bytes": log.size()}
        checkpoint = save_checkpoint(training.checkpoints, done, training.tensors(done), manifest)
        clock.saved(time.monotonic() - began)
        ranks.rescue(FROM_CHECKPOINT)
        return checkpoint

    def wishes() -> Wishes:
        return Wishes(interruption.received or 0, clock.due())

    with (
        Interruption() as interruption,
        _progress(console) as progress,
        closing(_steps(training, start, wishes)) as steps,
    ):
        task = progress.add_task("", total=training.steps, completed=start, status="")
        for done, loss, accuracies, wished, exchanged, data_wait in steps:
            status = f"loss {loss:.3f}  data wait {data_wait:.0f} %"
            progress.update(task, completed=done, status=status)
            if done % LOG_EVERY == 0 or done == training.steps:
                lr = training.recipe.lr_at(done - 1, training.steps)
                record = {"loss": loss, "lr": lr, DATA_WAIT: round(data_wait, 1)}
                log.write(done, {**record, "exchanged_bytes": exchanged} if exchanged else record)
            if accuracies:
                log.write(done, accuracies)
                shown = "  ".join(f"{name} {value:.1f} %" for name, value in accuracies.items())
                progress.console.print(
                    f"step {done}/{training.steps}  {status}  {shown}", highlight=False, soft_wrap=True
                )
            if done == training.steps:
                break
            if wished.signal:
                interruption.received = wished.signal
                interruption.stop_if_asked(lambda done=done: save(done))  # type: ignore[misc]
            elif wished.save:
                save(done)
        final = save(training.steps)
    log.close()
    return final


def follow(training: Training) -> None:
    """Do all steps together with rank 0, which is in `train`. A signal that comes here stops the training there."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    latest = _restore_latest(training)
    start = 0 if latest is None else latest.step
    with closing(_steps(training, start, lambda: Wishes(next(iter(received), 0), False))) as steps:
        for _ in steps:
            pass


def _restore_latest(training: Training) -> Checkpoint | None:
    """Take over the latest checkpoint, if there is one."""
    latest = load_checkpoint(training.checkpoints)
    if latest is not None:
        _check_provenance(training, latest)
        restore(training.module, latest.tensors(WEIGHTS), latest.folder)
        if latest.step < training.steps:
            if training.average is not None and latest.step >= EVERY:
                training.average.start()
                restore(training.module, latest.tensors(TRAINED), latest.folder)
            _restore_momentum(training, latest)
    return latest


def _steps(training: Training, start: int, wishes: Callable[[], Wishes]) -> Generator[Step, None, None]:
    """All steps from ``start`` on, as every rank does them; ``wishes`` are asked for after each one.

    All ranks hear what any of them wishes, when the optimizer is at rest: it rests after steps of its own choice, and
    to make it would change what comes after. To begin with, after a validation and before a checkpoint the ranks make
    sure that they have the same weights and momentum, and raise `RankError` if not.
    """
    team, optimizer, timer = training.team, training.optimizer, StepTimer()
    if team.gather_numbers([start]) != [[start]] * team.size:
        raise RankError(f"the ranks found different checkpoints in {training.checkpoints}: give all the same folder")
    _verify(training, start)
    with closing(_batches(training, start)) as batches:
        for step in range(start, training.steps):
            before, done = team.exchanged, step + 1
            timer.begin()
            images, labels = next(batches)
            timer.ready()
            loss = _step(training, images, labels, step)
            exchanged = team.exchanged - before
            if training.average is not None and training.average.due(done):
                optimizer.settle()
                training.average.take(done)
            timer.done()
            validates = done % training.validate_every == 0 or done == training.steps
            if validates:
                optimizer.settle()
            accuracies = training.validate() if validates else {}
            wished = Wishes(0, False)
            if optimizer.at_rest:
                signals, saves = zip(*team.gather_numbers(wishes()), strict=True)
                wished = Wishes(int(max(signals)), any(saves))
                if validates or any(wished):
                    _verify(training, done)
            yield Step(done, loss, accuracies, wished, exchanged, timer.data_wait)


def _verify(training: Training, done: int) -> None:
    if training.team.size > 1:
        files = training.tensors(done).items()
        training.team.verify(
            {f"{name} ({file})": tensor for file, tensors in files for name, tensor in tensors.items()}
        )


def _check_provenance(training: Training, latest: Checkpoint) -> None:
    """Raise `UserError` unless a checkpoint is of the same network, images and preprocessing as this training."""
    for name, value in training.manifest.items():
        if latest.manifest.get(name) != value:
            raise UserError(f"{latest.folder} was trained with another {name}: restore what it was, or start anew")


def _step(training: Training, images: Tensor, labels: Tensor, step: int) -> float:
    """One update; returns the loss. Raises `NonFiniteLossError` before anything is changed."""
    loss = training.loss(images, labels, step)
    values = training.team.gather_numbers(loss.detach().view(-1).tolist())
    value = sum(number for of_rank in values for number in of_rank)
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the loss of step {step + 1} is {value}; nothing was updated with it; lower --lr ({training.recipe.lr:g})"
        )
    loss.sum().backward()
    training.optimizer.step(training.recipe.lr_at(step, training.steps))
    return value


def _batches(training: Training, start: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Augmented images and labels of every step from ``start`` on, made while the steps before it are done.

    They are the part of this rank.
    """
    made = _make_batches(training, start)
    # Queueing work for a GPU that holds the images, or augmenting a few small ones, is over before a thread is awake.
    on_gpu = training.data.device.type == "cuda"
    small = training.recipe.batch * 3 * training.data.preprocessing.resize**2 <= PIECE
    return made if training.images.resident and (on_gpu or small) else made_ahead(made)


def _make_batches(training: Training, start: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    count = len(training.images)
    batch = min(training.recipe.batch, count)
    part = training.team.own(batch)
    wholes = index_batches(count, batch, training.seed, start, training.steps - start)
    positions = (whole[part] for whole in wholes)
    for step, (images_u8, labels) in enumerate(training.images.stream(positions), start):
        generator = torch.Generator().manual_seed(stream_key(training.seed, "augmentation", step) >> 1)
        images = augment(images_u8, training.data.augmentation, training.data.preprocessing, generator, part, batch)
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
