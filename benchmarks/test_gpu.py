"""`gpu.py` without a GPU: what it refuses, what it makes of commands that end as they like, and its cases on a CPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import torch
from gpu import NO_GPU, Outcome, Part, figures_of, parts, run, table, write_record
from gpu_cases import CASES, Size

TINY = Size(
    torch.device("cpu"), side=48, structures=2, candidates=3, calibration=32, scored=8, truth=8, most_error=10,
    hidden=2, repeats=1, compiles=False, memory=10**8,
)  # fmt: skip
H200 = {"name": "NVIDIA H200 (made up)", "capability": "9.0"}


def part(code: str, seconds: float = 60, measures: bool = False) -> Part:
    return Part("a part", seconds, (sys.executable, "-c", code), measures, {"MADE_UP": "7"})


def test_without_a_gpu_one_line_is_said_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for options in ([], ["--check"]):
        assert gpu.main([*options, "--out", str(tmp_path / "results")]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", NO_GPU + "\n")
    assert not (tmp_path / "results").exists()


def test_a_gpu_that_torch_cannot_use_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch)
    monkeypatch.setattr(gpu, "gpu_of", lambda python: None)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == NO_GPU + "\n"


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nvidia-smi").write_text("#!/bin/sh\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


@pytest.mark.parametrize("options", [["--only", "nothing"], ["--minutes", "0"]])
def test_bad_options_are_refused_with_what_is_legal(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch)
    monkeypatch.setattr(gpu, "gpu_of", lambda python: H200)
    assert gpu.main([*options, "--out", str(tmp_path / "results")]) == 2
    assert "scoring mobilenet_v2, scoring resnet50" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_every_part_keeps_its_time_and_all_of_them_together_are_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch)
    monkeypatch.setattr(gpu, "gpu_of", lambda python: H200)
    passes, fails = part("print('done')"), part("raise ValueError('no')")
    for chosen, status in (([passes], 0), ([passes, fails, passes], 1)):
        monkeypatch.setattr(gpu, "parts", lambda *_, chosen=chosen: chosen)
        assert gpu.main(["--out", str(tmp_path / "results")]) == status
        assert capsys.readouterr().out.count("a part") == len(chosen)
    (record,) = (tmp_path / "results").iterdir()
    assert [outcome["status"] for outcome in json.loads(record.read_text())["parts"]] == ["passed", "failed", "passed"]


def test_a_command_that_passes_says_its_last_line_and_has_the_environment_it_asks_for() -> None:
    outcome = run(part("import os; print(os.environ['MADE_UP'] + ' passed')"), 60)
    assert (outcome.status, outcome.why, outcome.figures) == ("passed", "7 passed", {})


def test_a_command_that_fails_says_why_and_keeps_what_it_had_found() -> None:
    code = "print('{\"x\": 1.5}'); print('noise'); raise ValueError('no such thing')"
    outcome = run(part(code, measures=True), 60)
    assert (outcome.status, outcome.why, outcome.figures) == ("failed", "ValueError: no such thing", {"x": 1.5})


@pytest.mark.parametrize(("own", "left"), [(1.0, 60), (60, 1.0)])
def test_a_command_that_takes_too_long_is_ended_and_keeps_what_it_had_found(own: float, left: float) -> None:
    code = "import time; print('{\"x\": 1.5}', flush=True); time.sleep(60)"
    outcome = run(part(code, own, measures=True), left)
    assert (outcome.status, outcome.why, outcome.figures) == ("out of time", "after 1 s", {"x": 1.5})
    assert outcome.seconds < 30


def test_what_cannot_be_begun_is_skipped_and_said() -> None:
    assert (run(part(""), 0).status, run(part(""), -1).why) == ("skipped", "no time was left")
    (memcheck,) = (each for each in parts("python", None, "9.0") if each.name == "memcheck")
    assert run(memcheck, 60) == Outcome("memcheck", "skipped", why="compute-sanitizer was not found")


def test_every_test_and_case_that_is_named_exists() -> None:
    cases: list[str] = []
    for each in parts("python", "compute-sanitizer", "9.0"):
        cases += each.command[2:] if each.measures else []
        assert all((gpu.ROOT / word).is_file() for word in each.command if word.endswith(".py"))
    assert cases == list(CASES)


def test_the_record_is_named_by_gpu_and_commit_and_the_table_has_a_line_for_all_that_was_found(tmp_path: Path) -> None:
    outcomes = [
        Outcome("build", "passed", 61.5, "done"),
        Outcome("scoring", "failed", 3.0, "AssertionError: off", {"error_over_pytorch": 12.0}),
    ]
    path = write_record(tmp_path / "new", H200, outcomes)
    assert path.name.startswith("nvidia-h200-made-up-")
    record = json.loads(path.read_text())
    assert record["gpu"] == H200
    assert record["parts"][1]["figures"] == {"error_over_pytorch": 12.0}
    lines = table(outcomes).splitlines()
    assert [line.split()[0] for line in lines] == ["build", "scoring", "error_over_pytorch"]
    assert "AssertionError: off" in lines[1]


@pytest.mark.parametrize("name", [name for name in CASES if "resnet50" not in name])
def test_every_case_runs_on_a_cpu_in_a_tiny_size(name: str) -> None:
    figures = dict(CASES[name](TINY))
    assert figures
    assert all(value > 0 for value in figures.values())
    assert figures_of(["noise", json.dumps(figures)]) == figures


def test_nothing_is_timed_where_the_answers_are_wrong() -> None:
    figures = CASES["scoring mobilenet_v2"](replace(TINY, most_error=0))
    assert next(figures)[0] == "error_over_pytorch"
    with pytest.raises(AssertionError, match="the losses are off by"):
        next(figures)
