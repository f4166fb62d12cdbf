"""`engine.evolve`: budgets are kept, and the same seed gives the same bytes, whole or interrupted."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from small_runs import TINY_SEARCH, ErrorLine, run, start

from engine.generation import Generation
from engine.run import search as search_module
from engine.run.search import Search
from engine.space import architecture
from engine.space.costs import cost_model
from engine.space.structure import load_structure
from engine.stages import STAGES
from kernels import backends

LONGER: tuple[str, ...] = (
    "--population",
    "6",
    "--mutants",
    "2",
    "--crossovers",
    "2",
    "--parents",
    "2",
    "--generations",
    "6",
)
LONGER += ("--calibration-images", "32")


def candidates(search: Path) -> list[dict[str, str]]:
    with (search / "candidates.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_structure_a_search_writes_respects_the_budget(copied: Path, tmp_path: Path) -> None:
    assert run("evolve", "--flops", "100M", "--run", copied, "--out", tmp_path / "search", *TINY_SEARCH) == 0
    rows = candidates(tmp_path / "search")
    genomes = torch.tensor([[int(choice) for choice in row["genome"].split()] for row in rows])
    recounted = cost_model(architecture("mobilenet_v1").build(10)).macs(genomes)
    assert len(rows) == 8
    assert [int(row["macs"]) for row in rows] == recounted.tolist()
    assert int(recounted.max()) <= 100_000_000
    best = load_structure(tmp_path / "search/structure.json")
    assert best.score is not None
    assert best.score["correct"] == max(int(row["correct"]) for row in rows)
    assert best.macs <= 100_000_000
    assert load_structure(tmp_path / "search/uniform.json").macs <= 100_000_000


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(copied: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        # Each search starts without the scores of the one before.
        shutil.rmtree(copied / "scores", ignore_errors=True)
        arguments = ("--flops", "300M", "--run", copied, "--out", tmp_path / name, "--seed", seed)
        assert run("evolve", *arguments, *TINY_SEARCH) == 0
    first, second, other = ((tmp_path / name / "candidates.csv").read_bytes() for name in ("first", "second", "other"))
    assert first == second
    assert first != other


def test_killed_after_the_third_generation_and_resumed_a_search_writes_the_same_bytes(
    copied: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("evolve", "--flops", "300M", "--run", copied, "--out", whole, *LONGER) == 0
    shutil.rmtree(copied / "scores")
    arguments = ("--flops", "300M", "--run", copied, "--out", broken, *LONGER)
    process = start("evolve", *arguments)
    while process.poll() is None and _generation(broken) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 3 <= _generation(broken) < 6, "the search ended before it was killed: nothing was tested"
    assert run("evolve", *arguments, "--resume") == 0
    for name in ("candidates.csv", "state.json", "structure.json", "uniform.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_ends_a_search_with_its_scores_kept(copied: Path, tmp_path: Path) -> None:
    process = start("evolve", "--flops", "300M", "--run", copied, "--out", tmp_path / "search", *LONGER)
    while process.poll() is None and _generation(tmp_path / "search") < 1:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    cached = next((copied / "scores").iterdir()).read_text().splitlines()
    assert len(cached) >= len(candidates(tmp_path / "search"))


def test_another_search_takes_known_scores_from_the_cache(
    copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        assert run("evolve", "--flops", "300M", "--run", copied, "--out", tmp_path / name, *TINY_SEARCH) == 0
    assert "(4 from cache)" in capfd.readouterr().err
    assert (tmp_path / "first/candidates.csv").read_bytes() == (tmp_path / "second/candidates.csv").read_bytes()


def test_scores_of_another_calibration_are_not_taken_from_the_cache(copied: Path, tmp_path: Path) -> None:
    shared = ("--flops", "300M", "--run", copied, *TINY_SEARCH)
    assert run("evolve", *shared, "--out", tmp_path / "first") == 0
    assert run("evolve", *shared, "--out", tmp_path / "second", "--calibration-images", "64") == 0
    assert len(list((copied / "scores").iterdir())) == 2
    losses = [[row["loss"] for row in candidates(tmp_path / name)][:4] for name in ("first", "second")]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("other", ["code of the kernels", "instruction set"])
def test_scores_that_may_have_other_bits_are_not_taken_from_the_cache(
    copied: Path, tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = ("--flops", "300M", "--run", copied, *TINY_SEARCH)
    assert run("evolve", *shared, "--out", tmp_path / "first") == 0
    if other == "code of the kernels":
        monkeypatch.setattr(backends, "digest", lambda: "of other code")
    elif backends.extension is None:
        pytest.skip(backends.why_not("generate_weights", "cpu"))
    else:
        monkeypatch.setenv("METAPRUNE_ISA", "portable")
    assert run("evolve", *shared, "--out", tmp_path / "second") == 0
    # Both generations of both searches.
    assert capfd.readouterr().err.count("(0 from cache)") == 4


@pytest.mark.parametrize(
    "option",
    [
        ("--population", "5"), ("--parents", "1"), ("--mutants", "2"), ("--crossovers", "1"), ("--generations", "3"),
        ("--mutation-probability", "0.9"), ("--flops-resolution", "64"), ("--flops-convention", "metapruning"),
        ("--precision", "bf16"),
    ],
    ids=lambda option: option[0],
)  # fmt: skip
def test_an_option_changes_the_search(option: tuple[str, str], copied: Path, tmp_path: Path) -> None:
    shared = ("--flops", "40%", "--run", copied, *TINY_SEARCH)
    assert run("evolve", *shared, "--out", tmp_path / "plain") == 0
    assert run("evolve", *shared, "--out", tmp_path / "changed", *option) == 0
    plain, changed = ((tmp_path / name / "candidates.csv").read_bytes() for name in ("plain", "changed"))
    assert plain != changed


def test_memory_changes_no_byte_of_a_search(copied: Path, tmp_path: Path) -> None:
    for memory in ("1K", "1G"):
        shutil.rmtree(copied / "scores", ignore_errors=True)
        out = tmp_path / memory
        assert run("evolve", "--flops", "300M", "--run", copied, "--out", out, "--memory", memory, *TINY_SEARCH) == 0
    one_by_one, all_at_once = ((tmp_path / memory / "candidates.csv").read_bytes() for memory in ("1K", "1G"))
    assert one_by_one == all_at_once


@pytest.mark.skipif(bool(backends.why_not("fused_block", "cpu")), reason="the C++ kernels were not built")
def test_every_op_of_a_search_has_a_cpp_kernel(copied: Path, tmp_path: Path) -> None:
    shared = ("--flops", "300M", "--run", copied, "--device", "cpu", "--backend", "cpu", *TINY_SEARCH)
    assert run("evolve", *shared, "--out", tmp_path / "search") == 0
    assert len(candidates(tmp_path / "search")) == 8


def test_backends_agree_on_the_scores(copied: Path, tmp_path: Path) -> None:
    shared = ("--flops", "300M", "--run", copied, "--device", "cpu", *TINY_SEARCH)
    assert run("evolve", *shared, "--out", tmp_path / "auto") == 0
    assert run("evolve", *shared, "--out", tmp_path / "reference", "--backend", "reference") == 0
    losses = [[float(row["loss"]) for row in candidates(tmp_path / name)][:4] for name in ("auto", "reference")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_default_output_lies_in_the_run_directory_and_is_not_overwritten_unasked(
    copied: Path, error_line: ErrorLine
) -> None:
    assert run("evolve", "--flops", "50%", "--run", copied, *TINY_SEARCH) == 0
    assert (copied / "search-50pct/structure.json").is_file()
    assert run("evolve", "--flops", "50%", "--run", copied, *TINY_SEARCH) == 2
    assert "--overwrite" in error_line()
    assert run("evolve", "--flops", "50%", "--run", copied, *TINY_SEARCH, "--overwrite") == 0


def test_a_structure_tells_where_it_comes_from(copied: Path) -> None:
    assert run("evolve", "--flops", "300M", "--run", copied, *TINY_SEARCH) == 0
    structure = load_structure(copied / "search-300M/structure.json")
    manifest = json.loads(next(copied.glob("checkpoints/*/manifest.json")).read_text())
    assert structure.pruningnet == manifest["files"]["weights.safetensors"]
    assert structure.splits == manifest["splits"]
    assert structure.preprocessing == manifest["preprocessing"]
    assert structure.score is not None
    assert structure.score["split"] == "sub_validation"
    assert structure.score["calibration_images"] == 32


def test_a_profile_accounts_for_the_time_of_the_generations_and_changes_no_result(
    copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = ("--flops", "300M", "--run", copied, *TINY_SEARCH)
    assert run("evolve", *shared, "--out", tmp_path / "plain") == 0
    assert not (tmp_path / "plain/profile.json").exists()
    shutil.rmtree(copied / "scores")
    assert run("evolve", *shared, "--out", tmp_path / "profiled", "--profile") == 0
    profile = json.loads((tmp_path / "profiled/profile.json").read_text())
    assert (profile["device"], profile["generations"]) == ("cpu", 2)
    assert set(profile["seconds"]) == set(STAGES)
    assert profile["seconds"]["other"] < 0.1 * sum(profile["seconds"].values())
    assert "where the time of 2 generations went" in capfd.readouterr().out
    for name in ("candidates.csv", "state.json", "structure.json"):
        assert (tmp_path / "profiled" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_generations_on_the_device_write_the_same_bytes_and_take_known_scores_from_the_cache(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = ("--flops", "300M", "--run", copied, *LONGER, "--mutants", "3", "--crossovers", "3", "--generations", "3")
    assert run("evolve", *shared, "--out", tmp_path / "host") == 0
    scores = next((copied / "scores").iterdir())
    expected = sorted(scores.read_text().splitlines())
    generations: list[Generation] = []

    def on_device(search: Search) -> Generation:
        scoring = search.scoring
        assert Generation.serves(search.settings, scoring.images)
        generations.append(Generation(scoring.net, scoring.images, scoring.memory, search.settings, search.budget))
        return generations[-1]

    monkeypatch.setattr(search_module, "on_device", on_device)
    for name, steps in (("device", 3), ("again", 0)):
        if steps:
            scores.unlink()
        capfd.readouterr()
        assert run("evolve", *shared, "--out", tmp_path / name, "--profile") == 0
        assert generations[-1].steps == steps
        seconds = json.loads((tmp_path / name / "profile.json").read_text())["seconds"]
        assert ("calibration" in seconds) == bool(steps)
        # A search that finds all its scores takes a hundredth of a second or two: too short to say.
        assert not steps or seconds["other"] < 0.2 * sum(seconds.values())
        assert capfd.readouterr().err.count(f"({0 if steps else 6} from cache)") == 3
        for file in ("candidates.csv", "state.json", "structure.json", "uniform.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "host" / file).read_bytes()
        assert sorted(scores.read_text().splitlines()) == expected


def _generation(search: Path) -> int:
    state = search / "state.json"
    return int(json.loads(state.read_text())["generation"]) if state.exists() else 0
