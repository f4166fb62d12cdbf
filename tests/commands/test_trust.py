"""`engine.trust`: every training is kept, interrupted or not, and the report says what the accuracies say."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY_NET, TINY_SEARCH, ErrorLine, run, start

from engine.run.searched import load_search
from engine.run.subjects import random_genomes, spread
from engine.space.structure import load_structure

TINY_TRUST = ("--structures", "2", "--seeds", "2", "--steps", "2", "--batch", "8")


@pytest.fixture(scope="module")
def searched(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a finished search. Only to be read."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    shutil.copytree(trained, folder)
    assert run("evolve", "--flops", "300M", "--run", folder, *TINY_SEARCH) == 0
    return folder


@pytest.fixture
def search(searched: Path, tmp_path: Path) -> Path:
    """A copy of it to work in, or to damage."""
    shutil.copytree(searched, tmp_path / "run")
    return tmp_path / "run/search-300M"


def report_of(search: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((search / "trust/trust.json").read_text())
    return content


def test_a_report_compares_scores_with_accuracies(search: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("trust", "--search", search, *TINY_TRUST) == 0
    report = report_of(search)
    rows = {role: row for row in report["structures"] for role in row["roles"]}
    assert {"chosen", "median", "uniform", "random-search"} == set(rows)
    best = load_structure(search / "structure.json")
    assert best.score is not None
    assert rows["chosen"]["genome"] == list(best.genome)
    assert rows["chosen"]["search_score"] == best.score["correct"] / best.score["images"]
    for row in report["structures"]:
        assert row["accuracy"] == pytest.approx(sum(row["accuracies"]) / 2)
        assert row["macs"] <= 300_000_000
        for seed, accuracy in enumerate(row["accuracies"]):
            result = json.loads((search / "trust" / row["roles"][0] / f"seed-{seed}/result.json").read_text())
            assert result["test_accuracy"] == accuracy
            assert result["right"].count("1") == result["test_correct"]
    accuracies = [row["accuracy"] for row in report["structures"]]
    assert report["regret"]["value"] == pytest.approx(max(accuracies) - rows["chosen"]["accuracy"])
    gain = report["chosen_minus"]["random-search"]
    assert gain["value"] == pytest.approx(rows["chosen"]["accuracy"] - rows["random-search"]["accuracy"])
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert report["test"]["images"] == report["test"]["originals"] == 360
    assert not list(search.glob("trust/*/*/checkpoints"))

    shown = " ".join(capfd.readouterr().out.split())
    assert "360 test images: the standard error is" in shown
    with (search / "trust/trust.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in table] == accuracies


def test_killed_and_resumed_it_writes_the_same_bytes(search: Path) -> None:
    arguments = ("--search", search, *TINY_TRUST)
    assert run("trust", *arguments, "--out", search / "whole") == 0
    process = start("trust", *arguments, "--out", search / "broken")
    while process.poll() is None and len(list(search.glob("broken/*/*/result.json"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (search / "broken/trust.json").exists(), "it ended before it was killed: nothing was tested"
    kept = {path: path.stat().st_mtime_ns for path in search.glob("broken/*/*/result.json")}
    assert run("trust", *arguments, "--out", search / "broken", "--resume") == 0
    for name in ("trust.json", "trust.csv"):
        assert (search / "broken" / name).read_bytes() == (search / "whole" / name).read_bytes()
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())


def test_a_signal_ends_it_with_its_work_kept(search: Path) -> None:
    process = start("trust", "--search", search, *TINY_TRUST, "--steps", "2000")
    while process.poll() is None and not list(search.glob("trust/*/*/metrics.jsonl")):
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume goes on" in complaint
    assert list(search.glob("trust/chosen/seed-0/checkpoints/step-*"))


def test_one_seed_gives_values_without_intervals(search: Path) -> None:
    arguments = ("--structures", "1", "--seeds", "1", "--steps", "1", "--batch", "8", "--seed", "5")
    assert run("trust", "--search", search, *arguments) == 0
    report = report_of(search)
    assert report["regret"]["value"] is not None
    assert report["regret"]["low"] is None
    assert report["structures"][0]["half_width"] is None
    assert (search / "trust/chosen/seed-5/result.json").is_file()


def test_random_search_costs_as_much_and_keeps_the_budget(searched: Path) -> None:
    found = load_search(searched / "search-300M")
    genomes = random_genomes(found, 0)
    assert len({tuple(row) for row in genomes.tolist()}) == len(genomes) == len(found.candidates) == 8
    assert int(found.costs.macs(genomes).max()) <= 300_000_000
    assert torch.equal(genomes, random_genomes(found, 0))
    assert not torch.equal(genomes, random_genomes(found, 1))


def test_random_search_fills_a_budget_that_random_structures_hardly_meet(copied: Path) -> None:
    assert run("evolve", "--flops", "20M", "--run", copied, *TINY_SEARCH) == 0
    found = load_search(copied / "search-20M")
    genomes = random_genomes(found, 0)
    assert len(genomes) == len(found.candidates)
    assert int(found.costs.macs(genomes).max()) <= 20_000_000


def test_structures_are_spread_over_the_scores_and_none_is_picked_twice(searched: Path) -> None:
    found = load_search(searched / "search-300M")
    picked = spread(found, 20, 0)
    assert sorted(picked) == [row for row in range(8) if row != found.row]
    assert len(spread(found, 3, 0)) == 3


def test_candidates_that_a_race_stopped_are_not_picked(search: Path) -> None:
    path = search / "candidates.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    best = " ".join(map(str, load_structure(search / "structure.json").genome))
    stopped = [row for row in rows if row["genome"] != best][:5]
    for row in stopped:
        row["images"], row["correct"] = "100", "0"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    found = load_search(search)
    assert len(found.candidates) == 8
    assert len(spread(found, 8, 0)) == 2


def test_a_folder_without_a_finished_search_is_refused(search: Path, error_line: ErrorLine) -> None:
    assert run("trust", "--search", search.parent / "nowhere") == 2
    assert "there is no search in" in error_line()
    (search / "structure.json").unlink()
    assert run("trust", "--search", search, *TINY_TRUST) == 2
    assert "is not finished" in error_line()
    assert not (search / "trust").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [("correct,images", "right,images"), ("random,", "random"), (",360,", ",0,"), (",360,", ",x,")],
    ids=["no column", "shifted", "no images", "no number"],
)
def test_a_damaged_table_is_refused(search: Path, error_line: ErrorLine, old: str, new: str) -> None:
    path = search / "candidates.csv"
    path.write_text(path.read_text().replace(old, new))
    assert run("trust", "--search", search, *TINY_TRUST) == 2
    assert "candidates.csv" in error_line()
    assert not (search / "trust").exists()


def test_another_pruningnet_is_refused(search: Path, trained: Path, tmp_path: Path, error_line: ErrorLine) -> None:
    assert run("metatrain", "--out", tmp_path / "other", *TINY_NET, "--seed", "9") == 0
    assert run("trust", "--search", search, "--run", tmp_path / "other", *TINY_TRUST) == 2
    assert "another PruningNet" in error_line()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--structures", "0"), "--structures 0: at least 1"),
        (("--seeds", "0"), "--seeds 0: at least 1"),
        (("--steps", "1", "--epochs", "1"), "give one of them"),
        (("--resume",), "nothing to resume"),
        (("--device", "tpu"), "choose auto, cpu or cuda"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    search: Path, error_line: ErrorLine, arguments: tuple[str, ...], said: str
) -> None:
    assert run("trust", "--search", search, *arguments) == 2
    assert said in error_line()
    assert not (search / "trust").exists()


def test_a_finished_report_is_not_overwritten_unasked_and_a_changed_search_not_resumed(
    search: Path, error_line: ErrorLine
) -> None:
    arguments = ("--search", search, "--structures", "1", "--seeds", "1", "--steps", "1", "--batch", "8")
    assert run("trust", *arguments) == 0
    assert run("trust", *arguments) == 2
    assert "--overwrite" in error_line()
    result = search / "trust/chosen/seed-0/result.json"
    written = result.read_text()
    result.write_text(written.replace('"seed": 0', '"seed": 1'))
    assert run("trust", *arguments, "--resume") == 2
    assert "damaged" in error_line()
    result.write_text(written)
    assert run("trust", *arguments, "--resume") == 0
    with (search / "candidates.csv").open("a") as file:
        file.write((search / "candidates.csv").read_text().splitlines()[-1] + "\n")
    assert run("trust", *arguments, "--resume") == 2
    assert "another candidates" in error_line()
    assert run("trust", *arguments, "--overwrite") == 0
