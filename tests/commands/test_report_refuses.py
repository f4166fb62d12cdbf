"""`engine.report` refuses what is damaged, foreign or not its own, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from search_files import COSTS, structure, winner, write_report, write_run, write_search, write_training
from small_runs import ErrorLine


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A finished search in a run."""
    write_search(write_run(tmp_path / "run") / "search-300M")
    return tmp_path / "run/search-300M"


def test_what_exists_is_not_overwritten_unasked(search: Path, error_line: ErrorLine) -> None:
    assert write_report(search) == 0
    before = (search / "report.html").read_bytes()
    assert write_report(search) == 2
    assert "--overwrite" in error_line()
    assert (search / "report.html").read_bytes() == before


def test_what_is_no_report_is_not_overwritten_even_if_asked(search: Path, error_line: ErrorLine) -> None:
    before = (search / "structure.json").read_bytes()
    assert write_report(search, "--out", search / "structure.json", "--overwrite") == 2
    assert "is no report" in error_line()
    assert (search / "structure.json").read_bytes() == before


def _edit(name: str, before: str, after: str) -> object:
    return pytest.param(name, lambda text: text.replace(before, after, 1), id=f"{name}: {before!r} to {after!r}")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        _edit("candidates.csv", "generation,", "generations,"),
        _edit("candidates.csv", "0,random,,180", "0,random,,181.5"),
        _edit("candidates.csv", "0,random,,180", "0,random,,-1"),
        _edit("candidates.csv", "0,random,,180", "0,random,,361"),
        _edit("candidates.csv", "0,random,,180", "0,random,0,180"),
        _edit("candidates.csv", "0,random,,180", "0,wish,,180"),
        _edit("candidates.csv", "0,random,,180", "1,random,,180"),
        _edit("candidates.csv", "1,mutation,1,", "1,mutation,17,"),
        _edit("candidates.csv", "1,mutation,1,", "1,mutation,,"),
        _edit("candidates.csv", ",360,2.0,", ",360,2.0,9"),
        _edit("candidates.csv", ",360,2.0,", f",{10**30},2.0,"),
        _edit("candidates.csv", ",360,", ',"360,'),
        _edit("state.json", '"seed": 0', '"seed": 1'),
        _edit("state.json", "{", "["),
        _edit("config.toml", "[resolved.budget.flops]", "[resolved.budget.taste]"),
        _edit("config.toml", "high = 300000000", "high = nan"),
        _edit("config.toml", "[options]", "[wishes]"),
        _edit("config.toml", "abab", "cdcd"),
        _edit("structure.json", '"macs":', '"mac":'),
        _edit("front.csv", "001.json", "../../001.json"),
        pytest.param("candidates.csv", lambda text: text[: len(text) // 2], id="candidates.csv: cut in half"),
        pytest.param("candidates.csv", lambda text: "", id="candidates.csv: empty"),
        pytest.param("candidates.csv", lambda text: text.splitlines()[0], id="candidates.csv: only its header"),
        pytest.param("candidates.csv", lambda text: text + "\udcff", id="candidates.csv: bytes that are no text"),
    ],
)
def test_damaged_files_are_refused(
    name: str, damage: Callable[[str], str], tmp_path: Path, error_line: ErrorLine
) -> None:
    folder = tmp_path / "search"
    write_search(folder, front=True)
    text = (folder / name).read_text()
    damaged = damage(text)
    assert damaged != text
    (folder / name).write_text(damaged, errors="surrogateescape")
    assert write_report(folder) == 2
    assert name in error_line()
    assert not (folder / "report.html").exists()


def test_a_structure_of_another_search_is_refused(search: Path, error_line: ErrorLine) -> None:
    structure(" ".join(["3"] * len(COSTS.space.genes)), 1).save(search / "structure.json")
    assert write_report(search) == 2
    assert "not among the candidates" in error_line()


def test_a_structure_with_another_score_than_its_candidate_is_refused(search: Path, error_line: ErrorLine) -> None:
    best = winner(write_search(search.parent / "again"))
    structure(best["genome"], best["correct"] + 1).save(search / "structure.json")
    assert write_report(search) == 2
    assert "another score" in error_line()


def test_a_result_of_another_structure_is_refused(search: Path, error_line: ErrorLine) -> None:
    other = structure(" ".join(["3"] * len(COSTS.space.genes)), None)
    write_training(search / "retrained", other, 340)
    structure(" ".join(["4"] * len(COSTS.space.genes)), None).save(search / "retrained/structure.json")
    assert write_report(search) == 2
    assert "result.json" in error_line()


@pytest.mark.parametrize("what", ["nothing", "run"])
def test_a_folder_without_a_search_is_refused(what: str, tmp_path: Path, error_line: ErrorLine) -> None:
    write_run(tmp_path / "run")
    assert write_report(tmp_path / what) == 2
    assert "no finished search" in error_line()
