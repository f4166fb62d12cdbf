"""What racing saves, and whether it finds the same structures, over 20 searches with 20 seeds.

    python -m pytest benchmarks/bench_racing.py --benchmark-only

A PruningNet of MobileNetV1 is trained on hard digits first, which takes minutes; METAPRUNE_RUN=RUN takes one that is
there. Every search is done twice, with all images for every candidate and racing. Answers are remembered by genome, so
that the second one takes from memory what the first one computed: what is counted is images, and what is timed is one
pass over a population.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.evolution import SearchSettings, SearchState, ask, initial_state, ranking, tell
from engine.metatrain import Metatrain, main
from engine.population import Scores, score, score_passes, scoring_images
from engine.racing import Race
from engine.run.command import run_command
from engine.run.opened import open_run
from engine.space.budget import Budget, parse_limit, quantities
from engine.space.costs import cost_model

SEEDS = 20
CONFIDENCE = 0.95
TRAINING = ("--data", "digits-hard", "--steps", "1500", "--lr", "0.05")
CALIBRATION_IMAGES = 500
SETTINGS = SearchSettings(population=20, parents=5, mutants=10, crossovers=10, generations=6)
BUDGET = "300M"


class Answers:
    """Scores every genome once, on all images, and tells as much of it as a race would have shown."""

    def __init__(self, run: Path) -> None:
        opened = open_run(run)
        cpu = torch.device("cpu")
        self.net = opened.net(cpu).to_precision(torch.bfloat16)
        self.images = scoring_images(opened.data(cpu), CALIBRATION_IMAGES)
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def scores(self, genome_PG: Tensor, race: Race | None) -> Scores:
        missing = [row for row in genome_PG.tolist() if tuple(row) not in self.known]
        if missing:
            found = score(self.net, torch.tensor(missing), self.images)
            self.known |= {
                tuple(row): (found.right_PN[i], found.loss_PN[i]) for i, row in enumerate(missing)
            }  # fmt: skip
        right, loss = zip(*(self.known[tuple(row)] for row in genome_PG.tolist()), strict=True)
        whole = Scores(torch.stack(right), torch.stack(loss), torch.ones(len(right), len(right[0]), dtype=torch.bool))
        return whole if race is None else raced(whole, race)


def raced(whole: Scores, race: Race) -> Scores:
    """What a race would have shown of these answers."""
    seen_PN = torch.zeros_like(whole.seen_PN)
    running_P = torch.arange(len(seen_PN))
    for number, positions in enumerate(race.slices, start=1):
        seen_PN[running_P[:, None], positions] = True
        running_P = running_P[race.goes_on(whole.right_PN[running_P], torch.cat(race.slices[:number]))]
    return Scores(whole.right_PN, whole.loss_PN, seen_PN)


def search(answers: Answers, budget: Budget, seed: int, racing: bool) -> SearchState:
    state = initial_state(len(budget.space.genes), seed)
    while state.generation < SETTINGS.generations:
        best = ranking(state.correct, state.loss)[: SETTINGS.parents]
        race = Race(answers.known[tuple(state.genome_VG[best[-1]].tolist())][0], CONFIDENCE) if len(best) else None
        state = ask(state, SETTINGS, budget)
        scores = answers.scores(state.pending, race if racing else None)
        state = tell(state, scores.correct, scores.loss, scores.images)
    return state


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PruningNet on hard digits."""
    if given := os.environ.get("METAPRUNE_RUN"):
        return Path(given)
    out = tmp_path_factory.mktemp("racing") / "run"
    assert run_command(main, Metatrain, [*TRAINING, "--out", str(out), "--calibration-images", "500"]) == 0
    return out


def test_racing_finds_what_full_scoring_finds(benchmark: Any, trained: Path) -> None:
    answers = Answers(trained)
    costs = cost_model(answers.net.space)
    budget = Budget(costs.space, torch.device("cpu"), (parse_limit(BUDGET, quantities(costs)["flops"]),))
    images = len(answers.images.subset)

    same_winner, same_parents, shown, shown_after_first = 0, 0, 0, 0
    for seed in range(SEEDS):
        whole, race = (search(answers, budget, seed, racing) for racing in (False, True))
        best = [state.genome_VG[ranking(state.correct, state.loss)[: SETTINGS.parents]] for state in (whole, race)]
        same_winner += torch.equal(best[0][0], best[1][0])
        same_parents += torch.equal(*best)
        shown += int(race.images.sum())
        shown_after_first += int(race.images[SETTINGS.population :].sum())

    # One generation, really raced, against the same without a race.
    genome_PG, bar = whole.genome_VG[-SETTINGS.population :], ranking(whole.correct, whole.loss)[SETTINGS.parents - 1]
    actual = Race(answers.known[tuple(whole.genome_VG[bar].tolist())][0], CONFIDENCE)
    expected = raced(answers.scores(genome_PG, None), actual)
    for members, part in score_passes(answers.net, genome_PG, answers.images, race=actual):
        assert torch.equal(part.seen_PN, expected.seen_PN[members])
    began = time.perf_counter()
    score(answers.net, genome_PG, answers.images)
    without = time.perf_counter() - began
    benchmark.pedantic(
        lambda: list(score_passes(answers.net, genome_PG, answers.images, race=actual)), rounds=3, warmup_rounds=1
    )
    candidates = SEEDS * SETTINGS.population * SETTINGS.generations
    benchmark.extra_info.update(
        searches=SEEDS,
        same_winner=same_winner,
        same_parents=same_parents,
        images_saved=f"{100 * (1 - shown / (candidates * images)):.0f} %",
        images_saved_after_the_first_generation=(
            f"{100 * (1 - shown_after_first / ((candidates - SEEDS * SETTINGS.population) * images)):.0f} %"
        ),
        times_faster_in_a_late_generation=round(without / benchmark.stats.stats.median, 2),
    )
