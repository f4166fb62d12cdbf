"""Train a PruningNet: one hypernetwork that generates weights for every structure of a search space.

    python -m engine.metatrain                                  # MobileNetV1 on handwritten digits
    python -m engine.metatrain --architecture resnet50 --data /path/to/imagenet
    torchrun --nproc-per-node=2 -m engine.metatrain

Every step draws a random structure, generates its weights, and trains the generators through them (MetaPruning,
section 3.2); `engine.step_recipe` has other recipes. The accuracy shown is true: BatchNorm is calibrated for every
structure before it is measured.

With several structures each sees an equal part of the batch, which is also what BatchNorm normalises by. torchrun
shares the structures of a step out to processes. As nothing of a structure is ever divided, the result is that of one
process with as many structures, bit for bit.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from engine import population
from engine.data import Data, Splits, open_data
from engine.errors import UserError
from engine.factored_sgd import FactoredSGD
from engine.memory import free_memory
from engine.pruningnet import SHARED, PruningNet, count_parameters
from engine.random import random_integers, stream_key
from engine.run import directory, ranks, torchrun
from engine.run.average import WeightAverage
from engine.run.command import run_command, use_device
from engine.run.machine import machine_facts
from engine.run.options import TrainingOptions, require_at_least
from engine.run.shared import check_facts
from engine.run.team import Team
from engine.run.training import Training, follow, keep_freed_memory, train
from engine.space import Space, architecture
from engine.space.recipe import Recipe, scaled
from engine.step_recipe import SANDWICH, Sampling, StepRecipe
from engine.training_costs import (
    DEFAULT_UPDATE,
    FLOAT_BYTES,
    UPDATES,
    exchanged_bytes,
    parameter_bytes,
    step_bytes,
    steps_between_rests,
)
from engine.trie import activation_bytes, plan

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
    structures: int | None = None
    """Structures per step, among which the batch is split (default: 1, or one for each process; 4 with --sandwich)."""
    sandwich: bool = False
    """In every step the largest, the smallest and random structures, all on the whole batch."""
    distill: bool = False
    """With --sandwich: the largest structure learns from the labels, the others from its answers."""
    sampling: Sampling = "widths"
    """What random structures are uniform in: the widths of every layer, or their MACs at 224 px."""
    ema: float | None = None
    """Validate and keep an exponential moving average of the weights, of this decay per step, such as 0.99."""
    weights: Literal["generated", "shared"] = "generated"
    """Generated for every structure, or shared by all of them (no hypernetwork: the paper's ablation)."""
    hidden: int | None = None
    """Hidden size of every weight generator (default: the paper's, 32 or 64)."""
    calibration_images: int = 1000
    """Images that calibrate BatchNorm before an accuracy is measured."""
    update: str | None = None
    """What a step changes of the generators: immediate, all; delayed, what it uses (default: the faster)."""
    momentum: Literal["float32", "bfloat16"] = "float32"
    """What the generators' momentum is kept in: bfloat16 saves a quarter of weights and momentum, and is rounded."""
    backend: str = "auto"
    """Kernels: auto, reference, cpu, triton or cuda."""

    def check(self) -> None:
        """Raise `UserError` for a value that makes no sense, before any work."""
        super().check()
        require_at_least(self, {"structures": 1, "hidden": 1, "calibration_images": 1})
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"--ema {self.ema}: a number between 0 and 1, such as 0.999")
        if self.weights == "shared" and self.hidden is not None:
            raise UserError(f"--hidden {self.hidden}: with --weights shared no weight is generated; give one of them")
        if self.weights == "shared" and self.momentum != "float32":
            raise UserError(f"--momentum {self.momentum}: with --weights shared only float32 is legal")
        if self.update not in (None, *UPDATES):
            raise UserError(f"--update {self.update}: choose {' or '.join(UPDATES)}")
        self.step_recipe.check()
        self.step_recipe.check_processes(torchrun.count())

    @property
    def hidden_size(self) -> int | None:
        """The hidden size of all generators; None for each its own."""
        return SHARED if self.weights == "shared" else self.hidden

    @property
    def momentum_dtype(self) -> torch.dtype:
        """Of the momentum of the bases."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.momentum]

    @property
    def step_recipe(self) -> StepRecipe:
        """Which structures a step trains, and how."""
        default = SANDWICH if self.sandwich else torchrun.count()
        return StepRecipe(
            default if self.structures is None else self.structures, self.sandwich, self.distill, self.sampling
        )


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
    options = directory.continued(options, out)
    directory.check_output(out, options.resume, options.overwrite)
    if options.resume:
        options = directory.resumed_options(options, out)
    # A run may be resumed by another number of processes.
    options = dataclasses.replace(options, structures=options.step_recipe.structures)
    chosen = architecture(options.architecture)
    options.check()
    device = use_device(options.device, options.backend)
    # A run killed before it wrote them has none; the seed makes the same ones again.
    stored = out / "splits.json"
    splits = Splits.load(stored) if options.resume and stored.exists() else None
    data = _open_data(options, device, splits)
    space = chosen.build(len(data.classes))
    space.check_resolution(data.preprocessing.resolution)
    keep_freed_memory()
    recipe = recipe_of(options, data)
    memory = _check_memory(options, space, recipe.batch, data)
    ranks.begin((options, out), device)
    ranks.tell(data.splits)
    training = training_of(options, out, space, data, recipe)
    training.check_disk_space()
    for rank, facts in ranks.answers():
        check_facts(machine_facts(device), rank, facts)
    if not options.resume:
        resolved = {**dataclasses.asdict(training.recipe), "steps": training.steps}
        directory.start_output(out, options, {**resolved, "resolution": data.preprocessing.resolution})
    if splits is None:
        data.splits.save(stored)
    ranks.tell("go")
    console.print(
        f"PruningNet of {space.architecture}: {count_parameters(space, options.hidden_size) / 1e6:.1f} M parameters; "
        f"{len(training.images)} images, {len(data.classes)} classes, {training.steps} steps on {device}; "
        f"{memory}{_exchanged(options, space)}",
        highlight=False,
        soft_wrap=True,
    )
    checkpoint = train(training, console)
    print(f"PruningNet: {checkpoint.folder}")
    print(f"next: python -m engine.evolve --flops 50%{run_option(out)}")


def assist(given: tuple[Metatrain, Path], next_work: Callable[[], Any], answer: Callable[[Any], None]) -> None:
    """What the other ranks do: every step, together with rank 0."""
    options, out = given
    device = use_device(options.device, options.backend)
    data = _open_data(options, device, next_work())
    space = architecture(options.architecture).build(len(data.classes))
    keep_freed_memory()
    training = training_of(options, out, space, data, recipe_of(options, data))
    answer(machine_facts(device))
    # The run directory is as it should be.
    next_work()
    follow(training)


def _open_data(options: Metatrain, device: torch.device, splits: Splits | None) -> Data:
    return open_data(
        options.data,
        resolution=options.resolution,
        device=device,
        splits=splits,
        seed=options.seed,
        cache=options.cache,
    )


def recipe_of(options: Metatrain, data: Data) -> Recipe:
    """The recipe of a training. Raises `UserError` if the structures of a step do not go with its batch."""
    paper = architecture(options.architecture).metatrain
    images = len(data.subset("sub_train"))
    recipe = options.recipe(scaled(paper, images, SMALL_DATA_LR))
    options.step_recipe.check_batch(min(recipe.batch, images))
    return recipe


def _check_memory(options: Metatrain, space: Space, batch: int, data: Data) -> str:
    """What training takes, in words; `UserError` unless a step of middling structures fits into what is free."""
    kept = parameter_bytes(space, options.hidden_size, options.ema is not None, options.momentum_dtype)
    several = torchrun.count() > 1
    step = _step_bytes(options, space, batch, data)
    besides = max(step, _calibration_bytes(space, data, options.calibration_images))
    besides += exchanged_bytes(space, options.step_recipe.structures) if several else 0
    kept_are = "weights and momentum" if options.ema is None else "weights, momentum and average"
    needed = f"about {_gigabytes(kept + besides)} of memory{' in every process' if several else ''}"
    # Each process has a GPU of its own, but they share the memory of the machine.
    free = free_memory(data.device) // (1 if data.device.type == "cuda" else torchrun.count_here())
    if kept + besides > free:
        raise UserError(
            f"training needs {needed} ({_gigabytes(kept)} for {kept_are}, {_gigabytes(besides)} for a batch "
            f"of {batch} and for validation) and {data.device} has {_gigabytes(free)} free"
            f"{' for each' if several else ''}: give a smaller --hidden or --batch"
        )
    return needed


def _step_bytes(options: Metatrain, space: Space, batch: int, data: Data) -> int:
    """What a step of middling structures takes in one process, and a validation may take."""
    structures = options.step_recipe.structures
    # In a sandwich the largest takes as much as two middling structures, the smallest next to nothing.
    images = batch * structures if options.sandwich else batch // torchrun.count()
    return step_bytes(space, images, data.preprocessing.resolution)


def _calibration_bytes(space: Space, data: Data, images: int) -> int:
    """What validation of the largest structure takes."""
    largest = plan(space, space.uniform_choice(space.choices - 1))
    side = data.preprocessing.resolution
    return activation_bytes(space, largest, (min(images, len(data.subset("sub_train"))), side, side), FLOAT_BYTES)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _exchanged(options: Metatrain, space: Space) -> str:
    """What several processes exchange, in words."""
    processes, structures = torchrun.count(), options.step_recipe.structures
    if processes == 1:
        return ""
    exchanged = exchanged_bytes(space, structures)
    gradient = FLOAT_BYTES * count_parameters(space, options.hidden_size)
    return (
        f"; {processes} processes with {structures // processes} of {structures} structures each exchange "
        f"about {exchanged / 1e6:.1f} MB a step, not the {gradient / 1e6:.1f} MB of the gradient"
    )


def training_of(options: Metatrain, out: Path, space: Space, data: Data, recipe: Recipe) -> Training:
    """The training of a PruningNet with these options, to go to the run directory ``out``."""
    images = data.subset("sub_train")
    epoch = max(1, len(images) // recipe.batch)
    steps = options.steps or recipe.epochs * epoch
    net = PruningNet(space, options.hidden_size, torch.Generator().manual_seed(options.seed), device=data.device)
    team = Team(torchrun.number(), torchrun.count())
    update = options.update or DEFAULT_UPDATE[data.device.type]
    delay = steps_between_rests(update, space, options.hidden_size, recipe.batch, data.preprocessing.resolution)
    optimizer = FactoredSGD(net, recipe, delay, team, options.momentum_dtype)
    average = None if options.ema is None else WeightAverage(net, options.ema, steps)
    step_recipe = options.step_recipe
    structures_of = step_recipe.structures_of(space, options.seed)
    scored = population.scoring_images(data, options.calibration_images)
    validated = _validation_genomes(space, options.seed, data.device)
    memory = _step_bytes(options, space, recipe.batch, data)

    def loss(images_NCHW: Tensor, labels_N: Tensor, step: int) -> Tensor:
        logits_SnT = optimizer.logits(images_NCHW, structures_of(step), shared=step_recipe.sandwich)
        return step_recipe.losses(logits_SnT, labels_N, recipe.label_smoothing)

    def validate() -> dict[str, float]:
        own = range(team.rank, len(validated), team.size)
        correct_P = torch.zeros(len(validated), dtype=torch.int64)
        if own:
            with average.in_use() if average else nullcontext():
                correct_P[own] = population.score(net, validated[own], scored, memory).correct.cpu()
        percent = (100 * team.gather(correct_P).sum(0) / len(scored.subset)).tolist()
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
        steps=steps,
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
            "hidden": options.hidden_size,
            "ema": options.ema,
            "preprocessing": data.preprocessing.to_dict(),
            "splits": data.splits.digest,
        },
        checkpoint_minutes=options.checkpoint_minutes,
        tensorboard=options.tensorboard,
        average=average,
        team=team,
    )


def _validation_genomes(space: Space, seed: int, device: torch.device) -> Tensor:
    """Smallest, middle, largest, and fixed random structures."""
    fixed = [space.uniform_choice(choice) for choice in (0, space.choices // 2, space.choices - 1)]
    drawn = random_integers(stream_key(seed, "validation"), space.choices, (RANDOM_STRUCTURES, len(space.genes)))
    return torch.cat([*fixed, drawn]).to(device)


if __name__ == "__main__":
    sys.exit(ranks.launch(lambda: run_command(main, Metatrain), assist))
