"""Train a PruningNet: one hypernetwork that generates weights for every structure of a search space.

    python -m engine.metatrain                                  # MobileNetV1 on handwritten digits
    python -m engine.metatrain --architecture resnet50 --data /path/to/imagenet

Every step draws a random structure, generates its weights, and trains the generators through them (MetaPruning,
section 3.2). The accuracy shown is true: BatchNorm is calibrated for every structure before it is measured.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from engine import population
from engine.data import Data, Splits, open_data
from engine.errors import UserError
from engine.factored_sgd import FactoredSGD, parameter_bytes, step_bytes
from engine.memory import default_memory, free_memory
from engine.pruningnet import PruningNet, count_parameters
from engine.random import random_integers, stream_key
from engine.run import directory
from engine.run.command import run_command, use_device
from engine.run.options import TrainingOptions, require_at_least
from engine.run.training import Training, keep_freed_memory, train
from engine.space import Space, architecture
from engine.space.recipe import Recipe, scaled

RUNS = Path("runs")
DEFAULT_RUN = RUNS / "mobilenet_v1-digits"
SMALL_DATA_LR = 0.1
# Epochs of a small dataset are a few steps long; validating after each would take longer than training.
LEAST_STEPS_BETWEEN_VALIDATIONS = 100
RANDOM_STRUCTURES = 3


@dataclass(frozen=True, kw_only=True)
class Metatrain(TrainingOptions):
    """Train a PruningNet, which generates weights for every structure of a search space."""

    architecture: str = "mobilenet_v1"
    """Search space: mobilenet_v1, mobilenet_v2 or resnet50."""
    data: str = "digits"
    """Images: 'digits', 'digits-hard', or a folder (class folders, CIFAR-10/100, IDX files)."""
    resolution: int | None = None
    """Image side in pixels (default: 32 for digits, CIFAR and IDX, 224 for folders)."""
    out: Path | None = None
    """Run directory (default: runs/ARCHITECTURE-DATA)."""
    structures: int = 1
    """Random structures per step; the batch is split among them."""
    hidden: int | None = None
    """Hidden size of every weight generator (default: the paper's, 32 or 64)."""
    calibration_images: int = 1000
    """Images that calibrate BatchNorm before an accuracy is measured."""
    backend: str = "auto"
    """Kernels: auto, reference, cpu, triton or cuda."""


def default_run(architecture: str, data: str) -> Path:
    """Where a run goes that was not told where."""
    return RUNS / f"{architecture}-{Path(data).name or 'data'}"


def run_option(run: Path) -> str:
    """What a suggested command needs to find this run."""
    return "" if run == DEFAULT_RUN else f" --run {shlex.quote(str(run))}"


def main(options: Metatrain) -> None:
    """Run the command."""
    console = Console(file=sys.stderr)
    out = options.out or default_run(options.architecture, options.data)
    directory.check_output(out, options.resume, options.overwrite)
    if options.resume:
        options = directory.resumed_options(options, out)
    chosen = architecture(options.architecture)
    options.check()
    require_at_least(options, {"structures": 1, "hidden": 1, "calibration_images": 1})
    device = use_device(options.device, options.backend)
    # A run killed before it wrote them has none; the seed makes the same ones again.
    stored = out / "splits.json"
    splits = Splits.load(stored) if options.resume and stored.exists() else None
    data = open_data(options.data, resolution=options.resolution, device=device, splits=splits, seed=options.seed)
    space = chosen.build(len(data.classes))
    space.check_resolution(data.preprocessing.resolution)
    keep_freed_memory()
    recipe = _recipe(options, data, chosen.metatrain)
    memory = _check_memory(space, options.hidden, recipe.batch, data)
    training = _training(options, out, space, data, recipe)
    training.check_disk_space()
    if not options.resume:
        resolved = {**dataclasses.asdict(training.recipe), "steps": training.steps}
        directory.start_output(out, options, {**resolved, "resolution": data.preprocessing.resolution})
    if splits is None:
        data.splits.save(stored)
    console.print(
        f"PruningNet of {space.architecture}: {count_parameters(space, options.hidden) / 1e6:.1f} M parameters; "
        f"{len(training.images)} images, {len(data.classes)} classes, {training.steps} steps on {device}; {memory}",
        highlight=False,
        soft_wrap=True,
    )
    checkpoint = train(training, console)
    print(f"PruningNet: {checkpoint.folder}")
    print(f"next: python -m engine.evolve --flops 50%{run_option(out)}")


def _recipe(options: Metatrain, data: Data, paper: Recipe) -> Recipe:
    recipe = options.recipe(scaled(paper, len(data.subset("sub_train")), SMALL_DATA_LR))
    if 2 * options.structures > recipe.batch or recipe.batch % options.structures:
        raise UserError(
            f"--structures {options.structures}: the batch of {recipe.batch} is split among them evenly, "
            "two images each or more"
        )
    return recipe


def _check_memory(space: Space, hidden: int | None, batch: int, data: Data) -> str:
    """What training takes, in words; `UserError` unless a step of a middling structure fits into what is free."""
    kept = parameter_bytes(space, hidden)
    besides = max(step_bytes(space, batch, data.preprocessing.resolution), default_memory(data.device))
    needed = f"about {_gigabytes(kept + besides)} of memory"
    free = free_memory(data.device)
    if kept + besides > free:
        raise UserError(
            f"training needs {needed} ({_gigabytes(kept)} for weights and momentum, {_gigabytes(besides)} for a batch "
            f"of {batch} and for validation) and {data.device} has {_gigabytes(free)} free: "
            "give a smaller --hidden or --batch"
        )
    return needed


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _training(options: Metatrain, out: Path, space: Space, data: Data, recipe: Recipe) -> Training:
    images = data.subset("sub_train")
    epoch = max(1, len(images) // recipe.batch)
    net = PruningNet(space, options.hidden, torch.Generator().manual_seed(options.seed), device=data.device)
    optimizer = FactoredSGD(net, recipe)
    scored = population.scoring_images(data, options.calibration_images)
    validated = _validation_genomes(space, options.seed, data.device)
    genes = len(space.genes)

    def loss(images_NCHW: Tensor, labels_N: Tensor, step: int) -> Tensor:
        key = stream_key(options.seed, "structure", step)
        genome_SG = random_integers(key, space.choices, (options.structures, genes), data.device)
        logits_SNK = optimizer.logits(images_NCHW, genome_SG)
        return F.cross_entropy(logits_SNK.flatten(0, 1), labels_N, label_smoothing=recipe.label_smoothing)

    def validate() -> dict[str, float]:
        scores = population.score(net, validated, scored)
        percent = (100 * scores.correct / scores.images).tolist()
        smallest, middle, largest, *others = percent
        mean = sum(others) / len(others)
        return {
            "smallest": smallest,
            "middle": middle,
            "largest": largest,
            f"random (mean of {len(others)})": mean,
        }

    return Training(
        run=out,
        module=net,
        recipe=recipe,
        steps=options.steps or recipe.epochs * epoch,
        seed=options.seed,
        data=data,
        images=images,
        loss=loss,
        optimizer=optimizer,
        validate=validate,
        validate_every=max(epoch, LEAST_STEPS_BETWEEN_VALIDATIONS),
        manifest={
            "architecture": space.architecture,
            "classes": list(data.classes),
            "hidden": options.hidden,
            "preprocessing": data.preprocessing.to_dict(),
            "splits": data.splits.digest,
        },
        checkpoint_minutes=options.checkpoint_minutes,
        tensorboard=options.tensorboard,
    )


def _validation_genomes(space: Space, seed: int, device: torch.device) -> Tensor:
    """Smallest, middle, largest, and fixed random structures."""
    fixed = [space.uniform_choice(choice) for choice in (0, space.choices // 2, space.choices - 1)]
    drawn = random_integers(stream_key(seed, "validation"), space.choices, (RANDOM_STRUCTURES, len(space.genes)))
    return torch.cat([*fixed, drawn]).to(device)


if __name__ == "__main__":
    sys.exit(run_command(main, Metatrain))
