"""Scoring candidates: the population scorer against one network after another in plain PyTorch.

    pytest --benchmark-only benchmarks/bench_score.py

A candidate is scored as in a search on small images: 1000 calibration and 360 sub-validation images of 32 px. The
baseline generates the weights of one candidate, calibrates a channels-last `PrunedNet` on one batch, and counts
correct images in inference mode: the best eager PyTorch does one by one. Scores are compared before anything is timed.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import population
from engine.data import open_data
from engine.population import ScoringImages
from engine.pruned import ConvBlock, PrunedNet
from engine.pruningnet import PruningNet
from engine.random import random_integers, stream_key
from engine.run.training import keep_freed_memory
from engine.space import architecture
from engine.space.structure import convolutions

GENOMES = 16
BASELINE_GENOMES = 4
CALIBRATION_IMAGES = 1000


@torch.inference_mode()
def score_one(net: PruningNet, genome_G: Tensor, images: ScoringImages) -> int:
    """Correct images of one candidate, computed by a plain network."""
    plain = PrunedNet(convolutions(net.space, genome_G), net.space.classes)
    plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    blocks = [block for block in plain.convs.values() if isinstance(block, ConvBlock)]
    for block, (weight,) in zip(blocks, net.generate(genome_G[None]), strict=True):
        block.conv.weight.copy_(weight)
        # Momentum 1: the running statistics are those of the one calibration batch.
        block.norm.momentum = 1.0
    plain.classifier.weight.copy_(net.classifier.weight[:, : plain.classifier.in_features])
    plain.classifier.bias.copy_(net.classifier.bias)
    plain.train()(images.calibration_NCHW.contiguous(memory_format=torch.channels_last))
    plain.eval()
    correct = 0
    for images_NCHW, labels_N in images.chunks():
        logits = plain(images_NCHW.contiguous(memory_format=torch.channels_last))
        correct += int((logits.argmax(1) == labels_N).sum())
    return correct


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_scoring_candidates_at_32_px(benchmark: Any, name: str) -> None:
    keep_freed_memory()
    data = open_data("digits")
    images = population.scoring_images(data, CALIBRATION_IMAGES)
    space = architecture(name).build(len(data.classes))
    net = PruningNet(space, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    genome_PG = random_integers(stream_key("bench"), space.choices, (GENOMES, len(space.genes)))

    scores = population.score(net, genome_PG, images)
    seconds = []
    for genome_G, correct in zip(genome_PG[:BASELINE_GENOMES], scores.correct.tolist(), strict=False):
        began = perf_counter()
        one_by_one = score_one(net, genome_G, images)
        seconds.append(perf_counter() - began)
        # Untrained weights leave near-ties among the logits, which rounding may decide either way.
        assert abs(one_by_one - correct) <= 2

    benchmark.pedantic(population.score, (net, genome_PG, images), rounds=3)
    rate = GENOMES / benchmark.stats.stats.median
    benchmark.extra_info.update(
        candidates_per_second=round(rate, 2),
        one_by_one_candidates_per_second=round(1 / median(seconds), 2),
        times_faster=round(rate * median(seconds), 2),
    )
