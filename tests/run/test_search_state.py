"""The state of a search survives a round trip, and nothing else is taken for it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from structures import budget_of, tiny_space

from engine.errors import UserError
from engine.evolution import SearchSettings, SearchState, ask, initial_state, tell
from engine.run.search_state import Identity, load_state, save_state
from engine.space.budget import Quantity, quantities
from engine.space.costs import cost_model

CPU = torch.device("cpu")
IDENTITY: Identity = {"pruningnet": "a" * 64, "splits": "b" * 64, "budget": {"flops": {"high": 10**9}}}


COSTS = cost_model(tiny_space(), 32)


@pytest.fixture
def known() -> dict[str, Quantity]:
    return quantities(COSTS, lambda genome_PG: genome_PG.sum(1).double() / 8)


@pytest.fixture
def searched() -> SearchState:
    """Two generations, scored by an arbitrary rule; one evaluation failed, and one was stopped by a race."""
    settings = SearchSettings(population=6, parents=2, mutants=2, crossovers=2)
    state = initial_state(len(COSTS.space.genes), seed=3)
    for _ in range(2):
        state = ask(state, settings, budget_of(COSTS, flops="100%"))
        correct, loss = state.pending.sum(1), state.pending.double().mean(1) / 7
        images = torch.tensor([100, 100, 100, 100, 100, 13])
        state = tell(state, correct, loss.where(correct != correct.max(), torch.nan), images)
    return state


def test_a_state_is_restored_bit_for_bit(searched: SearchState, known: dict[str, Quantity], tmp_path: Path) -> None:
    save_state(tmp_path, searched, known, IDENTITY)
    restored = load_state(tmp_path, IDENTITY, CPU)
    assert restored is not None
    assert (restored.seed, restored.generation) == (searched.seed, searched.generation)
    for name in ("genome_VG", "origin_V", "generation_V", "parent_V2", "correct", "loss", "images"):
        before, after = getattr(searched, name), getattr(restored, name)
        assert before.dtype == after.dtype
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_every_candidate_is_a_row_with_its_costs(
    searched: SearchState, known: dict[str, Quantity], tmp_path: Path
) -> None:
    save_state(tmp_path, searched, known, IDENTITY)
    with (tmp_path / "candidates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [[int(choice) for choice in row["genome"].split()] for row in rows] == searched.genome_VG.tolist()
    assert [int(row["macs"]) for row in rows] == COSTS.macs(searched.genome_VG).tolist()
    assert [int(row["parameters"]) for row in rows] == COSTS.parameters(searched.genome_VG).tolist()
    assert [float(row["latency_ms"]) for row in rows] == (searched.genome_VG.sum(1) / 8).tolist()
    assert [int(row["images"]) for row in rows] == searched.images.tolist()
    parents = [[int(parent) for parent in row["parents"].split()] for row in rows]
    assert [len(of) for of in parents] == [{"random": 0, "mutation": 1, "crossover": 2}[row["origin"]] for row in rows]
    assert all(0 <= parent < 6 for of in parents for parent in of)
    assert {row["origin"] for row in rows[6:]} <= {"mutation", "crossover", "random"}
    assert {row["origin"] for row in rows[:6]} == {"random"}


def test_a_search_that_never_finished_a_generation_has_no_state(tmp_path: Path) -> None:
    assert load_state(tmp_path, IDENTITY, CPU) is None


@pytest.mark.parametrize("name", list(IDENTITY))
def test_a_state_of_something_else_is_refused(
    name: str, searched: SearchState, known: dict[str, Quantity], tmp_path: Path
) -> None:
    save_state(tmp_path, searched, known, IDENTITY)
    with pytest.raises(UserError, match=f"another {name}"):
        load_state(tmp_path, {**IDENTITY, name: "other"}, CPU)


def test_a_changed_or_cut_state_is_refused(searched: SearchState, known: dict[str, Quantity], tmp_path: Path) -> None:
    save_state(tmp_path, searched, known, IDENTITY)
    path = tmp_path / "state.json"
    content = json.loads(path.read_text())
    content["correct"][0] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        load_state(tmp_path, IDENTITY, CPU)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="not valid JSON"):
        load_state(tmp_path, IDENTITY, CPU)
