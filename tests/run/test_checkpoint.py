import json
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.errors import UserError
from engine.files import sha256_file, sha256_json
from engine.run import checkpoint as checkpoint_module
from engine.run.checkpoint import (
    Checkpoint,
    CheckpointClock,
    check_disk_space,
    load_checkpoint,
    restore,
    save_checkpoint,
)

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7)}


def latest(root: Path) -> Checkpoint:
    checkpoint = load_checkpoint(root)
    assert checkpoint is not None
    return checkpoint


def saved(root: Path, step: int = 1) -> Path:
    """The file of tensors of a new checkpoint."""
    return save_checkpoint(root, step, {"weights": TENSORS}, {}).folder / "weights.safetensors"


def reseal(file: Path) -> None:
    """Make the manifest believe in a changed file, as an attacker would."""
    path = file.parent / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][file.name] = sha256_file(file)
    del content["digest"]
    path.write_text(json.dumps({**content, "digest": sha256_json(content)}))


def refused(root: Path) -> str:
    """The one line with which the latest checkpoint is refused."""
    with pytest.raises(UserError) as error:
        latest(root).tensors("weights")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# -- whole or not there ----------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])


@given(st.dictionaries(st.text("abc._", min_size=1), st.tuples(shapes, dtypes), max_size=4), st.integers(0, 10**8 - 1))
def test_a_checkpoint_is_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[tuple[int, ...], torch.dtype]], step: int
) -> None:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        name: (100 * torch.randn(shape, generator=generator)).to(dtype) for name, (shape, dtype) in kinds.items()
    }
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    written = save_checkpoint(root, step, {"weights": tensors, "momentum": {}}, {"classes": ["a", "b"], "seed": 3})
    found = latest(root)
    assert found == Checkpoint(written.folder, {k: v for k, v in written.manifest.items() if k != "digest"})
    assert found.step == step
    assert found.manifest["classes"] == ["a", "b"]
    assert found.digest("weights") == sha256_file(written.folder / "weights.safetensors")
    loaded = found.tensors("weights")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_tensors_that_are_not_contiguous_are_read_back_as_they_looked(tmp_path: Path) -> None:
    wide = torch.arange(24.0).reshape(4, 6)
    save_checkpoint(tmp_path, 1, {"weights": {"transposed": wide.T, "strided": wide[:, ::2]}}, {})
    loaded = latest(tmp_path).tensors("weights")
    assert torch.equal(loaded["transposed"], wide.T)
    assert torch.equal(loaded["strided"], wide[:, ::2])


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 60, 700, 8000):
        saved(tmp_path, step)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-00000700", "step-00008000"]
    assert latest(tmp_path).step == 8000


