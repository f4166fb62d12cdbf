"""What only a GPU can show of whole networks: scores, graphs of a scoring pass and of a generation, two streams.

Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from structures import random_genomes, space_of
from test_evolution import same
from test_population import equal, images_of, pruningnet
from torch import Tensor

from engine.evolution import SearchSettings, SearchState, ask, initial_state, tell
from engine.generation import Generation
from engine.population import Scores, ScoringImages, score
from engine.pruningnet import PruningNet
from engine.space.budget import Budget, parse_limit, quantities
from engine.space.costs import cost_model

CUDA = torch.device("cuda")
NAMES = ("mobilenet_v1", "mobilenet_v2", "resnet50")
MEMORY = 2 * 10**9
SEARCH = SearchSettings(population=6, parents=3, mutants=3, crossovers=3, generations=5)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(images: ScoringImages) -> ScoringImages:
    subset = images.subset
    stored = subset.images(slice(None)).to(CUDA)
    subset = replace(subset, labels=subset.labels.to(CUDA), stored=stored)
    return replace(images, calibration_NCHW=images.calibration_NCHW.to(CUDA), subset=subset)


def images_for(net: PruningNet) -> ScoringImages:
    return images_of(net.space.classes, calibration=32, scored=10, side=40)


def alike(net: PruningNet) -> Tensor:
    """Genomes that share prefixes of any length, two of them equal."""
    genome_PG = random_genomes(net.space, 6)
    for p, shared in enumerate((genome_PG.shape[1], genome_PG.shape[1] - 1, 2), start=1):
        genome_PG[p, :shared] = genome_PG[0, :shared]
    return genome_PG


def scores_on_gpu(name: str, dtype: torch.dtype = torch.float32) -> tuple[PruningNet, Tensor, ScoringImages]:
    net = pruningnet(name).to_precision(dtype).to(CUDA)
    return net, alike(net).to(CUDA), on_gpu(images_for(net))


def moved(scores: Scores) -> Scores:
    return Scores(*(value.cpu() for value in vars(scores).values()))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_scores_are_those_of_a_cpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    net = pruningnet(name)
    expected = score(net, alike(net), images_for(net))
    scores = moved(score(*scores_on_gpu(name, dtype), MEMORY))
    torch.testing.assert_close(scores.loss, expected.loss, rtol=tolerance, atol=0)
    if dtype == torch.float32:
        assert (scores.right_PN != expected.right_PN).float().mean() <= 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_and_memory_change_no_bit_of_a_score(dtype: torch.dtype) -> None:
    net, genome_PG, images = scores_on_gpu("mobilenet_v2", dtype)
    together = moved(score(net, genome_PG, images, MEMORY))
    assert equal(moved(score(net, genome_PG, images, 1)), together)


@pytest.mark.parametrize("name", NAMES)
def test_scoring_does_not_wait_for_the_gpu(name: str, request: pytest.FixtureRequest) -> None:
    given = scores_on_gpu(name, torch.bfloat16)
    score(*given, MEMORY)  # compiles, and copies what is copied once
    torch.cuda.synchronize()
    request.getfixturevalue("no_waiting")
    score(*given, MEMORY)


@pytest.mark.parametrize("name", NAMES)
def test_a_scoring_pass_as_a_graph_scores_other_genomes_and_images_as_without(name: str) -> None:
    net, genome_PG, images = scores_on_gpu(name, torch.bfloat16)
    assert isinstance(images.subset.stored, Tensor)
    score(net, genome_PG, images, MEMORY)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = score(net, genome_PG, images, MEMORY)
    for _ in range(2):
        genome_PG.copy_(random_genomes(net.space, len(genome_PG), seed=7).to(CUDA))
        images.subset.stored.copy_(images.subset.stored.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        assert equal(moved(replayed), moved(score(net, genome_PG, images, MEMORY)))


def test_two_streams_score_at_once_what_each_scores_alone() -> None:
    given = [scores_on_gpu(name, torch.bfloat16) for name in ("mobilenet_v1", "mobilenet_v2")]
    expected = [moved(score(*each, MEMORY)) for each in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    for _ in range(3):
        results = []
        for stream, each in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                results.append(score(*each, MEMORY))
        torch.cuda.synchronize()
        assert all(equal(moved(one), other) for one, other in zip(results, expected, strict=True))


def by_ask_and_tell(generation: Generation) -> SearchState:
    state = initial_state(len(generation.budget.space.genes), 0, CUDA)
    while state.generation < SEARCH.generations:
        state = ask(state, SEARCH, generation.budget)
        scores = score(generation.net, state.pending, generation.images, MEMORY)
        state = tell(state, scores.correct, scores.loss, scores.images)
    return state.to("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_generations_become_a_graph_and_are_those_of_ask_and_tell(name: str) -> None:
    net, _, images = scores_on_gpu(name, torch.bfloat16)
    costs = cost_model(space_of(name, 6), 40).to(CUDA)
    budget = Budget(net.space, CUDA, (parse_limit("60%", quantities(costs)["flops"]),))
    generation = Generation(net, images, MEMORY, SEARCH, budget)
    state = initial_state(len(net.space.genes), 0, CUDA)
    while state.generation < SEARCH.generations:
        state = state if len(state.pending) else ask(state.to(CUDA), SEARCH, budget)
        generation.start(state)
        outcome = generation.outcome()
        state = outcome.asked or outcome.told
    assert generation.why_not_captured == ""
    assert generation.graph is not None
    assert same(state.told, by_ask_and_tell(generation))
