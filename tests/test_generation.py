"""Generations on the device are those of `ask`, `score` and `tell`; here on a CPU, which runs the function plainly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from no_waiting import META, no_waiting
from replayed import Tape
from structures import budget_of, space_of, tiny_space
from test_evolution import same
from test_no_waiting import on_meta
from test_population import images_of, pruningnet
from torch import Tensor

from engine import generation as generation_module
from engine import population, stages, trie
from engine.evolution import SearchSettings, SearchState, ask, initial_state, tell
from engine.generation import Generation
from engine.population import Scores, ScoringImages
from engine.pruningnet import PruningNet
from engine.random import Keys, random_bits, stream_key
from engine.space.budget import Budget, Limit, Quantity, quantities
from engine.space.costs import cost_model

MEMORY = 10**9
QUICK = SearchSettings(population=8, parents=3, mutants=5, crossovers=3, generations=5)
COSTS = cost_model(space_of("mobilenet_v2", 6), 32)
IMAGES = images_of(6, calibration=3, scored=4, side=32)


def guessed(net: PruningNet, genome_PG: Tensor, images: ScoringImages, memory: int) -> Scores:
    """A score that takes no time: any function of a genome, with many ties."""
    right_PN = genome_PG.sum(1)[:, None] % 97 < torch.tensor([10, 30, 50, 70])
    loss_PN = genome_PG[:, :4].double() / 10
    return Scores(right_PN, loss_PN, torch.ones_like(right_PN))


@pytest.fixture
def guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_module, "score", guessed)


def generation_of(budget: Budget, settings: SearchSettings = QUICK, name: str = "mobilenet_v2") -> Generation:
    return Generation(pruningnet(name), IMAGES, MEMORY, settings, budget)


def by_ask_and_tell(generation: Generation, seed: int) -> SearchState:
    """The search as the host does it."""
    budget, settings = generation.budget, generation.settings
    state = initial_state(len(budget.space.genes), seed)
    while state.generation < settings.generations:
        state = ask(state, settings, budget)
        scores = generation_module.score(generation.net, state.pending, generation.images, MEMORY)
        state = tell(state, scores.correct, scores.loss, scores.images)
    return state


def on_the_device(generation: Generation, seed: int) -> tuple[SearchState, int]:
    """The same search by generations, and how many of them the host had to ask for."""
    state, asked = initial_state(len(generation.budget.space.genes), seed), 0
    while state.generation < generation.settings.generations:
        if not len(state.pending):
            state, asked = ask(state, generation.settings, generation.budget), asked + 1
        generation.start(state)
        outcome = generation.outcome()
        assert torch.equal(outcome.right_PN.sum(1), outcome.told.correct[-len(outcome.right_PN) :])
        state = outcome.asked or outcome.told
    return state.told, asked


@pytest.mark.usefixtures("guesses")
@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, mutants=8, crossovers=0), replace(QUICK, parents=30)])
def test_generations_on_the_device_are_those_of_ask_and_tell_bit_for_bit(settings: SearchSettings) -> None:
    generation = generation_of(budget_of(COSTS, flops="60%"), settings)
    state, asked = on_the_device(generation, seed=1)
    assert same(state, by_ask_and_tell(generation, seed=1))
    # The first generation is random.
    assert asked == 1


@pytest.mark.parametrize("name", ["mobilenet_v1", "resnet50"])
def test_a_search_with_a_pruningnet_is_that_of_ask_and_tell(name: str) -> None:
    few = replace(QUICK, population=4, mutants=2, crossovers=2, generations=2)
    budget = budget_of(cost_model(space_of(name, 6), 32), flops="60%", params="80%")
    generation = generation_of(budget, few, name)
    assert same(on_the_device(generation, seed=0)[0], by_ask_and_tell(generation, seed=0))


@pytest.mark.usefixtures("guesses")
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.floats(0.1, 1))
def test_where_one_round_of_proposals_is_not_enough_the_host_is_asked(seed: int, share: float) -> None:
    flops = quantities(COSTS)["flops"]
    macs = int(flops.least + (flops.full - flops.least) * share**2)
    generation = generation_of(budget_of(COSTS, flops=f"{int(0.98 * macs)}:{macs}"))
    assert same(on_the_device(generation, seed)[0], by_ask_and_tell(generation, seed))


@pytest.mark.usefixtures("guesses")
def test_a_narrow_budget_makes_the_host_ask_more_than_once() -> None:
    generation = generation_of(budget_of(COSTS, flops="59.9%:60%"))
    state, asked = on_the_device(generation, seed=0)
    assert 1 < asked <= QUICK.generations
    assert same(state, by_ask_and_tell(generation, seed=0))


@pytest.mark.usefixtures("guesses")
def test_what_the_host_told_in_between_is_taken_to_the_device() -> None:
    generation = generation_of(budget_of(COSTS, flops="60%"))
    expected = by_ask_and_tell(generation, seed=2)
    state = ask(initial_state(len(generation.budget.space.genes), 2), QUICK, generation.budget)
    for number in range(QUICK.generations):
        if number % 2:
            scores = guessed(generation.net, state.pending, generation.images, MEMORY)
            state = tell(state, scores.correct, scores.loss, scores.images)
            state = ask(state, QUICK, generation.budget)
        else:
            generation.start(state)
            outcome = generation.outcome()
            state = outcome.asked or ask(outcome.told, QUICK, generation.budget)
    assert same(state.told, expected)


def test_failed_evaluations_have_no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    def some_fail(*arguments: object) -> Scores:
        scores = guessed(*arguments)  # type: ignore[arg-type]
        scores.loss_PN[1::2] = torch.nan
        return scores

    monkeypatch.setattr(generation_module, "score", some_fail)
    generation = generation_of(budget_of(COSTS, flops="60%"), replace(QUICK, parents=8))
    state, _ = on_the_device(generation, seed=0)
    assert same_but_nan(state, by_ask_and_tell(generation, seed=0))
    failed = state.loss.isnan().nonzero()[:, 0]
    assert len(failed) == len(state.loss) // 2
    assert not torch.isin(state.parent_V2, failed).any()


def test_when_all_have_failed_the_host_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_fail(*arguments: object) -> Scores:
        scores = guessed(*arguments)  # type: ignore[arg-type]
        scores.loss_PN.fill_(torch.nan)
        return scores

    monkeypatch.setattr(generation_module, "score", all_fail)
    generation = generation_of(budget_of(COSTS, flops="60%"))
    state, asked = on_the_device(generation, seed=0)
    assert asked == QUICK.generations
    assert same_but_nan(state, by_ask_and_tell(generation, seed=0))


def same_but_nan(one: SearchState, other: SearchState) -> bool:
    assert torch.equal(one.loss.isnan(), other.loss.isnan())
    return same(*(replace(state, loss=state.loss.nan_to_num(nan=-1)) for state in (one, other)))


class Stream:
    """A stream of a GPU that is not there."""

    device = torch.device("cpu")

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that do nothing, and tapes for graphs."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    for module in (trie, population):
        monkeypatch.setattr(module, "fixed_shape_on", lambda device: True)


def test_a_step_captured_once_and_replayed_goes_on_with_the_search(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(QUICK, population=4, mutants=2, crossovers=2, generations=4)
    generation = generation_of(budget_of(COSTS, flops="60%"), few)
    expected = by_ask_and_tell(generation, seed=3)

    @contextmanager
    def capture(graph: Tape, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        # A graph does nothing while it is captured.
        kept = {key: value.clone() for key, value in vars(generation).items() if isinstance(value, Tensor)}
        with graph:
            yield
        for key, value in kept.items():
            getattr(generation, key).copy_(value)
        monkeypatch.setattr(generation, "step", None)

    monkeypatch.setattr(torch.cuda, "graph", capture)
    generation.stream = Stream()  # type: ignore[assignment]
    state, asked = on_the_device(generation, seed=3)
    assert (asked, generation.steps, generation.why_not_captured) == (1, 4, "")
    assert generation.graph is not None
    assert same(state, expected)


@pytest.mark.usefixtures("guesses")
def test_where_a_step_cannot_be_captured_it_is_said_and_the_search_goes_on(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = generation_of(budget_of(COSTS, flops="60%"))
    expected = by_ask_and_tell(generation, seed=3)

    @contextmanager
    def capture(graph: Tape, **_: object) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
        yield

    monkeypatch.setattr(torch.cuda, "graph", capture)
    generation.stream = Stream()  # type: ignore[assignment]
    assert same(on_the_device(generation, seed=3)[0], expected)
    assert generation.why_not_captured == "operation not permitted when stream is capturing"


def test_a_profile_is_of_operations_and_not_of_a_graph(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(QUICK, population=4, mutants=2, crossovers=2, generations=3)
    generation = generation_of(budget_of(COSTS, flops="60%"), few)
    generation.stream = Stream()  # type: ignore[assignment]
    with stages.recorded(torch.device("cpu")) as record:
        on_the_device(generation, seed=3)
    assert generation.graph is None
    seconds = record.seconds()
    assert all(seconds[name] > 0 for name in ("calibration", "weights", "scoring", "selection", "duplicates"))


def test_a_step_does_not_wait() -> None:
    space = tiny_space()
    net = PruningNet(space, 2, device=META).requires_grad_(False)
    costs = cost_model(space, 40).to(META)
    limit = Limit(Quantity("flops", "tiny", costs.macs, 1.0, 2.0, 3.0), high=2.0, low=1.5)
    images = on_meta(images_of(space.classes, calibration=4, scored=5, side=40))
    generation = Generation(net, images, MEMORY, QUICK, Budget(space, META, (limit,)))
    generation.keys.set({"MUTATION": 1, "CROSSOVER": 2})
    # What is copied once is copied by the first step.
    generation.step()
    with no_waiting():
        generation.step()


def test_keys_on_a_device_are_those_of_the_host_and_can_be_changed() -> None:
    keys = Keys(torch.device("cpu"))
    names: list[tuple[int | str, ...]] = [("parent",), ("walk", 3)]
    for root in (5, 2**64 - 1, 0):
        keys.set({"one": root, "other": root + 1})
        for name in names:
            expected = stream_key(stream_key(root, *name), "gene")
            derived = stream_key(stream_key(keys["one"], *name), "gene")
            assert torch.equal(random_bits(derived, 50), random_bits(expected, 50))
        assert torch.equal(random_bits(keys["other"], 5), random_bits(root + 1, 5))
    assert len(keys.places) == 3
