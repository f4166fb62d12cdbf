import gzip
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_files import (
    cifar_planes,
    digits,
    enlarged,
    idx_bytes,
    write_binary,
    write_cifar10,
    write_idx,
    write_pickle,
)

from engine.data import Data, open_data
from engine.errors import UserError


def by_index(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and labels of all splits in the order of the source."""
    order = torch.tensor(data.splits.members).argsort()
    sets = data.sets.values()
    images = torch.cat([images.images(slice(None)) for images in sets])
    return images[order], torch.cat([images.labels for images in sets])[order]


def test_digits_split_into_1077_and_360_and_360() -> None:
    data = open_data()
    assert [len(data.subset(name)) for name in ("sub_train", "sub_validation", "test")] == [1077, 360, 360]
    assert data.name == "digits"
    assert data.preprocessing.resize == data.preprocessing.resolution == 32
    assert not data.augmentation.flip
    assert not data.quarantined
    assert data.splits == open_data(splits=data.splits).splits
    assert data.splits.sub_train != open_data(seed=1).splits.sub_train
    normalised = data.preprocessing(data.subset("sub_train").images(slice(None)))
    assert abs(normalised.mean()) < 0.02
    assert abs(normalised.std() - 1) < 0.02


def test_streamed_digits_are_the_same_bits_at_another_resolution() -> None:
    resident, streamed = (open_data(resolution=20, memory_limit=limit) for limit in (None, 0))
    first, second = (data.subset("test") for data in (resident, streamed))
    assert (first.resident, second.resident) == (True, False)
    assert torch.equal(first.images(slice(None)), second.images(slice(None)))


def test_splits_of_other_data_are_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path, binary=False)
    with pytest.raises(UserError, match=r"not those of the stored splits \(the contents differ\)"):
        open_data(splits=open_data(str(tmp_path)).splits)


def test_an_unknown_spec_lists_what_is_legal(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data 'cats' \(no such path\): give 'digits' .* a folder with train/"):
        open_data("cats")
    with pytest.raises(UserError, match="idx3-ubyte"):
        open_data(str(tmp_path))


def test_an_unknown_split_and_an_illegal_resolution_are_refused() -> None:
    with pytest.raises(UserError, match="split 'train': choose one of sub_train, sub_validation, test"):
        open_data().subset("train")
    with pytest.raises(UserError, match="resolution 4: choose 8 to 1024 pixels"):
        open_data(resolution=4)


@pytest.mark.parametrize("binary", [False, True], ids=["python", "binary"])
def test_cifar_10_is_read_as_distributed(tmp_path: Path, binary: bool) -> None:
    write_cifar10(tmp_path, binary)
    data = open_data(str(tmp_path))
    images, labels = by_index(data)
    pixels, expected = digits(12)
    order = np.concatenate([np.arange(len(pixels))[start::6] for start in range(6)])
    planes = cifar_planes(pixels).reshape(-1, 3, 32, 32)
    assert np.array_equal(images.numpy(), planes[order])
    assert labels.tolist() == expected[order].tolist()
    assert data.splits.test == tuple(range(100, 120))
    assert data.classes == tuple("0123456789")


@pytest.mark.parametrize("fortran", [False, True])
def test_cifar_100_is_read_by_its_fine_labels_and_names(tmp_path: Path, fortran: bool) -> None:
    pixels, _ = digits(20)
    planes, labels = cifar_planes(pixels), np.arange(200) % 100
    data = np.asfortranarray(planes) if fortran else planes
    for name in ("train", "test"):
        content = {b"data": data, b"fine_labels": labels.tolist(), b"coarse_labels": [0] * 200}
        write_pickle(tmp_path / name, content)
        write_binary(tmp_path / f"{name}.bin", planes, np.zeros_like(labels), labels)
    names = [f"kind {label}" for label in range(100)]
    write_pickle(tmp_path / "meta", {b"fine_label_names": [name.encode() for name in names]})
    python = open_data(str(tmp_path))
    (tmp_path / "train").unlink()
    binary = open_data(str(tmp_path))
    assert python.classes == tuple(names)
    for one, other in zip(by_index(python), by_index(binary), strict=True):
        assert torch.equal(one, other)
    assert np.array_equal(by_index(python)[0][:200].flatten(1).numpy(), planes)


class Attack:
    """Runs a command when it is unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("victim", ["data_batch_3", "batches.meta"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path: Path, victim: str) -> None:
    write_cifar10(tmp_path, binary=False)
    proof = tmp_path / "proof"
    write_pickle(tmp_path / victim, {b"labels": [0], b"data": Attack(proof)})
    with pytest.raises(UserError, match=rf"{victim}' is not a CIFAR batch \(it names posix.system"):
        open_data(str(tmp_path))
    assert not proof.exists()
    pickle.loads((tmp_path / victim).read_bytes())
    assert proof.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"labels": [0]}, "has no uint8 'data'"),
        ({b"labels": [0], b"data": np.zeros((1, 3071), np.uint8)}, "has no uint8 'data'"),
        ({b"labels": [0], b"data": np.zeros((1, 3072), np.float32)}, "has no uint8 'data'"),
        ({b"labels": [0], b"data": np.array([[None] * 3072])}, "has no uint8 'data'"),
        ({b"labels": [0, 1], b"data": np.zeros((1, 3072), np.uint8)}, "has no uint8 'data'"),
        ({b"labels": [10], b"data": np.zeros((1, 3072), np.uint8)}, "a label outside 0 to 9"),
        ({b"labels": [-1], b"data": np.zeros((1, 3072), np.uint8)}, "a label outside 0 to 9"),
        ([1, 2], "no dictionary in it"),
    ],
)
def test_a_pickle_with_other_content_is_refused(tmp_path: Path, content: object, message: str) -> None:
    write_cifar10(tmp_path, binary=False)
    write_pickle(tmp_path / "data_batch_2", content)
    with pytest.raises(UserError, match=message):
        open_data(str(tmp_path))


