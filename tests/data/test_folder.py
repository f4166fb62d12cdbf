import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_files import write_tree
from PIL import Image

from engine.data import Data, Splits, open_data
from engine.errors import UserError

EVERYTHING = slice(None)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_tree(tmp_path / "digits" / "train")
    return tmp_path / "digits"


def open_small(tree: Path, **options: Any) -> Data:
    return open_data(str(tree), **{"resolution": 28, "workers": 0} | options)


def pixels_of(data: Data) -> torch.Tensor:
    """Return the images in the order of ``data.splits.members``."""
    return torch.cat([images.images(EVERYTHING) for images in data.sets.values()])


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_a_tree_gives_its_classes_at_the_stored_size(tree: Path) -> None:
    data = open_small(tree)
    assert (data.name, data.classes) == ("digits", ("class 0", "class 1", "class 2"))
    assert (data.preprocessing.resolution, data.preprocessing.resize) == (28, 32)
    assert [len(data.subset(name)) for name in ("sub_train", "sub_validation", "test")] == [18, 6, 6]
    images = data.subset("test").images(EVERYTHING)
    assert (images.shape, images.dtype) == ((6, 3, 32, 32), torch.uint8)
    assert data.augmentation.flip
    assert open_data(str(tree), workers=0).preprocessing.resolution == 224


def test_a_validation_folder_becomes_the_test_split(tree: Path) -> None:
    write_tree(tree / "val", per_class=4, suffix="jpg")
    data = open_small(tree)
    assert len(data.subset("test")) == 12
    assert data.subset("test").labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.splits.test == tuple(range(30, 42))


def test_streamed_and_resident_images_are_the_same_bits(tree: Path) -> None:
    resident, streamed = open_small(tree), open_small(tree, memory_limit=0, workers=2)
    assert resident.splits == streamed.splits
    first, second = (data.subset("sub_train") for data in (resident, streamed))
    assert (first.resident, second.resident) == (True, False)
    batches = [torch.tensor([5, 3, 3]), torch.tensor([0]), torch.arange(17, 0, -1)]
    state = torch.random.get_rng_state()
    for one, other in zip(first.stream(batches), second.stream(iter(batches)), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert torch.equal(first.images(slice(4, 9)), second.images(slice(4, 9)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_corrupt_image_is_named_and_quarantined_and_replaced_by_nothing(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = open_small(tree)
    damage(tree / "train" / "class 1" / "4.png")
    with caplog.at_level(logging.WARNING):
        data = open_small(tree)
    assert data.quarantined == ("train/class 1/4.png",)
    assert "quarantined 'train/class 1/4.png': " in caplog.text
    assert len(data.splits.members) == 29
    assert 14 not in data.splits.members
    for name, images in data.sets.items():
        for position, index in enumerate(images.indices.tolist()):
            assert images.labels[position] == index // 10, name
    everything = pixels_of(whole)
    for index, image in zip(data.splits.members, pixels_of(data), strict=True):
        assert torch.equal(image, everything[whole.splits.members.index(index)])


@pytest.mark.parametrize("options", [{}, {"memory_limit": 0}, {"workers": 2}])
def test_too_many_corrupt_images_stop_the_run(tree: Path, options: dict[str, int]) -> None:
    damage(tree / "train" / "class 0" / "0.png")
    damage(tree / "train" / "class 2" / "9.png")
    with pytest.raises(UserError, match=r"at least 2 of 30 .* at most 1 may: 'train/class 0/0.png', 'train"):
        open_small(tree, **options)


def test_a_stored_run_keeps_its_quarantine_and_accepts_no_new_one(tree: Path) -> None:
    damage(tree / "train" / "class 0" / "7.png")
    first = open_small(tree)
    stored = Splits.from_dict(first.splits.to_dict())
    for options in ({}, {"memory_limit": 0}):
        again = open_small(tree, splits=stored, **options)
        assert again.quarantined == first.quarantined
        assert torch.equal(pixels_of(again), pixels_of(first))

    victim = tree / "train" / "class 0" / "1.png"
    size = victim.stat().st_size
    victim.write_bytes(b"?" * size)
    with pytest.raises(UserError, match=r"at most 0 may: 'train/class 0/1.png'"):
        open_small(tree, splits=stored)


def test_an_image_that_turns_corrupt_in_mid_run_stops_it_by_name(tree: Path) -> None:
    data = open_small(tree, memory_limit=0)
    index = data.splits.sub_train[3]
    path = tree / "train" / f"class {index // 10}" / f"{index % 10}.png"
    damage(path)
    with pytest.raises(UserError, match=f"'train/class {index // 10}/{path.name}' can no longer be decoded"):
        data.subset("sub_train").images(EVERYTHING)


def test_a_deleted_or_added_image_is_named_when_a_run_resumes(tree: Path) -> None:
    stored = open_small(tree).splits
    image = tree / "train" / "class 1" / "3.png"
    image.rename(image.with_name("new.png"))
    expected = "missing 'train/class 1/3.png', added 'train/class 1/new.png'"
    with pytest.raises(UserError, match=expected):
        open_small(tree, splits=stored)


def test_files_that_are_no_images_are_passed_over(tree: Path) -> None:
    before = open_small(tree).splits
    for name in ("notes.txt", ".hidden.png", "._0.png"):
        (tree / "train" / "class 0" / name).write_text("no image")
    assert open_small(tree).splits == before


def test_a_tree_with_the_wrong_shape_is_refused(tree: Path) -> None:
    extra = tree / "val" / "class 9"
    extra.mkdir(parents=True)
    with pytest.raises(UserError, match=r"class 'class 9' is in .* but not in train"):
        open_small(tree)
    extra.rename(tree / "val" / "class 0")
    with pytest.raises(UserError, match="holds no image; expected CLASS/IMAGE"):
        open_small(tree)
    (tree / "val" / "class 0" / "deeper").mkdir()
    with pytest.raises(UserError, match="is a folder; put its images"):
        open_small(tree)


def test_a_class_without_images_is_refused(tree: Path) -> None:
    (tree / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="class 'empty' has 0 usable images"):
        open_small(tree)


def test_a_large_photograph_decodes_like_any_other(tree: Path) -> None:
    Image.new("RGB", (2000, 30), (9, 9, 9)).save(tree / "train" / "class 0" / "wide.png")
    data = open_small(tree)
    assert len(data.splits.members) == 31
