"""`engine.metatrain` with other recipes than the paper's: each is what it says, is kept, and can be continued."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from small_runs import TINY_NET, TINY_SEARCH, ErrorLine, run

from engine.files import sha256_file
from engine.population import score, scoring_images
from engine.run.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from engine.run.opened import open_run

CPU = torch.device("cpu")
SANDWICH = ("--sandwich", "--structures", "3")


def last_checkpoint(run_folder: Path) -> Checkpoint:
    checkpoint = load_checkpoint(run_folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize(
    "recipe",
    [SANDWICH, (*SANDWICH, "--distill"), ("--sampling", "macs")],
    ids=" ".join,
)
def test_every_recipe_learns_something_else_and_the_run_says_which(
    recipe: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert run("metatrain", "--out", out, *TINY_NET, *recipe) == 0
    assert last_checkpoint(out).digest("weights") != last_checkpoint(trained).digest("weights")
    options = tomllib.loads((out / "config.toml").read_text())["options"]
    assert options["sandwich"] == ("--sandwich" in recipe)
    assert options["distill"] == ("--distill" in recipe)
    assert options["sampling"] == ("macs" if "macs" in recipe else "widths")


@pytest.mark.parametrize(
    "recipe", [("--structures", "2"), ("--sandwich",), ("--sampling", "macs"), ("--ema", "0.9")], ids=" ".join
)
def test_resuming_with_another_recipe_is_refused(recipe: tuple[str, ...], copied: Path, error_line: ErrorLine) -> None:
    assert run("metatrain", "--out", copied, "--resume", *recipe) == 2
    assert f"{recipe[0]} " in (line := error_line())
    assert "was started with" in line


def test_a_sandwich_needs_memory_for_all_of_its_structures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine
) -> None:
    monkeypatch.setattr("engine.metatrain.free_memory", lambda _: 10**9)
    needed = []
    for structures in (3, 6):
        arguments = ("--out", tmp_path / "run", "--batch", "512", "--sandwich", "--structures", structures)
        assert run("metatrain", *arguments, "--ema", "0.9") == 2
        line = error_line()
        needed.append(float(line.split("momentum and average, ")[1].split()[0]))
    assert needed[1] == pytest.approx(2 * needed[0], abs=0.15)
    # 12 bytes for each of the 105.1 M parameters that ten classes leave.
    assert "1.3 GB for weights, momentum and average" in line
    assert not (tmp_path / "run").exists()


def test_an_averaged_run_validates_and_keeps_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.run.average.EVERY", 2)
    nets, shown = {}, {}
    for decay in ("0.0001", "0.9"):
        out = tmp_path / decay
        assert run("metatrain", "--out", out, *TINY_NET, "--ema", decay) == 0
        nets[decay] = open_run(out).net(CPU)
        shown[decay] = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["largest"]
    # So fast a decay leaves the weights of the third step; the other takes nine tenths of those of the second.
    last, mean = (nets[decay].classifier.weight for decay in nets)
    assert not torch.equal(last, mean)
    images = scoring_images(open_run(out).data(CPU), 32)
    for decay, net in nets.items():
        scores = score(net, net.space.uniform_choice(30), images)
        assert 100 * int(scores.correct) / len(images.subset) == pytest.approx(shown[decay])


# -- momentum in bfloat16 -------------------------------------------------------------------------------------------


def test_a_momentum_in_bfloat16_takes_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine
) -> None:
    monkeypatch.setattr("engine.metatrain.free_memory", lambda _: 10**9)
    arguments = ("--out", tmp_path / "run", "--architecture", "resnet50", "--momentum", "bfloat16")
    assert run("metatrain", *arguments) == 2
    # 6 bytes for each of the 774.0 M parameters that ten classes leave.
    assert "4.6 GB for weights and momentum" in error_line()


def test_shared_weights_have_no_momentum_to_round(tmp_path: Path, error_line: ErrorLine) -> None:
    assert run("metatrain", "--out", tmp_path / "run", "--weights", "shared", "--momentum", "bfloat16") == 2
    assert "--momentum bfloat16" in error_line()
    assert not (tmp_path / "run").exists()


# -- shared weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "run"
    assert run("metatrain", "--out", out, "--weights", "shared", "--steps", "3", "--calibration-images", "32") == 0
    return out


def test_shared_weights_are_trained_searched_with_and_retrained_from_like_generated_ones(
    shared: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(shared, tmp_path / "run")
    assert run("evolve", "--run", copy, "--flops", "50%", *TINY_SEARCH) == 0
    structure = copy / "search-50pct/structure.json"
    assert run("retrain", "--run", copy, "--structure", structure, "--steps", "2") == 0
    config = tomllib.loads((shared / "config.toml").read_text())
    assert config["options"]["weights"] == "shared"
    assert last_checkpoint(shared).manifest["hidden"] == 0
    weights = last_checkpoint(shared).tensors("weights")
    # One weight for each of MobileNetV1's convolutions and classifiers: 3.2 M, and no hypernetwork.
    assert sum(tensor.numel() for tensor in weights.values()) == pytest.approx(3.19e6, rel=0.01)
    assert not any(tensor.numel() for name, tensor in weights.items() if "basis" in name or "fc1" in name)


def test_a_run_whose_checkpoint_is_of_other_weights_than_it_says_is_refused(
    shared: Path, tmp_path: Path, error_line: ErrorLine
) -> None:
    copy = shutil.copytree(shared, tmp_path / "run")
    last = last_checkpoint(copy)
    files = {"weights": last.tensors("weights")}
    manifest = {name: value for name, value in last.manifest.items() if name not in ("schema", "step", "files")}
    save_checkpoint(copy / "checkpoints", last.step, files, {**manifest, "hidden": 2})
    assert run("evolve", "--run", copy, "--flops", "50%", *TINY_SEARCH) == 2
    assert "does not fit this network" in error_line()
    (copy / "config.toml").write_text((copy / "config.toml").read_text().replace('"shared"', '"generated"'))
    before = sha256_file(copy / "config.toml")
    assert run("metatrain", "--out", copy, "--resume") == 2
    assert "another hidden" in error_line()
    assert sha256_file(copy / "config.toml") == before
