"""What `gpu.py` measures on a GPU: one case in a process of its own, a line of JSON for every figure it has found.

    python benchmarks/gpu_cases.py "scoring mobilenet_v2"

Answers are compared before anything is timed. Times are medians of several calls, each waited for. Not run on a GPU;
`test_gpu.py` runs the cases on a CPU in a tiny size.

Legend: P population, G genes, N images, C channels, H W size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from baselines import compiled, folded_network, in_dtype, logits_one_by_one, score_the_papers_way
from populations import (
    CLASSES,
    SIDE,
    losses_of,
    noise_images,
    ours,
    random_population,
    root_mean_square,
    scored_images,
    search_population,
)

from engine import population
from engine.calibrated import calibrate
from engine.evolution import SearchSettings, ask, initial_state
from engine.generation import Generation
from engine.pruningnet import PruningNet
from engine.space import architecture
from engine.space.budget import Budget, parse_limit, quantities
from engine.space.costs import cost_model
from engine.trie import plan

Figures = Iterator[tuple[str, float | int]]
# MACs at 224 px that the structures have.
BANDS = {"mobilenet_v2": (250e6, 330e6), "resnet50": (1.5e9, 2.3e9)}


@dataclass(frozen=True)
class Size:
    """How large a case is: images of ``side`` pixels, ``structures`` in a pass, ``candidates`` weights at once.

    ``hidden`` is that of the PruningNet (None: the paper's); ``truth`` of the images are compared before timing, where
    losses may be off by ``most_error`` times the error of PyTorch in the same precision.
    """

    device: torch.device
    side: int = SIDE
    structures: int = 8
    candidates: int = 50
    calibration: int = 256
    scored: int = 512
    truth: int = 64
    most_error: float = 2.0
    hidden: int | None = None
    repeats: int = 7
    compiles: bool = True
    memory: int = 40 * 10**9

    def seconds(self, function: Callable[[], Any]) -> float:
        """Median seconds of a call, of several after one to warm up."""
        self.waited_for(function)
        return median(self.waited_for(function) for _ in range(self.repeats))

    def waited_for(self, function: Callable[[], Any]) -> float:
        """Seconds of one call, until everything it began is done."""
        began = perf_counter()
        function()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter() - began


def net_of(name: str, size: Size) -> PruningNet:
    """A PruningNet in bfloat16 with random weights."""
    space = architecture(name).build(CLASSES)
    net = PruningNet(space, size.hidden, torch.Generator().manual_seed(0), size.device)
    return net.requires_grad_(False).to_precision(torch.bfloat16)


def scoring(name: str, size: Size) -> Figures:
    """Images × candidates per second, weights and statistics there beforehand, against PyTorch one by one."""
    net = net_of(name, size)
    costs = cost_model(net.space)
    genome_PG = random_population(costs, *BANDS[name], size.structures)
    macs_P, genome_PG = costs.macs(genome_PG), genome_PG.to(size.device)
    images = noise_images(size.calibration, size.scored, size.side, size.device)
    images_NCHW, labels_N = scored_images(images)
    together = ours(net, genome_PG, images)

    first = folded_network(net, genome_PG[0], images.calibration_NCHW)
    some, labels = images_NCHW[: size.truth], labels_N[: size.truth]
    theirs = in_dtype(first, torch.bfloat16)
    true_PN = losses_of(logits_one_by_one([first], some), labels)
    their_error = root_mean_square(losses_of(logits_one_by_one([theirs], some.bfloat16()), labels) - true_PN)
    error = root_mean_square(together(some, labels)[:1] - true_PN)
    yield "error_over_pytorch", error / their_error
    if not error <= size.most_error * their_error:
        raise AssertionError(f"the losses are off by {error:.3g}, PyTorch's by {their_error:.3g}")

    shown = size.structures * size.scored
    seconds = size.seconds(partial(together, images_NCHW, labels_N))
    yield "candidate_images_per_second", shown / seconds
    yield "tflops", 2 * int(macs_P.sum()) * size.scored * (size.side / SIDE) ** 2 / seconds / 1e12
    if size.device.type == "cuda":
        yield "times_faster_as_a_graph", seconds / size.seconds(as_graph(partial(together, images_NCHW, labels_N)))
    their_images = images_NCHW.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    # What one structure takes, scaled to all by MACs.
    scale = int(macs_P.sum()) / int(macs_P[0])
    yield "times_eager", scale * size.seconds(partial(logits_one_by_one, [theirs], their_images)) / seconds
    if size.compiles:
        run, compile_seconds = compiled(first, their_images, torch.bfloat16)
        yield "times_compiled", scale * size.seconds(partial(logits_one_by_one, [run], their_images)) / seconds
        yield "compile_seconds", compile_seconds


def as_graph(function: Callable[[], Any]) -> Callable[[], None]:
    """A function of tensors on a GPU as a CUDA graph."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def whole_score(name: str, size: Size) -> Figures:
    """Calibration alone, and whole scores: weights, calibration, images; against the original implementation's way."""
    net = net_of(name, size)
    genome_PG = search_population(cost_model(net.space), BANDS[name][1], size.structures).to(size.device)
    images = noise_images(size.calibration, size.scored, size.side, size.device)
    seconds = size.seconds(lambda: calibrate(net, plan(net.space, genome_PG), images.calibration_NCHW))
    yield "calibrated_candidate_images_per_second", size.structures * size.calibration / seconds
    seconds = size.seconds(lambda: population.score(net, genome_PG, images, size.memory))
    yield "candidates_per_second", size.structures / seconds
    papers = net_of(name, size).to_precision(torch.float32)
    baseline = size.waited_for(lambda: score_the_papers_way(papers, genome_PG[0], images))
    yield "the_papers_way_candidates_per_second", 1 / baseline
    yield "times_the_papers_way", size.structures / seconds * baseline


def weights(name: str, size: Size) -> Figures:
    """The weights of all layers of many candidates."""
    net = net_of(name, size)
    genome_PG = search_population(cost_model(net.space), BANDS[name][1], size.candidates).to(size.device)
    codes, widths = net.all_codes(genome_PG), net.widths(genome_PG)
    seconds = size.seconds(lambda: net.generate_packed(codes, widths))
    yield "milliseconds", 1000 * seconds
    layers = map(net.layer, range(len(net.generators)))
    yield "basis_gigabytes_per_second", sum(layer.basis.nbytes for layer in layers) / seconds / 1e9


def generations(name: str, size: Size) -> Figures:
    """A generation's proposals by `ask` and on the device, and whole generations as operations and as a graph."""
    net = net_of(name, size)
    costs = cost_model(net.space).to(size.device)
    half = (size.structures + 1) // 2
    settings = SearchSettings(size.structures, half, size.structures - half, half, generations=4 * size.repeats)
    budget = Budget(net.space, size.device, (parse_limit("60%", quantities(costs)["flops"]),))
    images = noise_images(size.calibration, size.scored, size.side, size.device)
    generation = Generation(net, images, size.memory, settings, budget)
    genes = len(net.space.genes)
    generation.start(ask(initial_state(genes, 0, size.device), settings, budget))
    outcome = generation.outcome()
    yield "ask_milliseconds", 1000 * size.seconds(lambda: ask(outcome.told.to(size.device), settings, budget))
    yield "propose_milliseconds", 1000 * size.seconds(lambda: generation.propose(generation.parents()))

    def next_generation() -> float:
        asked = ask(outcome.told.to(size.device), settings, budget)

        def whole() -> None:
            generation.start(asked)
            generation.outcome()

        return size.waited_for(whole)

    next_generation()
    if size.device.type == "cuda" and generation.graph is None:
        raise AssertionError(f"no CUDA graph: {generation.why_not_captured}")
    seconds = median(next_generation() for _ in range(size.repeats))
    yield "generation_milliseconds", 1000 * seconds
    yield "generation_candidates_per_second", size.structures / seconds
    generation.graph = None
    yield "times_faster_as_a_graph", median(size.waited_for(generation.step) for _ in range(size.repeats)) / seconds


CASES: dict[str, Callable[[Size], Figures]] = {
    "scoring mobilenet_v2": partial(scoring, "mobilenet_v2"),
    "scoring resnet50": partial(scoring, "resnet50"),
    "whole scores mobilenet_v2": partial(whole_score, "mobilenet_v2"),
    "weights mobilenet_v2": partial(weights, "mobilenet_v2"),
    "weights resnet50": partial(weights, "resnet50"),
    "generations mobilenet_v2": partial(generations, "mobilenet_v2"),
}


def main(case: str) -> None:
    """Run one case on the GPU there is."""
    torch.backends.cudnn.benchmark = True
    # What losses are compared with is float32.
    torch.backends.cudnn.allow_tf32 = False
    for name, value in CASES[case](Size(torch.device("cuda"))):
        print(json.dumps({name: float(f"{value:.4g}")}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
