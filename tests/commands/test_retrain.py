"""`engine.retrain`, and the three commands in a row for every architecture."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import TINY_NET, TINY_SEARCH, ErrorLine, run, start

from engine.files import sha256_file
from engine.space import architecture
from engine.space.budget import quantities
from engine.space.costs import cost_model
from engine.space.structure import load_structure

# What the README shows, ten lines, without this engine; then the check.
LOAD = """
import json, sys, torch
from safetensors.torch import load_file
sys.path.insert(0, sys.argv[1])
from network import PrunedNet
config = json.load(open(sys.argv[1] + "/config.json"))
net = PrunedNet(config["convolutions"], len(config["classes"]))
net.load_state_dict(load_file(sys.argv[1] + "/model.safetensors"))
side = config["preprocessing"]["resolution"]
logits = net.eval()(torch.zeros(2, 3, side, side))
assert logits.shape == (2, len(config["classes"])) and logits.isfinite().all()
assert not any(name.split(".")[0] in ("engine", "kernels") for name in sys.modules)
"""


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
def test_every_architecture_is_metatrained_searched_and_retrained(name: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run("metatrain", "--architecture", name, "--out", out, *TINY_NET, "--hidden", "1") == 0
    assert run("evolve", "--flops", "50%", "--run", out, *TINY_SEARCH) == 0
    found = out / "search-50pct/structure.json"
    assert run("retrain", "--run", out, "--structure", found, "--steps", "3", "--batch", "16") == 0
    result = json.loads((out / "search-50pct/retrained/result.json").read_text())
    structure = load_structure(found)
    assert result["macs"] == structure.macs
    assert result["parameters"] == structure.parameters
    assert result["test_images"] == 360
    assert 0 <= result["test_correct"] <= 360


def test_a_trained_network_loads_without_this_engine(trained: Path, tmp_path: Path) -> None:
    net = tmp_path / "net"
    assert run("retrain", "--run", trained, "--uniform", "50M", "--out", net, "--steps", "2", "--batch", "8") == 0
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", LOAD, str(net)], cwd=tmp_path, env=environment, check=True)


def test_the_baselines_are_the_uniform_and_the_full_network(trained: Path, tmp_path: Path) -> None:
    shared = ("--run", trained, "--steps", "1", "--batch", "8", "--seed", "2", "--lr", "0.01", "--device", "cpu")
    assert run("retrain", *shared, "--uniform", "150M", "--out", tmp_path / "uniform") == 0
    assert run("retrain", *shared, "--full", "--out", tmp_path / "full") == 0
    uniform, full = (load_structure(tmp_path / name / "structure.json") for name in ("uniform", "full"))
    assert set(full.genome) == {30}
    assert max(uniform.genome) - min(uniform.genome) <= 1
    # One step of the ladder of uniform structures is under 2 % of the budget here.
    assert 147_000_000 < uniform.macs <= 150_000_000


def test_macs_are_counted_at_the_resolution_of_deployment(trained: Path, tmp_path: Path) -> None:
    arguments = ("--run", trained, "--uniform", "50%", "--flops-resolution", "64", "--steps", "1", "--batch", "8")
    assert run("retrain", *arguments, "--out", tmp_path / "net") == 0
    result = json.loads((tmp_path / "net/result.json").read_text())
    full = quantities(cost_model(architecture("mobilenet_v1").build(10), 64))["flops"].full
    assert result["macs_resolution"] == 64
    assert 0.48 * full < result["macs"] <= 0.5 * full


def test_a_killed_training_resumes_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    shared = ("--run", trained, "--uniform", "30M", "--steps", "60", "--checkpoint-minutes", "0")
    assert run("retrain", *shared, "--out", tmp_path / "whole") == 0
    process = start("retrain", *shared, "--out", tmp_path / "broken")
    while process.poll() is None and not list((tmp_path / "broken").glob("checkpoints/step-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "broken/result.json").exists()
    assert run("retrain", *shared, "--out", tmp_path / "broken", "--resume") == 0
    whole, broken = (sha256_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert whole == broken


def test_the_test_images_are_never_trained_on(trained: Path, tmp_path: Path) -> None:
    splits = json.loads((trained / "splits.json").read_text())
    arguments = ("--run", trained, "--uniform", "30M", "--batch", "700", "--epochs", "1", "--out", tmp_path / "net")
    assert run("retrain", *arguments) == 0
    trained_on = len(splits["sub_train"]) + len(splits["sub_validation"])
    assert json.loads((tmp_path / "net/result.json").read_text())["steps"] == trained_on // 700
    assert not set(splits["test"]) & {*splits["sub_train"], *splits["sub_validation"]}


def test_a_structure_of_other_splits_is_refused(copied: Path, tmp_path: Path, error_line: ErrorLine) -> None:
    assert run("evolve", "--flops", "300M", "--run", copied, *TINY_SEARCH) == 0
    assert run("metatrain", "--out", tmp_path / "other", *TINY_NET, "--seed", "9") == 0
    found = copied / "search-300M/structure.json"
    assert run("retrain", "--run", tmp_path / "other", "--structure", found) == 2
    assert "--run" in error_line()


def test_more_training_options_reach_the_training(trained: Path, tmp_path: Path) -> None:
    shared = ("--run", trained, "--uniform", "30M", "--steps", "2", "--batch", "8")
    pytest.importorskip("tensorboard")
    assert run("retrain", *shared, "--out", tmp_path / "plain", "--tensorboard") == 0
    assert run("retrain", *shared, "--out", tmp_path / "decayed", "--weight-decay", "0.5") == 0
    assert list((tmp_path / "plain/tensorboard").glob("events.*"))
    digests = {sha256_file(tmp_path / name / "model.safetensors") for name in ("plain", "decayed")}
    assert len(digests) == 2
    shutil.rmtree(tmp_path / "plain/tensorboard")
    assert run("retrain", *shared, "--out", tmp_path / "plain", "--overwrite") == 0
