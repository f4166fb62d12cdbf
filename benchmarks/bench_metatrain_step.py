"""A training step of a PruningNet against plain autograd and PyTorch's fused SGD.

    pytest --benchmark-only benchmarks/bench_metatrain_step.py

MobileNetV2 of the paper's hidden sizes, 64 images of 32 px, a new random structure in every step, from images to
trained weights. Baseline: the same forward pass with the gradient of every basis made by autograd and applied by
`torch.optim.SGD(fused=True)`. The weights after the first step are compared before anything is timed. Both ways are
timed on the same structures.

`update_floor_ms` is the time that reading and writing weights and momentum once takes at the rate of changing a large
tensor in place.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from peak import seconds_of
from torch import Tensor

from engine.factored_sgd import FactoredSGD
from engine.pruningnet import PruningNet
from engine.run.optimizer import SGD, Optimizer
from engine.space import architecture
from engine.space.recipe import Recipe

CLASSES, BATCH, SIDE = 10, 64, 32
RECIPE = Recipe(batch=BATCH, epochs=1, lr=0.1, schedule="linear", weight_decay=4e-5)
STEPS = 8


def stepper(net: PruningNet, optimizer: Optimizer, logits: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], None]:
    """A function that does the step of a number."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        genome_1G = torch.randint(net.space.choices, (1, len(net.space.genes)), generator=generator)
        F.cross_entropy(
            logits(images, genome_1G).view(BATCH, CLASSES), labels, label_smoothing=RECIPE.label_smoothing
        ).backward()
        optimizer.step(RECIPE.lr)

    return step


def test_metatrain_step(benchmark: Any, in_place_bandwidth: float) -> None:
    space = architecture("mobilenet_v2").build(CLASSES)
    net, plain_net = (PruningNet(space, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    optimizer, plain = FactoredSGD(net, RECIPE), SGD(plain_net.named_parameters(), RECIPE)
    ours, theirs = stepper(net, optimizer, optimizer.logits), stepper(plain_net, plain, plain_net)

    ours(0)
    theirs(0)
    for mine, other in zip(net.parameters(), plain_net.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-4, atol=1e-6)

    baseline = median(seconds_of(partial(theirs, number)) for number in range(1, 1 + STEPS))
    numbers = iter(range(1, 1 + STEPS))
    benchmark.pedantic(lambda: ours(next(numbers)), rounds=STEPS)
    seconds = benchmark.stats.stats.median
    parameters = sum(parameter.numel() for parameter in net.parameters())
    benchmark.extra_info |= {
        "plain_s": round(baseline, 3),
        "times_faster": round(baseline / seconds, 2),
        "parameters_M": round(parameters / 1e6, 1),
        "update_floor_ms": round(16e3 * parameters / in_place_bandwidth, 1),
    }
