"""Images out of files and arrays, as square uint8 RGB.

Whatever a file holds, it becomes what a viewer would show: upright (EXIF), opaque on white, 8 bit a channel.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, __version__, features

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats Pillow may try. Others stay closed: some start programs (EPS), none is needed."""

DECODER = f"metaprune 1, Pillow {__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
"""What the bits of a decoded image depend on besides its file; the first number is of what this module does."""

Pixels = npt.NDArray[np.uint8]


class DecodeError(Exception):
    """One image could not be decoded; the message says why."""


class Images(Protocol):
    """Numbered images that can be sent to a worker process."""

    def __call__(self, index: int, size: int) -> Pixels:
        """Return image ``index`` as uint8 [3,size,size]. Raises DecodeError."""

    def name(self, index: int) -> str:
        """Return what to call image ``index`` in a message."""


@dataclass(frozen=True)
class ArrayImages:
    """Images held in memory: ``pixels`` is uint8 [count,H,W] (grey) or [count,H,W,3] (RGB)."""

    pixels: Pixels

    def __call__(self, index: int, size: int) -> Pixels:
        return to_square(Image.fromarray(self.pixels[index]), size)

    def name(self, index: int) -> str:
        return f"image {index}"


@dataclass(frozen=True)
class FileImages:
    """Images in files: ``paths`` are relative to ``root``, with forward slashes."""

    root: Path
    paths: tuple[str, ...]

    def __call__(self, index: int, size: int) -> Pixels:
        return decode_file(self.root / self.paths[index], size)

    def name(self, index: int) -> str:
        return self.paths[index]


def decode_file(path: Path, size: int) -> Pixels:
    """Decode the image in ``path`` completely. Returns uint8 [3,size,size].

    Raises DecodeError when the file is missing, truncated, damaged, in none of ``FORMATS``, or has more
    than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                # A large photograph is decoded to half its side, or less: still twice what is needed.
                image.draft(None, (2 * size, 2 * size))
                return to_square(ImageOps.exif_transpose(image), size)
    except Exception as error:  # Pillow's decoders raise almost anything on a hostile file.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(reason) from None


def to_square(image: Image.Image, size: int) -> Pixels:
    """Scale the shorter side to ``size``, crop the centre. Returns uint8 [3,size,size] RGB."""
    image = _to_rgb(image)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return ``image`` in mode RGB: 16-bit grey scaled to 8 bit, transparency flattened on white."""
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no defined range; store 8 or 16 bit per channel")
    if image.mode.startswith("I"):
        grey = np.asarray(image).clip(0, 65535).astype(np.float64)
        image = Image.fromarray(np.rint(grey * (255 / 65535)).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
