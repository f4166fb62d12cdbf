"""`engine.inspect` and `engine.doctor` say what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import TINY_SEARCH, run

from engine import doctor, inspect
from engine.run.command import run_command


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run_command(inspect.main, inspect.Inspect, [str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_a_space_is_shown_with_its_range_and_the_size_of_its_pruningnet(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "resnet50")
    assert "20 genes, 53 convolutions" in text
    assert "to 4.089G" in text
    assert "776.1 M parameters" in text


def test_classes_and_resolution_change_the_costs_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "to 569.52" in shown(capsys, "mobilenet_v2")
    assert "to 11.596M" in shown(capsys, "mobilenet_v1", "--classes", "10", "--resolution", "32")


def test_a_structure_and_its_run_are_shown(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evolve", "--flops", "300M", "--run", copied, *TINY_SEARCH) == 0
    capsys.readouterr()
    structure = shown(capsys, copied / "search-300M/structure.json")
    assert "block13.pointwise" in structure
    assert "█" in structure
    assert "on sub_validation" in structure
    run_text = shown(capsys, copied)
    assert "step 3 of 3" in run_text
    assert "search-300M/structure.json" in run_text


@pytest.mark.parametrize("what", ["vgg", "/nowhere/structure.json"])
def test_what_cannot_be_shown_is_refused(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(inspect.main, inspect.Inspect, [what]) == 2
    assert "mobilenet_v1, mobilenet_v2, resnet50" in capsys.readouterr().err


def test_the_doctor_names_every_backend_and_why_one_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(doctor.main, doctor.Doctor, []) == 0
    text = capsys.readouterr().out
    assert "2.1" in text  # torch's version
    for word in ("reference", "cpu", "triton", "cuda", "generate_weights", "C++ kernels"):
        assert word in text
