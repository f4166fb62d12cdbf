"""Train one pruned network from scratch, and measure it on the test split.

    python -m engine.retrain --structure runs/mobilenet_v1-digits/search-300M/structure.json
    python -m engine.retrain --uniform 300M        # the baseline: all layers pruned alike, same MACs, same recipe
    python -m engine.retrain --full                # the unpruned network

The output folder holds ``model.safetensors``, ``config.json`` and ``network.py``, which load without this engine,
and ``result.json``.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine import pruned
from engine.data import Data, join
from engine.errors import UserError
from engine.files import sha256_file, write_atomically
from engine.metatrain import DEFAULT_RUN
from engine.pruned import PrunedNet
from engine.run import directory
from engine.run.command import run_command, use_device
from engine.run.opened import PruningNetRun, open_run
from engine.run.optimizer import SGD
from engine.run.options import TrainingOptions
from engine.run.training import Training, keep_freed_memory, train
from engine.space import architecture
from engine.space.budget import Budget, parse_limit, quantities, uniform_genome
from engine.space.costs import DEFAULT_RESOLUTION, cost_model, format_count
from engine.space.recipe import scaled
from engine.space.structure import Structure, load_structure, make_structure

SMALL_DATA_LR = 0.05


# Test images run at once.
TEST_CHUNK = 500


@dataclass(frozen=True, kw_only=True)
class Retrain(TrainingOptions):
    """Train one pruned network from scratch and measure it on the test split."""

    structure: Path | None = None
    """structure.json of the network to train."""
    uniform: str | None = None
    """Train the uniform baseline of this budget instead: 300M, 1.2G or 50%."""
    full: bool = False
    """Train the unpruned network instead."""
    run: Path = DEFAULT_RUN
    """Run directory of the PruningNet: architecture, images and splits."""
    out: Path | None = None
    """Output folder (default: retrained or NAME-retrained beside the structure; RUN/uniform-BUDGET; RUN/full)."""
    flops_resolution: int = DEFAULT_RESOLUTION
    """Image side in pixels at which MACs of --uniform and --full are counted."""


def main(options: Retrain) -> None:
    """Run the command."""
    console = Console(file=sys.stderr)
    options.check()
    run = open_run(options.run)
    structure, out = _what_and_where(options, run)
    directory.check_output(out, options.resume, options.overwrite)
    if options.resume:
        options = directory.resumed_options(options, out)
    device = use_device(options.device, "auto")
    data = run.data(device, options.cache)
    keep_freed_memory()
    training = from_scratch(options, structure, out, data)
    training.check_disk_space()
    if not options.resume:
        resolved = {**dataclasses.asdict(training.recipe), "steps": training.steps}
        directory.start_output(out, options, resolved)
        structure.save(out / "structure.json")
    console.print(
        f"{structure.architecture} of {format_count(structure.macs)} MACs and "
        f"{format_count(structure.parameters)} parameters; "
        f"{len(training.images)} images, {training.steps} steps on {device}",
        highlight=False,
        soft_wrap=True,
    )
    train(training, console)
    correct = int(right_answers(training.module, data).sum())
    result = measured(training, structure, correct)
    _export(training.module, structure, data, result, out)
    _print_result(result, out)


def _what_and_where(options: Retrain, run: PruningNetRun) -> tuple[Structure, Path]:
    """The structure to train, from exactly one of three options, and the folder its result goes to."""
    given = [options.structure is not None, options.uniform is not None, options.full]
    if sum(given) != 1:
        raise UserError("say what to train: exactly one of --structure PATH, --uniform BUDGET and --full")
    if options.structure is not None:
        structure = load_structure(options.structure)
        manifest = run.checkpoint.manifest
        if (structure.splits, structure.architecture) != (manifest["splits"], manifest["architecture"]):
            raise UserError(
                f"{options.structure} comes from other images, splits or another architecture than {options.run}: "
                "give its own run directory with --run, or its test images would not be unseen"
            )
        name = options.structure.stem
        folder = "retrained" if name == "structure" else f"{name}-retrained"
        return structure, options.out or options.structure.parent / folder
    space = run.space()
    costs = cost_model(space, options.flops_resolution)
    if options.uniform is not None:
        limit = parse_limit(options.uniform, quantities(costs)["flops"], "--uniform").check()
        genome_1G = uniform_genome(Budget(space, torch.device("cpu"), (limit,)))
        folder = f"uniform-{options.uniform.replace('%', 'pct')}"
    else:
        genome_1G, folder = space.uniform_choice(space.choices - 1), "full"
    preprocessing = run.checkpoint.manifest["preprocessing"]
    structure = make_structure(
        costs, genome_1G[0], preprocessing["resolution"], preprocessing=preprocessing,
        splits=run.checkpoint.manifest["splits"],
    )  # fmt: skip
    return structure, options.out or options.run / folder


def from_scratch(options: TrainingOptions, structure: Structure, out: Path, data: Data) -> Training:
    """A structure's training on all images but the test split, which is used once, at the end."""
    images = join("train", data.subset("sub_train"), data.subset("sub_validation"))
    paper = architecture(structure.architecture).retrain
    recipe = options.recipe(scaled(paper, len(images), SMALL_DATA_LR))
    steps = options.steps or recipe.epochs * max(1, len(images) // recipe.batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = PrunedNet(structure.convolutions, structure.classes).to(data.device)

    def loss(images_NCHW: Tensor, labels_N: Tensor, step: int) -> Tensor:
        return F.cross_entropy(net(images_NCHW), labels_N, label_smoothing=recipe.label_smoothing)

    def validate() -> dict[str, float]:
        return {"test": 100 * float(right_answers(net, data).double().mean())}

    return Training(
        run=out,
        module=net,
        recipe=recipe,
        steps=steps,
        seed=options.seed,
        data=data,
        images=images,
        loss=loss,
        optimizer=SGD(net.named_parameters(), recipe),
        validate=validate,
        validate_every=steps,
        manifest={"structure": structure.to_dict()["digest"]},
        checkpoint_minutes=options.checkpoint_minutes,
        tensorboard=options.tensorboard,
    )


@torch.no_grad()
def right_answers(net: torch.nn.Module, data: Data) -> Tensor:
    """Which test images a network's top-1 answer is right for, bool ``[N]``."""
    net.eval()
    test = data.subset("test")
    right = [
        net(data.preprocessing(images_u8)).argmax(1) == labels
        for images_u8, labels in test.stream(torch.arange(len(test)).split(TEST_CHUNK))
    ]
    net.train()
    return torch.cat(right)


def recount_macs(structure: Structure) -> int:
    """MACs of the exported module by PyTorch's own counter, which knows nothing of search spaces."""
    convolutions = structure.convolutions
    with torch.device("meta"), torch.no_grad():
        net = PrunedNet(convolutions, structure.classes).eval()
        image = torch.empty(1, 3, structure.flops_resolution, structure.flops_resolution)
        with FlopCounterMode(display=False) as counter:
            net(image)
    return int(counter.get_total_flops()) // 2


def measured(training: Training, structure: Structure, correct: int) -> dict[str, Any]:
    """What ``result.json`` says of a finished training: accuracy, recounted costs, and how it was trained."""
    net, images = training.module, len(training.data.subset("test"))
    macs, parameters = recount_macs(structure), sum(p.numel() for p in net.parameters())
    if parameters != structure.parameters or (structure.flops_convention == "macs" and macs != structure.macs):
        raise RuntimeError(f"the module has {macs} MACs and {parameters} parameters, its structure says otherwise")
    return {
        "test_correct": correct,
        "test_images": images,
        "test_accuracy": correct / images,
        "macs": macs,
        "macs_resolution": structure.flops_resolution,
        "parameters": parameters,
        "steps": training.steps,
        "recipe": dataclasses.asdict(training.recipe),
        "seed": training.seed,
        "structure": structure.to_dict()["digest"],
    }


def _export(net: torch.nn.Module, structure: Structure, data: Data, result: dict[str, Any], out: Path) -> None:
    """Write what inference needs: weights, configuration, and the one file of code that joins them."""
    weights = out / "model.safetensors"
    temporary = weights.with_suffix(".tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}, temporary)
    temporary.replace(weights)
    config = {
        "architecture": structure.architecture,
        "classes": list(data.classes),
        "preprocessing": data.preprocessing.to_dict(),
        "convolutions": structure.convolutions,
        "weights_sha256": sha256_file(weights),
    }
    write_atomically(out / "config.json", json.dumps(config, indent=2) + "\n")
    shutil.copyfile(pruned.__file__, out / "network.py")
    write_atomically(out / "result.json", json.dumps(result, indent=2) + "\n")


def _print_result(result: dict[str, Any], out: Path) -> None:
    table = Table()
    for heading in ("test accuracy", "MACs (recounted)", "parameters"):
        table.add_column(heading, justify="right")
    accuracy = f"{100 * result['test_accuracy']:.1f} % ({result['test_correct']}/{result['test_images']})"
    table.add_row(accuracy, format_count(result["macs"]), format_count(result["parameters"]))
    Console().print(table)
    print(f"network: {out}")


if __name__ == "__main__":
    sys.exit(run_command(main, Retrain))
