"""What it takes to bring photographs to a training step: decoded from JPEG files, or read from the cache.

    pytest --benchmark-only benchmarks/bench_input.py

Photographs of 500 x 375 pixels (noise smoothed to about the 65 KB of one of ImageNet's) for a network that reads
224 px, in batches of 64, in one process on one core. The batches of both ways are compared, bit for bit, before
anything is timed.

`img_s_core` are images per second and core from file to augmented batch; `decode_ms` (or `read_ms`) and `augment_ms`
are what an image takes of it. `step_img_s` are the images per second that a training step of MobileNetV2's PruningNet
(224 px, 16 images, the middle structure) takes in on all cores of this machine, and `share_of_cores` is the part of the
cores that is busy bringing those.
"""

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peak import median_seconds
from PIL import Image
from torch import Tensor

from engine.data import Data, augment, open_data
from engine.factored_sgd import FactoredSGD
from engine.pruningnet import PruningNet
from engine.space import architecture
from engine.space.recipe import Recipe

PHOTOS, BATCH, STEP_BATCH = 64, 64, 16
RECIPE = Recipe(batch=STEP_BATCH, epochs=1, lr=0.1, schedule="linear", weight_decay=4e-5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs, of two classes."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(PHOTOS):
        folder = root / "train" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        pixels = smooth.astype(np.int16) + random.integers(-12, 13, (375, 500, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return root


@cache
def step_images_per_second() -> float:
    """What a training step of the PruningNet of MobileNetV2 takes in on all cores."""
    space = architecture("mobilenet_v2").build(1000)
    net = PruningNet(space, generator=torch.Generator().manual_seed(0))
    optimizer = FactoredSGD(net, RECIPE)
    images = torch.randn(STEP_BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(STEP_BATCH, dtype=torch.int64)
    genome_1G = space.uniform_choice(space.choices // 2)

    def step() -> None:
        F.cross_entropy(optimizer.logits(images, genome_1G).flatten(0, 1), labels).backward()
        optimizer.step(RECIPE.lr)

    return STEP_BATCH / median_seconds(step, repeats=3)


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Median seconds of processor time of a call, whatever else the machine does."""

    def once() -> float:
        began = time.process_time()
        function()
        return time.process_time() - began

    once()
    return median(once() for _ in range(7))


@pytest.mark.parametrize("way", ["decoded", "cached"])
def test_input(benchmark: Any, photos: Path, tmp_path: Path, way: str) -> None:
    positions = torch.arange(BATCH)

    def opened(cache: Path | None) -> Data:
        return open_data(str(photos), workers=0, memory_limit=0, cache=cache)

    def stored(data: Data) -> Tensor:
        return torch.cat([images.images(slice(None)) for images in data.sets.values()])[positions]

    plain = opened(None)
    data = plain if way == "decoded" else opened(tmp_path)
    images_u8 = stored(data)
    assert torch.equal(images_u8, stored(plain))
    consumed = step_images_per_second()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        read = cpu_seconds(lambda: stored(data)) / BATCH
        augmented = cpu_seconds(lambda: augmented_batch(data, images_u8)) / BATCH
        benchmark.pedantic(lambda: augmented_batch(data, stored(data)), rounds=5)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info |= {
        "img_s_core": round(1 / (read + augmented)),
        "read_ms" if way == "cached" else "decode_ms": round(1e3 * read, 2),
        "augment_ms": round(1e3 * augmented, 2),
        "step_img_s": round(consumed, 1),
        "share_of_cores": f"{100 * consumed * (read + augmented) / (os.cpu_count() or 1):.1f} %",
    }


def augmented_batch(data: Data, images_u8: Tensor) -> Tensor:
    """The batch a step trains on."""
    return augment(images_u8, data.augmentation, data.preprocessing, torch.Generator().manual_seed(0))