def test_there_is_no_checkpoint_before_the_first(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("step", ["save_file", "sha256_file", "write_atomically", "sync_folder"])
def test_a_crash_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    saved(tmp_path, 10)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 20)
    # Renaming is the last step but one: only then is the new one there, and whole.
    assert latest(tmp_path).step == (20 if step == "sync_folder" else 10)
    assert latest(tmp_path).tensors("weights").keys() == TENSORS.keys()
    saved(tmp_path, 20)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_half_a_checkpoint_left_behind_by_a_killed_process_is_ignored_and_replaced(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    leftover = tmp_path / ".step-00000020.tmp"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    assert latest(tmp_path).step == 10
    saved(tmp_path, 20)
    assert latest(tmp_path).step == 20
    assert not leftover.exists()


# -- damage and attacks ----------------------------------------------------------------------------------------------


class Payload:
    """What a pickle can do when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the pickle was executed",)


def test_a_damaged_file_is_refused_by_its_name(tmp_path: Path) -> None:
    file = saved(tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert refused(tmp_path).startswith(f"{file} is damaged: its SHA-256 is not the manifest's")


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    file = saved(tmp_path)
    file.unlink()
    assert refused(tmp_path).startswith(f"cannot read {file}: ")


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("kept", [0, 4, 8, 20, 100])
def test_a_file_cut_short_is_refused_whatever_the_manifest_says(tmp_path: Path, kept: int, sealed: bool) -> None:
    file = saved(tmp_path)
    file.write_bytes(file.read_bytes()[:kept])
    if sealed:
        reseal(file)
    assert str(file) in refused(tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_in_disguise_is_refused_and_not_executed(tmp_path: Path, protocol: int) -> None:
    file = saved(tmp_path)
    file.write_bytes(pickle.dumps(Payload(), protocol))
    reseal(file)
    assert refused(tmp_path).startswith(f"cannot read {file}: ")


def test_a_pytorch_archive_in_disguise_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path)
    torch.save(TENSORS, file)
    reseal(file)
    assert refused(tmp_path).startswith(f"cannot read {file}: ")


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99999]}}',
        b'{"w": {"dtype": "F32"}}',
        b"[" * 1000,
    ],
)
def test_a_header_that_promises_what_is_not_there_is_refused_or_empty(tmp_path: Path, header: bytes) -> None:
    file = saved(tmp_path)
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    reseal(file)
    if header == b"{}":
        assert latest(tmp_path).tensors("weights") == {}
    else:
        assert refused(tmp_path).startswith(f"cannot read {file}: ")


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    manifest = saved(tmp_path).parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 1,', '"step": 2,'))
    assert "the manifest was changed after it was written" in refused(tmp_path)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    manifest = saved(tmp_path).parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace("checkpoint/1", "checkpoint/2"))
    assert "'metaprune.checkpoint/2' is not supported" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"step": ' + b"1" * 5000 + b"}"])
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    manifest = saved(tmp_path).parent / "manifest.json"
    manifest.write_bytes(content)
    assert refused(tmp_path).startswith(f"{manifest} is no checkpoint manifest: ")
    manifest.unlink()
    assert refused(tmp_path).startswith(f"cannot read checkpoint manifest {manifest}: ")


# -- restoring -------------------------------------------------------------------------------------------------------

SOURCE = Path("runs/a/checkpoints/step-00000001")


def test_restoring_copies_every_tensor() -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    restore(target, source.state_dict(), SOURCE)
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": torch.zeros(3, 2)}, r"weight has shape \(3, 2\), not \(2, 3\)"),
        ({"bias": torch.tensor([0.0, torch.nan])}, "bias holds values that are not finite"),
        ({"bias": torch.tensor([torch.inf, 0.0])}, "bias holds values that are not finite"),
        ({"extra": torch.zeros(1)}, "does not fit this network: extra"),
        ({"bias": None}, "does not fit this network: bias"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_copied(
    change: dict[str, Tensor | None], reason: str
) -> None:
    module = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    changed = {"weight": torch.ones(2, 3), "bias": torch.ones(2), **change}
    with pytest.raises(UserError, match=f"^{SOURCE}.*{reason}"):
        restore(module, {name: tensor for name, tensor in changed.items() if tensor is not None}, SOURCE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


# -- when, and whether there is room ---------------------------------------------------------------------------------


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: self.now)

    def due_after(self, clock: CheckpointClock, seconds: float) -> bool:
        self.now += seconds
        return clock.due()


def test_a_checkpoint_is_due_after_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Clock(monkeypatch)
    clock = CheckpointClock(minutes=2)
    assert not time.due_after(clock, 119)
    assert time.due_after(clock, 1)
    clock.saved(seconds=0.5)
    assert not time.due_after(clock, 119)
    assert time.due_after(clock, 1)


def test_a_slow_checkpoint_is_written_less_often_so_that_it_costs_a_twentieth_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    time = Clock(monkeypatch)
    clock = CheckpointClock(minutes=1)
    clock.saved(seconds=10)
    assert not time.due_after(clock, 199)
    assert time.due_after(clock, 1)
    clock.saved(seconds=1)
    assert not time.due_after(clock, 59)
    assert time.due_after(clock, 1)


def test_a_disk_without_room_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []

    def disk_usage(path: Path) -> usage:
        asked.append(path)
        return usage(10**10, 8 * 10**9, 2 * 10**9)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    check_disk_space(tmp_path / "new" / "run", 2 * 10**9)
    assert asked == [tmp_path]
    with pytest.raises(UserError, match=r"needs 2\.5 GB .* has 2\.0 GB free; free some space or .* --out"):
        check_disk_space(tmp_path / "new" / "run", 2_500_000_000)
    assert list(tmp_path.iterdir()) == []
