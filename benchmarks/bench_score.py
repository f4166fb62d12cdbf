"""Scoring candidates: population scoring against the original implementation's way and the best of PyTorch.

    pytest --benchmark-only benchmarks/bench_score.py

`test_scoring_pass`: weights generated and BatchNorm calibrated beforehand, images of 224 px to losses. Against the same
structures as folded channels-last networks one by one, eager (`times_eager`, in the faster of a few batch sizes) and
compiled. Compilation takes long, so the first structure alone is compiled: `times_compiled` scales its time by MACs to
all structures, `times_compiled_alone` compares with our pass of that structure alone.

`test_calibrate_and_score`: a whole score, for a population as in a search. Against the original implementation's way
in fp32, timed on the first few candidates and taken for the average of all.

Losses are compared before anything is timed. Ours are timed down to losses, PyTorch's to logits. GFLOP/s are 2 × MACs;
`of_peak` is the fraction of `peak.peak_flops` in the same dtype; `error_over_pytorch` the error of our losses over that
of eager PyTorch's in the same dtype, both against PyTorch in float32 with the same weights.

Legend: P population, G genes, N images, C channels, H W size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from baselines import compiled, folded_network, in_dtype, logits_one_by_one, score_the_papers_way
from peak import median_seconds, of_peak, seconds_of
from populations import (
    CLASSES,
    DTYPES,
    SIDE,
    in_precision,
    losses_of,
    noise_images,
    ours,
    random_population,
    root_mean_square,
    scored_images,
    search_population,
)

from engine import population
from engine.data import open_data
from engine.population import ScoringImages
from engine.pruningnet import PruningNet
from engine.space import architecture
from engine.space.costs import cost_model

# -- the scoring pass -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """``structures`` with ``low`` to ``high`` MACs at 224 px, and the images they are calibrated on and run on."""

    low: float
    high: float
    structures: int
    images: int
    calibration: int = 16


PASSES = {
    "mobilenet_v1": Pass(250e6, 330e6, structures=4, images=16),
    "mobilenet_v2": Pass(250e6, 330e6, structures=4, images=16),
    "resnet50": Pass(1.8e9, 2.2e9, structures=2, images=8),
}
EAGER_BATCHES = (4, 16)
# Weights are generated before the clock starts, so the size of the PruningNet does not matter.
HIDDEN = 4
# Nats between two ways to compute a loss in float32.
TOLERANCE = 1e-4


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", PASSES)
def test_scoring_pass(
    benchmark: Any, peak_flops: Callable[[torch.dtype], float | None], name: str, dtype: torch.dtype
) -> None:
    case = PASSES[name]
    space = architecture(name).build(CLASSES)
    costs = cost_model(space, SIDE)
    genome_PG = random_population(costs, case.low, case.high, case.structures)
    macs_P = costs.macs(genome_PG)
    net = PruningNet(space, HIDDEN, torch.Generator().manual_seed(0)).requires_grad_(False)
    net = in_precision(net, dtype)
    images = noise_images(case.calibration, case.images)
    images_NCHW, labels_N = scored_images(images)

    # The truth has the same weights, computed with in float32.
    true_networks = [folded_network(net, genome_G, images.calibration_NCHW) for genome_G in genome_PG]
    true_PN = losses_of(logits_one_by_one(true_networks, images_NCHW), labels_N)
    networks = true_networks if dtype == torch.float32 else [in_dtype(network, dtype) for network in true_networks]
    their_images = images_NCHW.to(dtype=dtype, memory_format=torch.channels_last)
    compiled_network, compile_seconds = compiled(true_networks[0], their_images, dtype)
    together, alone = (ours(net, some_PG, images) for some_PG in (genome_PG, genome_PG[:1]))

    error = root_mean_square(together(images_NCHW, labels_N) - true_PN)
    alone_error = root_mean_square(alone(images_NCHW, labels_N) - true_PN[:1])
    their_error = root_mean_square(losses_of(logits_one_by_one(networks, their_images), labels_N) - true_PN)
    compiled_error = root_mean_square(
        losses_of(logits_one_by_one([compiled_network], their_images), labels_N) - true_PN[:1]
    )
    allowed = TOLERANCE if dtype == torch.float32 else 2 * max(their_error, compiled_error)
    assert max(error, alone_error) <= allowed
    if dtype == torch.float32:
        assert compiled_error <= TOLERANCE

    eager = {
        batch: median_seconds(partial(logits_one_by_one, networks, their_images, batch), 3) for batch in EAGER_BATCHES
    }
    eager_batch = min(eager, key=eager.__getitem__)
    compiled_seconds = median_seconds(partial(logits_one_by_one, [compiled_network], their_images), 5)
    alone_seconds = median_seconds(partial(alone, images_NCHW, labels_N), 5)
    benchmark.pedantic(together, (images_NCHW, labels_N), rounds=7, warmup_rounds=1)

    seconds = benchmark.stats.stats.median
    flops = 2 * int(macs_P.sum()) * case.images
    peak = peak_flops(dtype)
    benchmark.extra_info.update(
        candidate_images_per_second=_significant(case.structures * case.images / seconds),
        gflops=_significant(flops / seconds / 1e9),
        **({} if peak is None else {"peak_gflops": _significant(peak / 1e9)}),
        of_peak=of_peak(flops / seconds, peak),
        times_eager=_significant(eager[eager_batch] / seconds),
        eager_batch=eager_batch,
        times_compiled=_significant(compiled_seconds * int(macs_P.sum()) / int(macs_P[0]) / seconds),
        times_compiled_alone=_significant(compiled_seconds / alone_seconds),
        compile_seconds=_significant(compile_seconds),
        **({} if dtype == torch.float32 else {"error_over_pytorch": _significant(error / their_error)}),
    )


# -- a whole score ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A population and its images: handwritten digits, or noise of 224 px."""

    population: int
    baseline_candidates: int
    calibration: int
    scored: int | None = None

    def images(self) -> tuple[ScoringImages, int]:
        """The images and the number of classes."""
        if self.scored is not None:
            return noise_images(self.calibration, self.scored), CLASSES
        data = open_data("digits")
        return population.scoring_images(data, self.calibration), len(data.classes)


