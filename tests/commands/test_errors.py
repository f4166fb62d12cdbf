"""Bad input gives one line that says what is legal, exit status 2, and touches nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from small_runs import ErrorLine, run, start

BAD_METATRAIN = {
    "an unknown architecture": (("--architecture", "vgg"), "mobilenet_v1, mobilenet_v2, resnet50"),
    "an unknown option": (("--epoch-count", "3"), "--epoch-count"),
    "a word for a number": (("--steps", "many"), "--steps"),
    "no epochs": (("--epochs", "0"), "at least 1"),
    "no steps": (("--steps", "0"), "at least 1"),
    "epochs and steps": (("--epochs", "1", "--steps", "1"), "give one of them"),
    "a batch of one": (("--batch", "1"), "at least 2"),
    "a negative learning rate": (("--lr", "-1"), "a number from 0"),
    "a learning rate that is no number": (("--lr", "nan"), "a number from 0"),
    "endless weight decay": (("--weight-decay", "inf"), "a number from 0"),
    "a negative interval": (("--checkpoint-minutes", "-1"), "a number from 0"),
    "no structures": (("--structures", "0"), "at least 1"),
    "more structures than images": (("--structures", "33", "--batch", "64"), "two images"),
    "a batch that does not split": (("--structures", "3", "--batch", "64"), "evenly"),
    "a sandwich of two": (("--sandwich", "--structures", "2"), "at least 3"),
    "distillation without a sandwich": (("--distill",), "needs --sandwich"),
    "an unknown sampling": (("--sampling", "latency"), "macs"),
    "an average of nothing but the last weights": (("--ema", "0"), "between 0 and 1"),
    "an average of the first weights": (("--ema", "1"), "between 0 and 1"),
    "a decay that is no number": (("--ema", "nan"), "between 0 and 1"),
    "unknown weights": (("--weights", "random"), "shared"),
    "a hidden size of shared weights": (("--weights", "shared", "--hidden", "2"), "no weight is generated"),
    "no hidden units": (("--hidden", "0"), "at least 1"),
    "no calibration": (("--calibration-images", "0"), "at least 1"),
    "a negative seed": (("--seed", "-1"), "at least 0"),
    "an unknown device": (("--device", "tpu"), "auto, cpu or cuda"),
    "an unknown update": (("--update", "later"), "immediate or delayed"),
    "an unknown backend": (("--backend", "fast"), "reference"),
    "data that is not there": (("--data", "/nowhere"), "digits"),
    "images too small for the strides": (("--resolution", "31"), "at least 32"),
    "nothing to resume": (("--resume",), "nothing to resume"),
    "resume and overwrite": (("--resume", "--overwrite"), "contradict"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD_METATRAIN.values(), ids=BAD_METATRAIN)
def test_metatrain_refuses_in_one_line_and_writes_nothing(
    arguments: tuple[str, ...], says: str, tmp_path: Path, error_line: ErrorLine
) -> None:
    assert run("metatrain", "--out", tmp_path / "run", *arguments) == 2
    assert says in error_line()
    assert not (tmp_path / "run").exists()


BAD_EVOLVE = {
    "a budget below the least": (("--flops", "1M"), "12.496M to 567.727M"),
    "a budget above the greatest": (("--flops", "5T"), "12.496M to 567.727M"),
    "a budget that is no number": (("--flops", "abc"), "300M, 1.2G or 50%"),
    "no budget": ((), "--flops"),
    "an unknown convention": (("--flops", "300M", "--flops-convention", "adds"), "metapruning"),
    "a tiny resolution": (("--flops", "300M", "--flops-resolution", "16"), "at least 32"),
    "no population": (("--flops", "300M", "--population", "0"), "at least 1"),
    "no parents": (("--flops", "300M", "--parents", "0"), "at least 1"),
    "negative mutants": (("--flops", "300M", "--mutants", "-1"), "at least 0"),
    "negative crossovers": (("--flops", "300M", "--crossovers", "-1"), "at least 0"),
    "more offspring than population": (("--flops", "300M", "--population", "10"), "exceed"),
    "a probability above one": (("--flops", "300M", "--mutation-probability", "1.5"), "from 0 to 1"),
    "no generations": (("--flops", "300M", "--generations", "0"), "at least 1"),
    "memory that is no amount": (("--flops", "300M", "--memory", "lots"), "2G or 500M"),
    "an unknown precision": (("--flops", "300M", "--precision", "fp8"), "bf16"),
    "no calibration": (("--flops", "300M", "--calibration-images", "0"), "at least 1"),
    "a negative seed": (("--flops", "300M", "--seed", "-1"), "at least 0"),
    "nothing to resume": (("--flops", "300M", "--resume"), "nothing to resume"),
    "an unknown device": (("--flops", "300M", "--device", "tpu"), "auto, cpu or cuda"),
    "an unknown backend": (("--flops", "300M", "--backend", "fast"), "reference"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD_EVOLVE.values(), ids=BAD_EVOLVE)
def test_evolve_refuses_in_one_line_and_touches_nothing(
    arguments: tuple[str, ...], says: str, trained: Path, tmp_path: Path, error_line: ErrorLine
) -> None:
    before = _content(trained)
    assert run("evolve", "--run", trained, "--out", tmp_path / "search", *arguments) == 2
    assert says in error_line()
    assert not (tmp_path / "search").exists()
    assert _content(trained) == before


BAD_RETRAIN = {
    "nothing to train": ((), "exactly one of"),
    "two things to train": (("--full", "--uniform", "300M"), "exactly one of"),
    "an impossible budget": (("--uniform", "1M"), "12.496M to 567.727M"),
    "a structure that is not there": (("--structure", "/nowhere.json"), "cannot read"),
    "no steps": (("--full", "--steps", "0"), "at least 1"),
    "an unknown device": (("--full", "--device", "tpu"), "auto, cpu or cuda"),
    "a tiny resolution": (("--full", "--flops-resolution", "16"), "at least 32"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD_RETRAIN.values(), ids=BAD_RETRAIN)
def test_retrain_refuses_in_one_line_and_touches_nothing(
    arguments: tuple[str, ...], says: str, trained: Path, tmp_path: Path, error_line: ErrorLine
) -> None:
    before = _content(trained)
    assert run("retrain", "--run", trained, "--out", tmp_path / "net", *arguments) == 2
    assert says in error_line()
    assert not (tmp_path / "net").exists()
    assert _content(trained) == before


@pytest.mark.parametrize("budget", ["1M", "5T", "abc"])
def test_a_real_process_refuses_an_impossible_budget_before_it_reads_images_or_weights(
    budget: str, copied: Path, tmp_path: Path
) -> None:
    (copied / "splits.json").unlink()
    next(copied.glob("checkpoints/*/weights.safetensors")).unlink()
    process = start("evolve", "--flops", budget, "--run", copied, "--out", tmp_path / "search")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(errors.strip().splitlines()) == 1
    assert f"--flops {budget}" in errors
    assert "12.496M to 567.727M" in errors


def test_a_search_without_a_pruningnet_names_the_command_that_makes_one(tmp_path: Path, error_line: ErrorLine) -> None:
    assert run("evolve", "--flops", "300M", "--run", tmp_path / "none") == 2
    assert "python -m engine.metatrain" in error_line()


def test_a_run_is_not_overwritten_unasked(copied: Path, error_line: ErrorLine) -> None:
    before = _content(copied)
    assert run("metatrain", "--out", copied) == 2
    assert "--resume" in error_line()
    assert _content(copied) == before


def test_overwrite_never_empties_a_folder_that_is_no_run(tmp_path: Path, error_line: ErrorLine) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    assert run("metatrain", "--out", tmp_path, "--overwrite") == 2
    assert "no run directory" in error_line()
    assert (tmp_path / "holiday.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize("victim", ["weights.safetensors", "manifest.json"])
def test_a_search_refuses_a_damaged_checkpoint(victim: str, copied: Path, error_line: ErrorLine) -> None:
    path = next(copied.glob(f"checkpoints/*/{victim}"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert run("evolve", "--flops", "300M", "--run", copied) == 2
    assert "step-00000003" in error_line()


def test_a_search_refuses_other_splits_than_the_pruningnet_was_trained_with(
    copied: Path, error_line: ErrorLine
) -> None:
    path = copied / "splits.json"
    splits = json.loads(path.read_text())
    splits["sub_train"], splits["test"] = splits["sub_train"][1:], [*splits["test"], splits["sub_train"][0]]
    path.write_text(json.dumps(splits))
    assert run("evolve", "--flops", "300M", "--run", copied) == 2
    assert "digest" in error_line()


def test_debug_shows_where_an_error_came_from(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("metatrain", "--out", tmp_path / "run", "--epochs", "0", "--debug") == 2
    assert "Traceback" in capfd.readouterr().err


def _content(folder: Path) -> dict[str, str]:
    """Digest of every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
