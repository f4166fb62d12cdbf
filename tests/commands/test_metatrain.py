"""`engine.metatrain`: what it writes, and that interrupting it changes nothing."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import TINY_NET, ErrorLine, run, start
from torch import Tensor

from engine.data.decode import decode_file
from engine.files import sha256_file
from engine.run.checkpoint import load_checkpoint, save_checkpoint
from engine.space import architecture
from engine.training_costs import steps_between_rests

# Long enough to be hit while it runs; a checkpoint as often as the 5 % rule allows.
STEPS = 240
INTERRUPTIBLE: tuple[object, ...] = ("--hidden", "1", "--steps", STEPS, "--batch", "8", "--calibration-images", "32")
INTERRUPTIBLE += ("--checkpoint-minutes", "0")
DELAYED_STEPS = 90
DELAYED = (*INTERRUPTIBLE, "--steps", DELAYED_STEPS, "--update", "delayed", "--momentum", "bfloat16")


def records(run_folder: Path) -> list[dict[str, float]]:
    """What a run has logged, but for the time it waited for images."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "data_wait"} for line in lines]


def weights_digest(run_folder: Path) -> str:
    return sha256_file(sorted(run_folder.glob("checkpoints/step-*"))[-1] / "weights.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run("metatrain", "--out", out, *INTERRUPTIBLE) == 0
    return out


@pytest.fixture(scope="module")
def delayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `uninterrupted`, its generators updated some steps late, and their momentum rounded then."""
    out = tmp_path_factory.mktemp("delayed") / "run"
    assert run("metatrain", "--out", out, *DELAYED) == 0
    return out


def test_a_run_directory_explains_itself(trained: Path) -> None:
    config = tomllib.loads((trained / "config.toml").read_text())
    assert config["options"]["architecture"] == "mobilenet_v1"
    assert config["resolved"]["batch"] == 64
    assert config["resolved"]["lr"] == 0.1
    assert config["resolved"]["weight_decay"] == 4e-5
    manifest = json.loads((trained / "checkpoints/step-00000003/manifest.json").read_text())
    assert manifest["preprocessing"]["resolution"] == 32
    assert manifest["classes"] == [str(digit) for digit in range(10)]
    *_, steps, accuracies = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "lr", "data_wait"} <= steps.keys()
    assert {"smallest", "middle", "largest"} <= accuracies.keys()
    assert all(0 <= accuracies[name] <= 100 for name in ("smallest", "middle", "largest"))


def test_killed_at_random_points_and_resumed_a_run_ends_with_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    out, moment = tmp_path / "run", random.Random(7)
    for attempt in range(3):
        process = start("metatrain", "--out", out, *INTERRUPTIBLE, *(["--resume"] if attempt else []))
        before = _last_step(out)
        while process.poll() is None and _last_step(out) == before:
            time.sleep(0.02)
        time.sleep(moment.uniform(0, 2.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 0 < _last_step(out) < STEPS, "the run ended before it was killed: nothing was tested"
    assert run("metatrain", "--out", out, "--resume") == 0
    assert weights_digest(out) == weights_digest(uninterrupted)
    assert records(out) == records(uninterrupted)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_run_and_resuming_completes_it(
    number: signal.Signals, status: int, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start("metatrain", "--out", out, *INTERRUPTIBLE)
    while process.poll() is None and _last_step(out) == 0:
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert 0 < _last_step(out) < STEPS
    assert run("metatrain", "--out", out, "--resume") == 0
    assert weights_digest(out) == weights_digest(uninterrupted)


def test_with_delayed_updates_a_run_killed_and_then_interrupted_ends_with_the_same_bits(
    delayed: Path, tmp_path: Path
) -> None:
    rest = steps_between_rests("delayed", architecture("mobilenet_v1").build(10), 1, 8, 32)
    assert 1 < rest < DELAYED_STEPS / 4, "there would be no steps to interrupt it between"
    out = tmp_path / "run"
    for number, resume in ((signal.SIGKILL, []), (signal.SIGINT, ["--resume"])):
        process, before = start("metatrain", "--out", out, *DELAYED, *resume), _last_step(out)
        while process.poll() is None and _last_step(out) == before:
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert 0 < _last_step(out) < DELAYED_STEPS
        assert _last_step(out) % rest == 0, "it was not at rest"
    assert process.returncode == 130
    last = load_checkpoint(out / "checkpoints")
    assert last is not None
    for name, momentum in last.tensors("momentum").items():
        assert momentum.dtype == (torch.bfloat16 if name.endswith(".basis") else torch.float32)
    assert run("metatrain", "--out", out, "--resume") == 0
    assert weights_digest(out) == weights_digest(delayed)
    assert records(out) == records(delayed)


def test_delayed_and_immediate_updates_agree_to_rounding(tmp_path: Path) -> None:
    # The loss of the second step: BatchNorm makes a difference grow some 300 times a step.
    losses = []
    for update in ("immediate", "delayed"):
        arguments = ("--hidden", "2", "--steps", "2", "--calibration-images", "32", "--update", update)
        assert run("metatrain", "--out", tmp_path / update, *arguments) == 0
        losses.append(json.loads((tmp_path / update / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_resuming_a_finished_run_changes_nothing(copied: Path, trained: Path) -> None:
    assert run("metatrain", "--out", copied, "--resume") == 0
    assert weights_digest(copied) == weights_digest(trained)
    assert (copied / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_resuming_with_another_option_is_refused(copied: Path, error_line: ErrorLine) -> None:
    assert run("metatrain", "--out", copied, "--resume", "--lr", "0.5") == 2
    assert "--lr 0.5" in error_line()


def test_a_run_killed_before_its_splits_were_written_makes_the_same_ones(copied: Path, trained: Path) -> None:
    (copied / "splits.json").unlink()
    assert run("metatrain", "--out", copied, "--resume") == 0
    assert (copied / "splits.json").read_bytes() == (trained / "splits.json").read_bytes()


def test_resuming_with_other_splits_than_the_checkpoint_is_refused(
    copied: Path, tmp_path: Path, error_line: ErrorLine
) -> None:
    assert run("metatrain", "--out", tmp_path / "other", *TINY_NET, "--seed", "5") == 0
    (copied / "splits.json").write_bytes((tmp_path / "other/splits.json").read_bytes())
    assert run("metatrain", "--out", copied, "--resume") == 2
    assert "another splits" in error_line()


@pytest.mark.parametrize("momentum", [torch.zeros(2, 3), torch.full((32, 3, 9, 2), torch.inf)], ids=["shape", "inf"])
def test_momentum_that_does_not_fit_the_network_is_refused(
    momentum: Tensor, copied: Path, error_line: ErrorLine
) -> None:
    last = load_checkpoint(copied / "checkpoints")
    assert last is not None
    files = {"weights": last.tensors("weights"), "momentum": {"generators.0.basis": momentum}}
    manifest = {key: value for key, value in last.manifest.items() if key not in ("schema", "step", "files")}
    shutil.rmtree(last.folder)
    save_checkpoint(copied / "checkpoints", last.step - 1, files, manifest)
    assert run("metatrain", "--out", copied, "--resume") == 2
    assert "the momentum of generators.0.basis" in error_line()


def test_too_little_memory_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine
) -> None:
    monkeypatch.setattr("engine.metatrain.free_memory", lambda _: 10**9)
    assert run("metatrain", "--out", tmp_path / "run", "--architecture", "resnet50") == 2
    # 8 bytes for each of the 774.2 M parameters that ten classes leave.
    assert "6.2 GB for weights and momentum" in (line := error_line())
    assert line.endswith("cpu has 1.0 GB free: give a smaller --hidden or --batch")
    assert not (tmp_path / "run").exists()


def test_only_the_last_two_checkpoints_are_kept(uninterrupted: Path) -> None:
    steps = [path.name for path in (uninterrupted / "checkpoints").iterdir()]
    assert f"step-{STEPS:08d}" in steps
    assert len(steps) == 2


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_step(
    tmp_path: Path, error_line: ErrorLine
) -> None:
    assert run("metatrain", "--out", tmp_path / "run", *TINY_NET, "--lr", "1e38") == 1
    line = error_line()
    assert "the loss of step 2 is nan" in line or "the loss of step 2 is inf" in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "option",
    [
        ("--structures", "4"), ("--batch", "16"), ("--lr", "0.02"), ("--weight-decay", "0.1"), ("--seed", "1"),
        ("--hidden", "3"), ("--resolution", "33"),
    ],
    ids=lambda option: option[0],
)  # fmt: skip
def test_an_option_changes_what_is_learned(option: tuple[str, str], trained: Path, tmp_path: Path) -> None:
    assert run("metatrain", "--out", tmp_path / "run", *TINY_NET, *option) == 0
    assert weights_digest(tmp_path / "run") != weights_digest(trained)


@pytest.mark.parametrize("option", [("--device", "cpu"), ("--checkpoint-minutes", "0"), ("--overwrite",), ("--debug",)])
def test_an_option_about_how_a_run_is_carried_out_does_not(
    option: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    assert run("metatrain", "--out", tmp_path / "run", *TINY_NET, *option) == 0
    assert weights_digest(tmp_path / "run") == weights_digest(trained)


def test_epochs_are_passes_over_the_sub_training_images(tmp_path: Path) -> None:
    assert run("metatrain", "--out", tmp_path / "run", "--hidden", "1", "--epochs", "1", "--batch", "512") == 0
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]


def test_backends_agree_on_the_loss_to_rounding(tmp_path: Path) -> None:
    losses = []
    for backend in ("auto", "reference"):
        out = tmp_path / backend
        assert run("metatrain", "--out", out, "--hidden", "2", "--steps", "1", "--backend", backend) == 0
        losses.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_tensorboard_events_are_written_on_request(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert run("metatrain", "--out", tmp_path / "run", *TINY_NET, "--tensorboard") == 0
    assert list((tmp_path / "run/tensorboard").glob("events.*"))


@pytest.fixture
def folder_options(tmp_path: Path) -> tuple[object, ...]:
    """Options that train on a folder of photographs of digits."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index in range(60):
        folder = tmp_path / "digits" / "train" / f"class-{digits.target[index] % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[index] * 15).astype("uint8")
        Image.fromarray(pixels).resize((50, 40)).save(folder / f"{index}.jpg")
    return ("--data", tmp_path / "digits", "--resolution", "32", "--batch", "8")


def test_images_from_a_folder_are_trained_on(folder_options: tuple[object, ...], tmp_path: Path) -> None:
    assert run("metatrain", "--out", tmp_path / "run", *TINY_NET, *folder_options) == 0
    manifest = json.loads((tmp_path / "run/checkpoints/step-00000003/manifest.json").read_text())
    assert manifest["classes"] == ["class-0", "class-1"]


def test_a_cache_changes_no_bit_and_spares_later_commands_the_decoding(
    folder_options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []

    def decode(path: Path, size: int) -> np.ndarray:
        decoded.append(path)
        return decode_file(path, size)

    monkeypatch.setattr("engine.data.decode.decode_file", decode)
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    # No image stays in memory: every batch of every step comes from the files, or from the cache.
    monkeypatch.setattr("engine.data.dataset._default_memory_limit", lambda _: 0)
    options = ("--hidden", "1", "--steps", "2", "--calibration-images", "8", *folder_options)
    assert run("metatrain", "--out", plain, *options) == 0
    assert len(decoded) > 60 + 2 * 8
    decoded.clear()
    assert run("metatrain", "--out", cached, *options, "--cache", tmp_path / "cache") == 0
    assert len(decoded) == 60
    assert run("retrain", "--run", cached, "--full", "--steps", "1", "--batch", "8") == 0
    assert run("metatrain", "--out", cached, "--resume") == 0
    assert len(decoded) == 60
    assert weights_digest(cached) == weights_digest(plain)
    assert records(cached) == records(plain)


def test_a_cache_of_images_that_need_no_decoding_is_refused(tmp_path: Path, error_line: ErrorLine) -> None:
    assert run("metatrain", "--out", tmp_path / "run", *TINY_NET, "--cache", tmp_path / "cache") == 2
    assert "the images of 'digits' need no decoding" in error_line()
    assert not list(tmp_path.iterdir())


def test_a_cache_that_does_not_fit_the_disk_is_refused_before_anything_is_written(
    folder_options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: ErrorLine
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
    options = (*TINY_NET, *folder_options, "--cache", tmp_path / "cache")
    assert run("metatrain", "--out", tmp_path / "run", *options) == 2
    # 60 images of 37 px: 0.25 MB.
    assert "needs 0.0 GB for 60 decoded images" in error_line()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def _last_step(out: Path) -> int:
    steps = [int(path.name.split("-")[1]) for path in out.glob("checkpoints/step-*")]
    return max(steps, default=0)
