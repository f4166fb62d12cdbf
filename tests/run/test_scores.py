from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import engine.run.scores
from engine.errors import UserError
from engine.population import Scores
from engine.run.scores import ScoreCache

KEY: dict[str, str | int] = {"pruningnet": "a" * 64, "splits": "b" * 64, "calibration": 1000}
GENOMES = torch.tensor([[1, 2], [3, 4], [5, 6]])


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The genomes that are really scored, two in a pass: genome (a, b) has a correct images and loss b / 7."""
    asked: list[list[int]] = []

    def score_passes(net: Any, genome_PG: Tensor, images: Any, memory: int | None) -> Iterator[tuple[Tensor, Scores]]:
        for members in torch.arange(len(genome_PG)).split(2):
            asked.extend(genome_PG[members].tolist())
            yield members, Scores(genome_PG[members, 0], genome_PG[members, 1].double() / 7, 10)

    monkeypatch.setattr(engine.run.scores, "score_passes", score_passes)
    return asked


def fill(cache: ScoreCache, genome_PG: Tensor = GENOMES) -> list[int]:
    net: Any = None
    return list(cache.score_missing(net, genome_PG, net))


def file_of(run: Path) -> Path:
    return ScoreCache(run, KEY).path


def test_a_genome_is_scored_once_and_remembered_by_the_next_search(tmp_path: Path, scored: list[list[int]]) -> None:
    assert fill(ScoreCache(tmp_path, KEY), GENOMES) == [2, 1]
    later = ScoreCache(tmp_path, KEY)
    assert fill(later, torch.tensor([[3, 4], [7, 8], [1, 2]])) == [1]
    assert fill(later, GENOMES) == []
    assert scored == [[1, 2], [3, 4], [5, 6], [7, 8]]
    correct, loss = later.lookup(torch.tensor([[7, 8], [1, 2]]))
    assert correct.tolist() == [7, 1]
    assert torch.equal(loss, torch.tensor([8.0, 2.0], dtype=torch.float64) / 7)


@given(st.lists(st.floats(), min_size=1))
def test_a_loss_is_remembered_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, losses: list[float]) -> None:
    run = tmp_path_factory.mktemp("run")
    genome_PG = torch.arange(len(losses))[:, None]
    loss = torch.tensor(losses, dtype=torch.float64)

    def score_passes(*_: Any) -> Iterator[tuple[Tensor, Scores]]:
        yield torch.arange(len(losses)), Scores(genome_PG[:, 0], loss, 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.run.scores, "score_passes", score_passes)
        fill(ScoreCache(run, KEY), genome_PG)
    torch.testing.assert_close(ScoreCache(run, KEY).lookup(genome_PG)[1], loss, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", KEY)
def test_scores_of_another_pruningnet_split_or_calibration_are_not_taken(
    tmp_path: Path, scored: list[list[int]], name: str
) -> None:
    fill(ScoreCache(tmp_path, KEY))
    other = ScoreCache(tmp_path, {**KEY, name: "another"})
    assert other.scores == {}
    assert other.path != file_of(tmp_path)


def test_passes_that_were_finished_before_an_interruption_are_kept(tmp_path: Path, scored: list[list[int]]) -> None:
    cache = ScoreCache(tmp_path, KEY)
    net: Any = None
    next(cache.score_missing(net, GENOMES, net))  # and then the process ends
    assert set(ScoreCache(tmp_path, KEY).scores) == {(1, 2), (3, 4)}


@pytest.mark.parametrize("cut", range(1, 50))
def test_a_line_torn_by_a_crash_is_dropped_and_scored_anew(tmp_path: Path, scored: list[list[int]], cut: int) -> None:
    fill(ScoreCache(tmp_path, KEY))
    path = file_of(tmp_path)
    whole = path.read_bytes()
    last_line = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -min(cut, len(last_line))])
    cache = ScoreCache(tmp_path, KEY)
    assert set(cache.scores) == {(1, 2), (3, 4)}
    assert fill(cache) == [1]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"7",
        b"null",
        b"\xff",
        b'{"genome": [1, 2], "correct": 1',
        b'{"genome": 1, "correct": 1, "loss": 1}',
        b'{"genome": [[1]], "correct": 1, "loss": 1}',
        b'{"genome": [1], "correct": "many", "loss": 1}',
        b'{"genome": [1], "correct": Infinity, "loss": 1}',
        b'{"genome": [1], "correct": 1, "loss": null}',
        b'{"genome": [1], "correct": 1, "loss": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
    ],
    ids=lambda line: repr(line)[:30],
)
def test_a_damaged_line_in_the_middle_is_refused_by_its_number(
    tmp_path: Path, scored: list[list[int]], line: bytes
) -> None:
    fill(ScoreCache(tmp_path, KEY))
    path = file_of(tmp_path)
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, third, b""]))
    with pytest.raises(UserError, match=f"^{path}, line 2 is damaged: delete the file to score anew$"):
        ScoreCache(tmp_path, KEY)
