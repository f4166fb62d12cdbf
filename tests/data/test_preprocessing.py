import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import Augmentation, Preprocessing, augment, open_data
from engine.errors import UserError

PHOTO = Preprocessing(28, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SQUARE = Preprocessing(32, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
WHOLE = Augmentation(scale=(1, 1), ratio=(1, 1), flip=False)
RANDOM = Augmentation(scale=(0.2, 1), ratio=(3 / 4, 4 / 3), flip=True)


def random_images(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=seeded(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_evaluation_crops_the_centre_and_normalises() -> None:
    images = random_images(2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (PHOTO.mean, PHOTO.std))
    expected = (images[:, :, 2:30, 2:30] / 255 - mean) / std
    torch.testing.assert_close(PHOTO(images), expected)


def test_images_of_another_size_or_type_are_refused() -> None:
    for images in (random_images(1)[:, :, 1:], random_images(1).float()):
        with pytest.raises(ValueError, match=r"this preprocessing reads uint8 \[B, 3, 32, 32\]"):
            PHOTO(images)
        with pytest.raises(ValueError, match="this preprocessing reads"):
            augment(images, WHOLE, PHOTO, seeded(0))


def test_augmentation_that_changes_nothing_equals_the_evaluation_path() -> None:
    images = random_images(5)
    torch.testing.assert_close(augment(images, WHOLE, SQUARE, seeded(0)), SQUARE(images), atol=1e-4, rtol=1e-4)


def test_flipping_mirrors_whole_images_about_half_the_time() -> None:
    images = random_images(200)
    flip = Augmentation(scale=(1, 1), ratio=(1, 1), flip=True)
    kept = (augment(images, flip, SQUARE, seeded(0)) - SQUARE(images)).abs().amax((1, 2, 3)) < 1e-3
    mirrored = (augment(images, flip, SQUARE, seeded(0)) - SQUARE(images).flip(3)).abs().amax((1, 2, 3)) < 1e-3
    assert (kept ^ mirrored).all()
    assert 70 < kept.sum() < 130


@settings(deadline=None, max_examples=30)
@given(st.floats(0.05, 1), st.floats(0.2, 5), st.integers(0, 2**31))
def test_a_crop_lies_inside_the_image_and_has_the_area_and_shape_asked_for(
    scale: float, ratio: float, seed: int
) -> None:
    # Red holds x and green holds y, in pixels times 8: the crop's corners can be read off the result.
    ramp = torch.arange(32, dtype=torch.uint8) * 8
    images = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.zeros(32, 32).byte()])[None]
    crop = augment(images, Augmentation((scale, scale), (ratio, ratio), False), SQUARE, seeded(seed))[0]
    x, y = ((crop[:2] * 0.25 + 0.5) * 255 / 8).unbind()
    width = (x[0, -2] - x[0, 1]) * 32 / 29
    height = (y[-2, 0] - y[1, 0]) * 32 / 29
    # Sampling clamps half a pixel at a border, so extents are known to about a pixel of 32.
    assert abs(width - 32 * min(1, math.sqrt(scale * ratio))) < 1.2
    assert abs(height - 32 * min(1, math.sqrt(scale / ratio))) < 1.2
    assert x.min() > -1e-3
    assert x.max() < 31 + 1e-3


@given(st.integers(1, 9), st.data())
def test_a_part_of_a_batch_is_augmented_as_with_the_others_bit_for_bit(batch: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, batch - 1))
    part = slice(first, data.draw(st.integers(first + 1, batch)))
    images = random_images(batch)
    whole = augment(images, RANDOM, PHOTO, seeded(0))
    assert torch.equal(augment(images[part], RANDOM, PHOTO, seeded(0), part, batch), whole[part])


def test_the_same_generator_state_gives_the_same_batch() -> None:
    images = random_images(8)
    first, again, other = (augment(images, RANDOM, PHOTO, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (8, 3, 28, 28)


def test_a_batch_is_augmented_alike_whole_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(7)
    whole = augment(images, RANDOM, PHOTO, seeded(3))
    assert whole.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr("engine.data.preprocessing.PIECE", 2 * 3 * 32 * 32)
    assert torch.equal(augment(images, RANDOM, PHOTO, seeded(3)), whole)


def test_turning_flips_off_does_not_move_the_crops() -> None:
    images = random_images(64)
    steady = Augmentation(RANDOM.scale, RANDOM.ratio, flip=False)
    flipped, upright = (augment(images, kind, SQUARE, seeded(0)) for kind in (RANDOM, steady))
    same = (flipped - upright).abs().amax((1, 2, 3)) < 1e-3
    mirrored = (flipped.flip(3) - upright).abs().amax((1, 2, 3)) < 1e-3
    assert (same | mirrored).all()


def test_the_gpu_sees_the_crops_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = random_images(16)
    on_gpu = augment(images.cuda(), RANDOM, PHOTO, seeded(0))
    torch.testing.assert_close(on_gpu.cpu(), augment(images, RANDOM, PHOTO, seeded(0)), atol=1e-3, rtol=1e-3)


def test_augmented_digits_are_still_read_by_a_classifier_of_plain_ones() -> None:
    data = open_data("digits")
    train, test = data.subset("sub_train"), data.subset("test")
    known = data.preprocessing(train.images(slice(None))).flatten(1)
    seen = augment(test.images(slice(None)), data.augmentation, data.preprocessing, seeded(0)).flatten(1)
    predicted = train.labels[torch.cdist(seen, known).argmin(1)]
    assert (predicted == test.labels).float().mean() > 0.8


def test_preprocessing_and_augmentation_survive_a_dictionary() -> None:
    assert Preprocessing.from_dict(PHOTO.to_dict()) == PHOTO
    assert Augmentation.from_dict(RANDOM.to_dict()) == RANDOM
    as_json = {**PHOTO.to_dict(), "mean": list(PHOTO.mean)}
    assert Preprocessing.from_dict(as_json) == PHOTO


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 7}, "resolution 7: choose 8 to 1024 pixels"),
        ({"resolution": "224"}, "resolution '224'"),
        ({"resize": 20}, "resize 20: choose 28 to 2048 pixels"),
        ({"mean": [0.5, 0.5]}, "mean .*: give three numbers from 0 to 1"),
        ({"mean": 0.5}, "mean 0.5: give three numbers from 0 to 1"),
        ({"std": [0.5, 0.5, 0]}, "std .*: give three numbers above 0"),
        ({"std": [0.5, 0.5, math.nan]}, "std .*: give three numbers above 0"),
        ({"gamma": 2.2}, "expected the fields mean, resize, resolution, std"),
    ],
)
def test_stored_preprocessing_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preprocessing.from_dict({**PHOTO.to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": [0, 1]}, "scale .*: give .* 0 < low <= high <= 1"),
        ({"scale": [0.5, 1.5]}, "scale .*: give"),
        ({"ratio": [2, 1]}, "ratio .*: give"),
        ({"flip": 1}, "flip 1: give true or false"),
    ],
)
def test_stored_augmentation_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Augmentation.from_dict({**RANDOM.to_dict(), **change})
