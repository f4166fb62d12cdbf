from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from engine.data.decode import DecodeError, decode_file

ORIENTATION = 0x0112
ROTATE_TO_SHOW = 6
"""EXIF orientation of a picture stored lying on its left side."""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Save an image and return its path."""

    def save(image: Image.Image, suffix: str = "png", **options: Any) -> Path:
        path = tmp_path / f"image.{suffix}"
        image.save(path, **options)
        return path

    return save


def colour(path: Path) -> list[int]:
    """Return the one colour of a decoded image."""
    pixels = decode_file(path, 8)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def test_grey_images_become_three_equal_channels(write: Write) -> None:
    assert colour(write(Image.new("L", (8, 8), 77))) == [77, 77, 77]
    assert colour(write(Image.new("1", (8, 8), 1))) == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_images_are_scaled_and_not_clipped(write: Write, suffix: str) -> None:
    values = np.full((8, 8), 257 * 100, np.uint16)
    assert colour(write(Image.fromarray(values), suffix)) == [100, 100, 100]


def test_floating_point_images_are_refused(write: Write) -> None:
    with pytest.raises(DecodeError, match="floating-point"):
        decode_file(write(Image.new("F", (8, 8), 0.5), "tif"), 8)


def test_palette_and_cmyk_images_become_rgb(write: Write) -> None:
    palette = Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
    assert colour(write(palette)) == [10, 200, 30]
    cyan = colour(write(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "jpg", quality=100))
    assert np.abs(np.array(cyan) - (0, 255, 255)).max() <= 4


def test_transparency_shows_white_whatever_colour_hides_behind_it(write: Write) -> None:
    assert colour(write(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))) == [255, 255, 255]
    assert colour(write(Image.new("LA", (8, 8), (0, 0)))) == [255, 255, 255]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert colour(write(palette, transparency=0)) == [255, 255, 255]


def test_photographs_are_turned_upright(write: Write) -> None:
    stored = Image.new("L", (8, 8), 0)
    stored.paste(255, (0, 0, 4, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATE_TO_SHOW
    upright = decode_file(write(stored, exif=exif), 8)
    assert upright[0, :4].min() == 255
    assert upright[0, 4:].max() == 0


def test_a_large_photograph_is_decoded_at_a_smaller_scale_and_looks_the_same(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    photograph = Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATE_TO_SHOW
    path = write(photograph, "jpg", quality=95, exif=exif)
    small = decode_file(path, 32).astype(int)
    scales = []
    original = JpegImageFile.draft

    def full(image: JpegImageFile, mode: str | None, size: tuple[int, int]) -> None:
        scales.append(min(image.size) // size[0])
        assert original(image, mode, size) is not None
        assert min(image.size) == 75

    monkeypatch.setattr(JpegImageFile, "draft", full)
    assert np.array_equal(decode_file(path, 32), small)
    assert scales == [4]
    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: None)
    assert np.abs(decode_file(path, 32) - small).max() <= 3


def test_the_shorter_side_is_resized_and_the_centre_kept(write: Write) -> None:
    wide = Image.new("L", (64, 16), 0)
    wide.paste(200, (24, 0, 40, 16))
    assert decode_file(write(wide), 8)[:, :, 1:-1].min() == 200


def test_truncated_damaged_and_foreign_files_are_refused(write: Write, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for suffix in ("jpg", "png"):
        path = write(noise, suffix)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(DecodeError):
            decode_file(path, 8)
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(DecodeError, match="cannot identify"):
        decode_file(text, 8)
    with pytest.raises(DecodeError, match="No such file"):
        decode_file(tmp_path / "nowhere.png", 8)


def test_postscript_is_not_run_whatever_its_file_is_called(write: Write) -> None:
    path = write(Image.new("L", (8, 8)), "eps")
    with pytest.raises(DecodeError, match="cannot identify"):
        decode_file(path.rename(path.with_suffix(".png")), 8)


def test_decompression_bombs_are_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(Image.new("L", (20, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)
    with pytest.raises(DecodeError, match="decompression bomb"):
        decode_file(path, 8)
