"""A training step of a PruningNet against the original implementation's way, and the memory that both take.

    pytest --benchmark-only benchmarks/bench_metatrain_step.py

PruningNets of the paper's hidden sizes, ten classes, a new random structure in every step, from images to trained
weights. Baselines, on the same structures:

- `papers`: `baselines.train_the_papers_way`: weights at full width, autograd, `torch.optim.SGD`, contiguous NCHW;
- `plain`: the best that PyTorch does: channels-last images, only the crop generated (`kernels.generate_weights`),
  `torch.optim.SGD(fused=True)`.

Losses and changes of fc1 and classifier in the first step are compared before anything is timed. A round goes from rest
to rest, since bringing everything up to date is paid for once in so many steps; seconds are those of a step. GFLOP/s
count three passes of 2 × MACs. Memory is the largest that a process of its own held.

`delayed-bfloat16` keeps the momentum of the bases in bfloat16.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from baselines import train_the_papers_way
from peak import seconds_of
from torch import Tensor

from engine.factored_sgd import FactoredSGD
from engine.pruningnet import PruningNet
from engine.run.optimizer import SGD
from engine.run.training import keep_freed_memory
from engine.space import Space, architecture
from engine.space.costs import cost_model
from engine.space.recipe import Recipe
from engine.training_costs import UPDATES, steps_between_rests

CLASSES = 10
# When the generators are updated, and what the momentum of the bases is kept in.
WAYS = {**{update: (update, torch.float32) for update in UPDATES}, "delayed-bfloat16": ("delayed", torch.bfloat16)}
# A round has at least so many steps.
LEAST_STEPS = 8
# Architecture, images, side in pixels, rounds that are timed.
CASES = [("mobilenet_v2", 64, 32, 3), ("mobilenet_v2", 64, 224, 2), ("resnet50", 32, 64, 2)]

# Part of a change by which two ways of computing it may differ.
MOST_DIFFERENT = 0.1

Step = Callable[[int], float]


def recipe(batch: int) -> Recipe:
    return Recipe(batch=batch, epochs=1, lr=0.1, schedule="linear", weight_decay=4e-5)


def genome(space: Space, step: int) -> Tensor:
    """The structure ``[1, G]`` of a step."""
    return torch.randint(space.choices, (1, len(space.genes)), generator=torch.Generator().manual_seed(step))


def images_and_labels(batch: int, side: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator)
    return images, torch.randint(CLASSES, (batch,), generator=generator)


def papers(net: PruningNet, batch: int, side: int) -> Step:
    images, labels = images_and_labels(batch, side)
    train = train_the_papers_way(net, recipe(batch))
    return lambda number: train(images, labels, genome(net.space, number)[0])


def plain(net: PruningNet, batch: int, side: int) -> Step:
    images, labels = images_and_labels(batch, side)
    images, sgd = images.contiguous(memory_format=torch.channels_last), SGD(net.named_parameters(), recipe(batch))

    def step(number: int) -> float:
        loss = F.cross_entropy(net(images, genome(net.space, number)), labels, label_smoothing=0.1)
        loss.backward()
        sgd.step(recipe(batch).lr)
        return loss.item()

    return step


def ours(net: PruningNet, batch: int, side: int, way: str) -> Step:
    images, labels = images_and_labels(batch, side)
    update, momentum = WAYS[way]
    rest = steps_between_rests(update, net.space, None, batch, side)
    optimizer = FactoredSGD(net, recipe(batch), rest, basis_momentum=momentum)

    def step(number: int) -> float:
        logits_SNK = optimizer.logits(images, genome(net.space, number))
        loss = F.cross_entropy(logits_SNK.flatten(0, 1), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step(recipe(batch).lr)
        return loss.item()

    return step


def new_net(space: Space) -> PruningNet:
    return PruningNet(space, generator=torch.Generator().manual_seed(0))


def first_step(net: PruningNet, step: Step) -> tuple[float, Tensor]:
    """The loss of step 0, and how it changed what is trained in every step."""
    small = [p for name, p in net.named_parameters() if "fc1" in name or "classifier" in name]
    before = [p.detach().clone() for p in small]
    loss = step(0)
    return loss, torch.cat([(p.detach() - was).flatten() for p, was in zip(small, before, strict=True)])


def steps_of_a_round(space: Space, batch: int, side: int) -> range:
    """From rest to rest of what is delayed, or several times that."""
    rest = steps_between_rests("delayed", space, None, batch, side)
    return range(1, 1 + -(-LEAST_STEPS // rest) * rest)


def seconds_per_step(step: Step, steps: range) -> float:
    return sum(seconds_of(partial(step, number)) for number in steps) / len(steps)


@cache
def baseline(
    way: Callable[[PruningNet, int, int], Step], name: str, batch: int, side: int
) -> tuple[float, float, Tensor]:
    """Seconds of a step, and what `first_step` found."""
    net = new_net(architecture(name).build(CLASSES))
    step = way(net, batch, side)
    first = first_step(net, step)
    return seconds_per_step(step, steps_of_a_round(net.space, batch, side)), *first


@cache
def peak_memory(way: str, name: str, batch: int, side: int) -> float:
    """Gigabytes that a process held at most which trained for some steps."""
    code = f"import {Path(__file__).stem} as bench; bench.train_and_print_peak({way!r}, {name!r}, {batch}, {side})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return float(result.stdout) / 1e9


def train_and_print_peak(way: str, name: str, batch: int, side: int) -> None:
    """What `peak_memory` runs."""
    keep_freed_memory()
    net = new_net(architecture(name).build(CLASSES))
    step = papers(net, batch, side) if way == "papers" else ours(net, batch, side, way)
    for number in range(LEAST_STEPS):
        step(number)
    # Of this program alone: what getrusage says also counts the process that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))


# First, while this process holds little itself.
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "batch", "side"), [("mobilenet_v2", 64, 32), ("resnet50", 32, 64)])
def test_metatrain_memory(benchmark: Any, name: str, batch: int, side: int, way: str) -> None:
    found: list[float] = []
    benchmark.pedantic(lambda: found.append(peak_memory(way, name, batch, side)), rounds=1, iterations=1)
    theirs = peak_memory("papers", name, batch, side)
    benchmark.extra_info |= {"peak_GB": round(found[0], 2), "papers_GB": round(theirs, 2)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "batch", "side", "times"), CASES, ids=lambda value: str(value))
def test_metatrain_step(benchmark: Any, name: str, batch: int, side: int, times: int, way: str) -> None:
    space = architecture(name).build(CLASSES)
    # One PruningNet at a time: ResNet-50's takes gigabytes.
    theirs = [baseline(other, name, batch, side) for other in (papers, plain)]
    net = new_net(space)
    step = ours(net, batch, side, way)
    steps = steps_of_a_round(space, batch, side)
    loss, change = first_step(net, step)
    for _, expected_loss, expected in theirs:
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        # An activation that rounds to the other side of zero has another gradient, and all before it, too.
        assert (change - expected).norm() <= MOST_DIFFERENT * expected.norm()

    # pytest-benchmark keeps what it has called to the end, and a PruningNet takes gigabytes.
    rounds, held = list[float](), [step]
    benchmark.pedantic(lambda: rounds.append(seconds_per_step(held[0], steps)), rounds=times, iterations=1)
    held.clear()
    found, (of_paper, of_plain) = median(rounds), (seconds for seconds, *_ in theirs)
    macs = sum(int(cost_model(space, side).macs(genome(space, number))) for number in steps) / len(steps)
    benchmark.extra_info |= {
        "step_s": round(found, 4),
        "papers_s": round(of_paper, 3),
        "plain_s": round(of_plain, 3),
        "times_faster_than_papers": round(of_paper / found, 2),
        "times_faster_than_plain": round(of_plain / found, 2),
        "gflops": round(6e-9 * macs * batch / found, 1),
        "parameters_M": round(sum(p.numel() for p in net.parameters()) / 1e6, 1),
    }