def test_truncated_and_missing_cifar_batches_are_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "python", binary=False)
    batch = tmp_path / "python" / "data_batch_4"
    batch.write_bytes(batch.read_bytes()[:-100])
    with pytest.raises(UserError, match="data_batch_4' is not a CIFAR batch"):
        open_data(str(tmp_path / "python"))
    batch.unlink()
    with pytest.raises(UserError, match=r"cannot be read: .*data_batch_4"):
        open_data(str(tmp_path / "python"))

    write_cifar10(tmp_path / "binary", binary=True)
    records = tmp_path / "binary" / "data_batch_5.bin"
    content = records.read_bytes()
    records.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"has {len(content) - 1} bytes, not a multiple of 3073"):
        open_data(str(tmp_path / "binary"))
    records.write_bytes(b"\x0a" + content[1:])
    with pytest.raises(UserError, match="a label outside 0 to 9"):
        open_data(str(tmp_path / "binary"))


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_idx_files_are_read_with_their_test_part(tmp_path: Path, zipped: bool) -> None:
    pixels, labels = digits(12)
    pixels = enlarged(pixels, 32)
    write_idx(tmp_path, "train", pixels[::2], labels[::2], zipped)
    write_idx(tmp_path, "t10k", pixels[1::2], labels[1::2], zipped)
    data = open_data(str(tmp_path))
    images, found = by_index(data)
    assert np.array_equal(images[:, 0].numpy(), np.concatenate([pixels[::2], pixels[1::2]]))
    assert torch.equal(images[:, 0], images[:, 2])
    assert found.tolist() == [*labels[::2], *labels[1::2]]
    assert data.splits.test == tuple(range(60, 120))


def test_idx_data_sets_that_share_a_folder_are_told_apart_by_file(tmp_path: Path) -> None:
    pixels, labels = digits(5)
    write_idx(tmp_path, "letters-train", pixels, labels + 1)
    write_idx(tmp_path, "train", pixels[:25], labels[:25])
    with pytest.raises(UserError, match="several data sets; give the path of one of letters-train-images"):
        open_data(str(tmp_path))
    data = open_data(str(tmp_path / "letters-train-images-idx3-ubyte"))
    assert data.classes == tuple(str(label) for label in range(1, 11))
    assert len(data.splits.test) == 10


PIXELS, LABELS = digits(4)
IMAGES = idx_bytes(PIXELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with , an IDX file"),
        (b"\x00\x00\x08\x01" + IMAGES[4:], "begins with 00 00 08 01, an IDX file of bytes in 3 dimensions"),
        (b"\x00\x00\x0d\x03" + IMAGES[4:], "begins with 00 00 0d 03"),
        (IMAGES[:-1], "has 2559 of the 2560 bytes its header claims"),
        (IMAGES + b"\x00", "has more of the 2560 bytes its header claims"),
        (IMAGES[:4] + b"\xff" * 12, "are legal"),
        (IMAGES[:4] + bytes(12), r"claims \(0, 0, 0\) values"),
        (idx_bytes(PIXELS[:39]), "39 images but 40 labels"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_a_damaged_idx_file_is_refused(tmp_path: Path, content: bytes, message: str, zipped: bool) -> None:
    write_idx(tmp_path, "train", PIXELS, LABELS, zipped)
    name = tmp_path / f"train-images-idx3-ubyte{'.gz' if zipped else ''}"
    name.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(UserError, match=message):
        open_data(str(tmp_path))


def test_truncated_gzip_files_and_missing_labels_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", PIXELS, LABELS, zipped=True)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    content = images.read_bytes()
    images.write_bytes(content[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        open_data(str(tmp_path))
    images.write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"has no train-labels-idx1-ubyte\[.gz\]"):
        open_data(str(tmp_path))


def test_test_images_that_do_not_fit_the_training_images_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", PIXELS, LABELS)
    write_idx(tmp_path, "t10k", PIXELS[:, 1:], LABELS)
    with pytest.raises(UserError, match="differ in size"):
        open_data(str(tmp_path))
    write_idx(tmp_path, "t10k", PIXELS, LABELS + 1)
    with pytest.raises(UserError, match="test label 10 is no training label"):
        open_data(str(tmp_path))
