"""The demo runs the commands a user would, and a PruningNet really learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import TINY_NET, TINY_SEARCH, run

from engine import demo
from engine.run.command import run_command


def test_the_demo_ends_with_a_table_and_a_winner_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "METATRAIN", TINY_NET)
    monkeypatch.setattr(demo, "EVOLVE", TINY_SEARCH)
    monkeypatch.setattr(demo, "RETRAIN", ("--steps", "2", "--batch", "8"))
    for _ in range(2):  # The second demo replaces the first.
        assert run_command(demo.main, demo.Demo, ["--out", str(tmp_path / "demo")]) == 0
        text = capfd.readouterr().out
        assert "$ python -m engine.evolve --flops 300M" in text
        assert "test accuracy" in text
        result = json.loads((tmp_path / "demo/search-300M/retrained/result.json").read_text())
        assert result["macs"] <= 300_000_000
    monkeypatch.setattr(demo, "EVOLVE", ("--population", "0"))
    with pytest.raises(SystemExit, match="2"):
        run_command(demo.main, demo.Demo, ["--out", str(tmp_path / "demo")])


def test_a_pruningnet_learns_to_recognise_digits(tmp_path: Path) -> None:
    # 200 of the demo's 480 steps: 75 % at chance 10 %; the bar leaves room for other kernels and rounding.
    assert run("metatrain", "--out", tmp_path / "run", "--steps", "200", "--calibration-images", "500") == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["middle"] >= 55