DIGITS = Search(population=50, baseline_candidates=1, calibration=1000)
LARGE = Search(population=8, baseline_candidates=1, calibration=64, scored=64)
SEARCHES = {
    "mobilenet_v1-digits-32px-50": ("mobilenet_v1", DIGITS),
    "mobilenet_v2-digits-32px-50": ("mobilenet_v2", DIGITS),
    "mobilenet_v2-224px-8": ("mobilenet_v2", LARGE),
}
BUDGET = 300e6
# Of the images, by which two ways to score may differ: untrained weights leave near-ties among the logits, and the
# original's variance is n / (n - 1) times ours, where n is as small as the number of images.
NEAR_TIES = 0.05


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("name", "case"), SEARCHES.values(), ids=SEARCHES)
def test_calibrate_and_score(benchmark: Any, name: str, case: Search, dtype: torch.dtype) -> None:
    images, classes = case.images()
    space = architecture(name).build(classes)
    genome_PG = search_population(cost_model(space), BUDGET, case.population)
    full_precision_net = PruningNet(space, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    net = in_precision(full_precision_net, dtype)
    timed_PG = genome_PG[: case.baseline_candidates]

    networks = [folded_network(net, genome_G, images.calibration_NCHW) for genome_G in timed_PG]
    images_NCHW, labels_N = scored_images(images)
    logits = logits_one_by_one(networks, images_NCHW)
    # With the first candidate's own answers for labels, a wrong logit shows in the number of correct images.
    labels_N.copy_(logits[0].argmax(1))
    true_PN = losses_of(logits, labels_N)
    scores = population.score(net, genome_PG, images)
    errors_P = scores.loss[: len(timed_PG)] - true_PN.mean(1)
    allowed = TOLERANCE
    if dtype != torch.float32:
        narrow = [in_dtype(network, dtype) for network in networks]
        allowed = root_mean_square(losses_of(logits_one_by_one(narrow, images_NCHW.to(dtype)), labels_N) - true_PN)
    assert float(errors_P.abs().max()) <= allowed
    if dtype == torch.float32:
        one_batch = max(len(images.calibration_NCHW), len(labels_N))
        same_definition = score_the_papers_way(net, timed_PG[0], images, batch=one_batch, momentum=1)
        assert same_definition >= (1 - NEAR_TIES) * len(labels_N)

    baseline = median(
        seconds_of(partial(score_the_papers_way, full_precision_net, genome_G, images)) for genome_G in timed_PG
    )
    benchmark.pedantic(population.score, (net, genome_PG, images), rounds=2)
    rate = case.population / benchmark.stats.stats.median
    benchmark.extra_info.update(
        candidates_per_second=_significant(rate),
        the_papers_way_candidates_per_second=_significant(1 / baseline),
        times_faster=_significant(rate * baseline),
    )


def _significant(value: float) -> float:
    return float(f"{value:.3g}")
