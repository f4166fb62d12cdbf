"""``--data digits-hard``: distorted copies that are the same everywhere and never shared between splits."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from engine.data import Data, open_data
from engine.data import hard_digits as hard
from engine.data.digits import digits

ORIGINALS = 1797
# SHA-256 of all 17,970 images as drawn when the source was written: random numbers and the arithmetic that uses them
# are integers or single operations in float64, so nothing may differ between machines or versions.
DIGEST = "485a527251f003bcdd230e4e357fad266a14e248fea7aa53ed34e0d89cf7db81"


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits-hard")


def test_the_images_are_the_same_bytes_on_every_machine() -> None:
    source = hard.open_hard_digits()
    pixels = np.stack([source.images(index, hard.SIDE)[0] for index in range(len(source.labels))])
    assert pixels.shape == (hard.COPIES * ORIGINALS, 32, 32)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == DIGEST


def test_no_split_holds_a_copy_of_an_original_of_another(data: Data) -> None:
    originals = [{index % ORIGINALS for index in getattr(data.splits, name)} for name in data.sets]
    assert [len(data.subset(name)) for name in ("sub_train", "sub_validation", "test")] == [10770, 3600, 3600]
    assert [len(group) for group in originals] == [1077, 360, 360]
    assert len(set.union(*originals)) == ORIGINALS


def test_the_originals_are_split_as_the_plain_digits_are(data: Data) -> None:
    for seed, hard_data in ((0, data), (3, open_data("digits-hard", seed=3))):
        plain = open_data("digits", seed=seed).splits
        for name in ("sub_train", "sub_validation", "test"):
            assert {index % ORIGINALS for index in getattr(hard_data.splits, name)} == {*getattr(plain, name)}


def test_calibration_sees_as_many_originals_as_images(data: Data) -> None:
    first = data.subset("sub_train").indices[:1000]
    assert len({index % ORIGINALS for index in first.tolist()}) == 1000


def test_copies_keep_the_label_of_their_original_and_look_different(data: Data) -> None:
    subset = data.subset("test")
    target = torch.from_numpy(load_digits().target)
    assert torch.equal(subset.labels, target[subset.indices % ORIGINALS])
    copies = subset.images(slice(0, None, 360))
    assert len({image.numpy().tobytes() for image in copies}) == hard.COPIES


def test_the_network_reads_normalised_images(data: Data) -> None:
    assert data.name == "digits-hard"
    assert data.preprocessing.resize == data.preprocessing.resolution == 32
    assert not data.augmentation.flip
    normalised = data.preprocessing(data.subset("sub_train").images(slice(None)))
    assert abs(normalised.mean()) < 0.02
    assert abs(normalised.std() - 1) < 0.02


def test_an_image_depends_on_its_copy_and_place_and_on_no_other_image() -> None:
    pixels = digits().pixels[:100]
    alone = hard.distorted(pixels[:70], 1)
    assert np.array_equal(hard.distorted(pixels, 1)[:70], alone)
    assert not np.array_equal(hard.distorted(pixels[:70], 2), alone)


def test_without_distortion_a_copy_is_the_enlarged_original(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROTATION": 0, "SCALE": (1, 1), "SHIFT": 0, "COVER": (0, 0), "NOISE": 0}.items():
        monkeypatch.setattr(hard, name, value)
    original = digits().pixels[:5]
    enlarged = torch.nn.functional.interpolate(
        torch.from_numpy(np.pad(original, ((0, 0), (1, 1), (1, 1)))).float()[:, None], scale_factor=4, mode="bilinear"
    )[:, 0, 4:-4, 4:-4]
    assert np.abs(hard.distorted(original, 0) - enlarged.numpy()).max() <= 1


def test_a_rotation_turns_around_the_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    still = {"SCALE": (1, 1), "SHIFT": 0, "COVER": (0, 0), "NOISE": 0}
    for name, value in {**still, "ROTATION": 0}.items():
        monkeypatch.setattr(hard, name, value)
    pixels = np.zeros((40, 8, 8), np.uint8)
    pixels[:, 3:5, 3:5] = 255
    upright = hard.distorted(pixels, 0).astype(int)
    monkeypatch.setattr(hard, "ROTATION", 1)
    turned = hard.distorted(pixels, 0).astype(int)
    where = np.arange(32) - 15.5
    for axis in (1, 2):
        centre = (turned.sum(3 - axis) * where).sum(1) / turned.sum((1, 2))
        assert np.abs(centre).max() < 0.1
    # A square keeps its area when turned, up to what interpolation rounds.
    assert np.abs(turned.sum((1, 2)) / upright.sum((1, 2)) - 1).max() < 0.02
