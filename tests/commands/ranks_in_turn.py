"""Several commands in turn, run by torchrun: each by ranks forked from those that have imported everything.

Takes a JSON list of plans: ``name``, ``command``, ``ranks``, ``arguments``, what is ``odd`` about rank 1, and a folder
of ``scores`` to empty before. Writes what each rank printed to NAME.RANK, followed by its exit status.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # the first checked op would import it, in every search
import with_ddp
from torch import Tensor

from engine import evolve, metatrain
from engine.data import Data
from engine.population import Scores, ScoringImages
from engine.run import ranks, scoring, training
from engine.run.command import run_command


def break_scoring() -> None:
    def score_passes(*_: Any) -> NoReturn:
        raise RuntimeError("a cable is loose")

    scoring.score_passes = score_passes  # type: ignore[assignment]


def die_in_the_third_generation() -> None:
    score_passes, asked = scoring.score_passes, [0]

    def mortal(*arguments: Any) -> Iterator[tuple[Tensor, Scores]]:
        asked[0] += 1
        if asked[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return score_passes(*arguments)

    scoring.score_passes = mortal  # type: ignore[assignment]


def look_at_other_images() -> None:
    scoring_images = scoring.scoring_images

    def brighter(data: Data, calibration_images: int) -> ScoringImages:
        images = scoring_images(data, calibration_images)
        return replace(images, calibration_NCHW=images.calibration_NCHW + 0.01)

    scoring.scoring_images = brighter


def in_step(number: int, what: Callable[[training.Training], object]) -> None:
    """Before a step of training, from 0, do something."""
    do_step = training._step

    def odd(training: training.Training, images: Tensor, labels: Tensor, step: int) -> float:
        if step == number:
            what(training)
        return do_step(training, images, labels, step)

    training._step = odd


def flip_a_bit(which: training.Training) -> None:
    classifier = dict(which.module.named_parameters())["classifier.weight"].data
    classifier.view(torch.int32)[3, 1] ^= 1 << 20


def see_no_checkpoint() -> None:
    training.load_checkpoint = lambda root: None


def fail(_: training.Training) -> NoReturn:
    raise RuntimeError("a cable is loose")


ODD: dict[str, Callable[[], object]] = {
    "": lambda: None,
    "images": look_at_other_images,
    "scoring": break_scoring,
    "death": die_in_the_third_generation,
    "death in training": lambda: in_step(5, lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    "signal in training": lambda: in_step(5, lambda _: os.kill(os.getpid(), signal.SIGTERM)),
    "failure in training": lambda: in_step(5, fail),
    "no checkpoint": see_no_checkpoint,
    "another bit": lambda: in_step(5, flip_a_bit),
}


COMMANDS: dict[str, Any] = {
    "evolve": (evolve.main, evolve.Evolve, evolve.assist),
    "metatrain": (metatrain.main, metatrain.Metatrain, metatrain.assist),
}


def run(plan: dict[str, Any], rank: int, output: Path) -> int:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # They all share the store of torchrun, each command under a name of its own.
    store, *_ = next(dist.rendezvous("env://"))
    met = (dist.PrefixStore(plan["name"], store), rank, plan["ranks"])
    dist.rendezvous = lambda *_, **__: iter([met])
    os.environ |= {"WORLD_SIZE": str(plan["ranks"]), "LOCAL_WORLD_SIZE": str(plan["ranks"])}
    if rank == 1:
        ODD[plan["odd"]]()
    if plan["command"] == "with_ddp":
        with_ddp.compare(*met, output.with_name(f"{output.name}.json"))
    main, config, assist = COMMANDS[plan["command"]]
    return ranks.launch(lambda: run_command(main, config, plan["arguments"]), assist)


def main(plans: Path) -> None:
    rank = int(os.environ["RANK"])
    for plan in json.loads(plans.read_text()):
        if rank >= plan["ranks"]:
            continue
        if rank == 0 and "scores" in plan:
            # Each search starts without the scores of the one before.
            shutil.rmtree(plan["scores"], ignore_errors=True)
        output = plans.with_name(f"{plan['name']}.{rank}")
        child = os.fork()
        if child == 0:
            os._exit(run(plan, rank, output))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with output.open("a") as file:
            file.write(f"\n{status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
