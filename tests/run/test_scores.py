from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import UserError
from engine.population import Scores
from engine.racing import Race
from engine.run.scores import ScoreCache

KEY: dict[str, str | int] = {"pruningnet": "a" * 64, "splits": "b" * 64, "calibration": 1000}
GENOMES = torch.tensor([[1, 2], [3, 4], [5, 6]])
IMAGES = 10
RACE = Race(torch.ones(IMAGES, dtype=torch.bool), 0.95)


def scores_of(genome_PG: Tensor, seen: int = IMAGES) -> Scores:
    """Genome (a, b) is right about the first a images and has a loss of b / 7 on each it has seen."""
    image_N = torch.arange(IMAGES).expand(len(genome_PG), -1)
    loss_PN = (genome_PG[:, 1:].double() / 7).expand(-1, IMAGES)
    return Scores(image_N < genome_PG[:, :1], loss_PN, image_N < seen)


class Scored:
    """A scorer, two genomes in a pass, that remembers what it was asked; a race stops whoever has b = 6."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, genome_PG: Tensor, race: Race | None) -> Iterator[tuple[Tensor, Scores]]:
        for members in torch.arange(len(genome_PG)).split(2):
            self.asked.extend(genome_PG[members].tolist())
            stopped = race is not None and bool((genome_PG[members, 1] == 6).any())
            yield members, scores_of(genome_PG[members], 3 if stopped else IMAGES)


@pytest.fixture
def scored() -> Scored:
    return Scored()


def cache_in(run: Path, key: dict[str, str | int] = KEY, images: int = IMAGES) -> ScoreCache:
    return ScoreCache(run, key, images)


def fill(
    cache: ScoreCache, genome_PG: Tensor = GENOMES, scorer: Scored | None = None, race: Race | None = None
) -> list[int]:
    return list(cache.score_missing(scorer or Scored(), genome_PG, race))


def file_of(run: Path) -> Path:
    return cache_in(run).path


def test_a_genome_is_scored_once_and_remembered_by_the_next_search(tmp_path: Path, scored: Scored) -> None:
    assert fill(cache_in(tmp_path), GENOMES, scored) == [2, 1]
    later = cache_in(tmp_path)
    assert fill(later, torch.tensor([[3, 4], [7, 8], [1, 2]]), scored) == [1]
    assert fill(later, GENOMES, scored) == []
    assert scored.asked == [[1, 2], [3, 4], [5, 6], [7, 8]]
    correct, loss, images = later.lookup(torch.tensor([[7, 8], [1, 2]]))
    assert correct.tolist() == [7, 1]
    assert images.tolist() == [10, 10]
    assert torch.equal(loss, scores_of(torch.tensor([[7, 8], [1, 2]])).loss)
    assert later.right(torch.tensor([7, 8])).tolist() == [True] * 7 + [False] * 3


def test_what_a_race_cut_short_is_known_to_this_search_alone_and_never_passes_for_a_whole_score(
    tmp_path: Path, scored: Scored
) -> None:
    cache = cache_in(tmp_path)
    assert fill(cache, GENOMES, scored, RACE) == [2, 1]
    assert cache.lookup(GENOMES)[2].tolist() == [10, 10, 3]
    assert fill(cache, GENOMES, scored, RACE) == []
    assert set(cache_in(tmp_path).scores) == {(1, 2), (3, 4)}
    assert fill(cache, GENOMES, scored) == [1]
    assert cache.lookup(GENOMES)[2].tolist() == [10, 10, 10]


@given(st.lists(st.floats(), min_size=1))
def test_a_loss_is_remembered_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, losses: list[float]) -> None:
    run = tmp_path_factory.mktemp("run")
    genome_PG = torch.arange(len(losses))[:, None]
    loss = torch.tensor(losses, dtype=torch.float64)

    def scorer(*_: Any) -> Iterator[tuple[Tensor, Scores]]:
        everything = torch.ones(len(losses), 1, dtype=torch.bool)
        yield torch.arange(len(losses)), Scores(everything, loss[:, None], everything)

    list(ScoreCache(run, KEY, 1).score_missing(scorer, genome_PG))
    torch.testing.assert_close(ScoreCache(run, KEY, 1).lookup(genome_PG)[1], loss, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", KEY)
def test_scores_of_another_pruningnet_split_or_calibration_are_not_taken(tmp_path: Path, name: str) -> None:
    fill(cache_in(tmp_path))
    other = cache_in(tmp_path, {**KEY, name: "another"})
    assert other.scores == {}
    assert other.path != file_of(tmp_path)
    assert cache_in(tmp_path, images=11).scores == {}


def test_passes_that_were_finished_before_an_interruption_are_kept(tmp_path: Path, scored: Scored) -> None:
    next(cache_in(tmp_path).score_missing(scored, GENOMES))  # and then the process ends
    assert set(cache_in(tmp_path).scores) == {(1, 2), (3, 4)}


@pytest.mark.parametrize("cut", range(1, 50))
def test_a_line_torn_by_a_crash_is_dropped_and_scored_anew(tmp_path: Path, cut: int) -> None:
    fill(cache_in(tmp_path))
    path = file_of(tmp_path)
    whole = path.read_bytes()
    last_line = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -min(cut, len(last_line))])
    cache = cache_in(tmp_path)
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
        b'{"genome": [1, 2], "correct": 1, "right": "gAA="',
        b'{"genome": 1, "correct": 1, "loss": 1, "right": "gAA="}',
        b'{"genome": [[1]], "correct": 1, "loss": 1, "right": "gAA="}',
        b'{"genome": [1], "correct": "many", "loss": 1, "right": "gAA="}',
        b'{"genome": [1], "correct": Infinity, "loss": 1, "right": "gAA="}',
        b'{"genome": [1], "correct": 1, "loss": null, "right": "gAA="}',
        b'{"genome": [1], "correct": 1, "loss": ' + b"1" * 5000 + b', "right": "gAA="}',
        # Right about two images, or about none of as many as there are, or no bits at all.
        b'{"genome": [1], "correct": 1, "loss": 1, "right": "wAA="}',
        b'{"genome": [1], "correct": 1, "loss": 1, "right": "gA=="}',
        b'{"genome": [1], "correct": 1, "loss": 1, "right": "?"}',
        b'{"genome": [1], "correct": 1, "loss": 1}',
        b"[" * 100_000,
    ],
    ids=lambda line: repr(line)[:30],
)
def test_a_damaged_line_in_the_middle_is_refused_by_its_number(tmp_path: Path, line: bytes) -> None:
    fill(cache_in(tmp_path))
    path = file_of(tmp_path)
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, third, b""]))
    with pytest.raises(UserError, match=f"^{path}, line 2 is damaged: delete the file to score anew$"):
        cache_in(tmp_path)
