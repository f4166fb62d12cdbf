"""Time by stages: a clock that is made to tick as the test wants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine import stages

CPU = torch.device("cpu")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which passes when the test says so."""
    now = [100.0]
    monkeypatch.setattr(stages, "perf_counter", lambda: now[0])
    return now


def test_a_stage_within_another_takes_its_time_away_from_it(passes: list[float]) -> None:
    with stages.recorded(CPU) as record:
        passes[0] += 1
        with stages.stage("calibration"):
            passes[0] += 2
            with stages.stage("weights"):
                passes[0] += 4
            passes[0] += 8
        with stages.stage("weights"):
            passes[0] += 16
        seconds = record.seconds()
    assert {name: took for name, took in seconds.items() if took} == {"weights": 20, "calibration": 10, "other": 1}


def test_seconds_asked_for_again_go_on_from_there_and_lose_nothing(passes: list[float]) -> None:
    with stages.recorded(CPU) as record, stages.stage("scoring"):
        passes[0] += 1
        assert record.seconds()["scoring"] == 1
        passes[0] += 2
        assert record.seconds()["scoring"] == 3


def test_what_is_done_with_items_is_not_what_it_took_to_come_by_them(passes: list[float]) -> None:
    def slow() -> Iterator[int]:
        for item in range(3):
            passes[0] += 1
            yield item
        passes[0] += 1

    with stages.recorded(CPU) as record:
        for _ in stages.each("images", slow()):
            passes[0] += 10
        seconds = record.seconds()
    assert (seconds["images"], seconds["other"]) == (4, 30)


def test_a_stage_that_fails_ends(passes: list[float]) -> None:
    with stages.recorded(CPU) as record:
        with pytest.raises(MemoryError), stages.stage("weights"):
            raise MemoryError
        passes[0] += 1
        assert record.seconds()["other"] == 1


def test_nothing_is_recorded_unless_asked_for(passes: list[float]) -> None:
    with stages.recorded(CPU) as record:
        pass
    with stages.stage("weights"):
        passes[0] += 1
    assert record.totals["weights"] == 0
    assert stages.stage("weights") is stages.stage("scoring")
