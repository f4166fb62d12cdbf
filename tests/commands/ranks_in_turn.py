"""Several searches in turn, run by torchrun: each by ranks forked from those that have imported everything.

Takes a JSON list of searches: ``name``, ``ranks``, ``arguments``, and what is ``odd`` about rank 1.
Writes what each rank printed to NAME.RANK, followed by its exit status.
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

import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # noqa: F401  the first checked op would import it, in every search
from torch import Tensor

from engine import evolve
from engine.data import Data
from engine.population import Scores, ScoringImages
from engine.run import ranks, scoring
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


ODD: dict[str, Callable[[], object]] = {
    "": lambda: None,
    "images": look_at_other_images,
    "scoring": break_scoring,
    "death": die_in_the_third_generation,
}


def search(plan: dict[str, Any], rank: int, output: Path) -> int:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # They all share the store of torchrun, each search under a name of its own.
    store, *_ = next(dist.rendezvous("env://"))
    met = (dist.PrefixStore(plan["name"], store), rank, plan["ranks"])
    dist.rendezvous = lambda *_, **__: iter([met])
    if rank == 1:
        ODD[plan["odd"]]()
    return ranks.launch(lambda: run_command(evolve.main, evolve.Evolve, plan["arguments"]), evolve.assist)


def main(plans: Path) -> None:
    rank = int(os.environ["RANK"])
    for plan in json.loads(plans.read_text()):
        if rank >= plan["ranks"]:
            continue
        if rank == 0:
            # Each search starts without the scores of the one before.
            shutil.rmtree(plan["scores"], ignore_errors=True)
        output = plans.with_name(f"{plan['name']}.{rank}")
        child = os.fork()
        if child == 0:
            os._exit(search(plan, rank, output))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with output.open("a") as file:
            file.write(f"\n{status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
