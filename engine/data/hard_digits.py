"""Handwritten digits made hard to read: the 1797 digits of scikit-learn, each in ten distorted copies of 32×32 pixels.

Plain digits cannot tell structures apart: every one of them reads 97 to 99 % of 360 test images. Here a copy is
rotated, scaled, shifted, partly covered and buried in noise, and 3600 test images tell structures apart that 360
cannot. In 400 steps from scratch, MobileNetV1 learns to read 66 % of them at 41 M MACs (at 224 px, every layer
pruned alike), 74 % at 82 M and 79 % at 190 M. Training images get ten copies too: a network trained on clean digits
would be tested on something it never saw, and BatchNorm calibrated on other statistics than it meets.

Copies of one original belong to one group, so that no split holds a copy of what another one holds. Image
``copy * 1797 + original`` is where a copy stands: any number of images from the front of a split are of as many
different originals as there are, which is what calibration takes.

The images are the same on every machine: random numbers are counter-based (`engine.random`), the affine
coefficients come from single additions, products and quotients in float64, and the rest is integers.
"""

import numpy as np
import numpy.typing as npt

from engine.data.decode import Pixels
from engine.data.digits import CLASSES, digits
from engine.data.source import Part, Source, source_in_memory
from engine.random import random_bits, random_integers, stream_key

SIDE = 32
"""Side of a distorted image in pixels."""
COPIES = 10
"""Distorted copies of every original."""
ROTATION = 0.17
"""Greatest tangent of half the angle of rotation: 19 degrees."""
SCALE = (0.75, 1.0)
"""Least and greatest side of the digit, as a fraction of the image."""
SHIFT = 0.08
"""Greatest shift in x and in y, as a fraction of the image."""
COVER = (0.2, 0.4)
"""Least and greatest side of the rectangle that covers a part, as a fraction of the image."""
NOISE = 25
"""Standard deviation of the noise in grey values, before they are cut to 0–255."""

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]

FRACTION = 16
"""Bits after the point of a coordinate."""
STEPS = 1 << 16
"""Values a random strength takes."""
CHUNK = 64
"""Images distorted at once; their intermediates fit the processor's cache."""
NOISE_DEVIATION = 147.8
"""Standard deviation of the sum of four random bytes, sqrt(4 (256² - 1) / 12)."""


def open_hard_digits() -> Source:
    """Return the distorted copies, grouped by original."""
    plain = digits()
    copies = np.concatenate([distorted(plain.pixels, copy) for copy in range(COPIES)])
    groups = np.tile(np.arange(len(plain.labels)), COPIES)
    return source_in_memory(CLASSES, Part(copies, np.tile(plain.labels, COPIES)), groups=groups)


def distorted(pixels: Pixels, copy: int) -> Pixels:
    """Return one distorted copy of every image: uint8 [M,S,S] to uint8 [M,32,32].

    An image depends on its pixels, its position and ``copy`` alone.
    """
    count = len(pixels)
    coefficients = _inverse_affine(count, copy, pixels.shape[1])
    rectangles = _rectangles(count, copy)
    padded = np.pad(pixels, ((0, 0), (1, 2), (1, 2))).astype(np.int32)
    noise = _noise(count, copy)
    result = np.empty((count, SIDE, SIDE), np.uint8)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        grey = _cover(_sample(padded[part], coefficients[:, part]), rectangles[:, part])
        result[part] = np.clip(grey + noise[part], 0, 255)
    return result


def _random(what: str, copy: int, count: int, high: int = STEPS) -> Integers:
    """Return a number from 0 to ``high - 1`` for every image, int64 [count]."""
    return random_integers(stream_key("digits-hard", what, copy), high, (count,)).numpy()


def _between(step: Integers, low: float, high: float) -> Floats:
    return low + step * ((high - low) / (STEPS - 1))


def _inverse_affine(count: int, copy: int, source_side: int) -> Integers:
    """Return (cos, sin, x, y) of every image, with ``FRACTION`` bits after the point, int64 [4,count].

    Pixel (i, j) of the image, counted from its centre, is found in the padded original at
    (cos i + sin j + x, cos j - sin i + y). Sine and cosine come from the tangent of half the angle, for
    quotients are rounded alike everywhere and trigonometric functions are not.
    """
    half = _between(_random("rotation", copy, count), -ROTATION, ROTATION)
    scale = _between(_random("scale", copy, count), *SCALE)
    right = _between(_random("shift x", copy, count), -SHIFT, SHIFT) * SIDE
    down = _between(_random("shift y", copy, count), -SHIFT, SHIFT) * SIDE
    ratio = source_side / (SIDE * scale)
    cos = ratio * (1 - half * half) / (1 + half * half)
    sin = ratio * (2 * half) / (1 + half * half)
    # The centre of the padded original: one pixel is added in front, and pixel 0 has its centre at 0.
    centre = (source_side + 1) / 2
    x = centre - cos * right - sin * down
    y = centre - cos * down + sin * right
    return np.rint(np.stack([cos, sin, x, y]) * (1 << FRACTION)).astype(np.int64)


def _sample(padded: npt.NDArray[np.int32], coefficients: Integers) -> npt.NDArray[np.int32]:
    """Return the grey values of rotated, scaled and shifted images [B,32,32], bilinear between pixels."""
    cos, sin, x, y = coefficients[:, :, None, None]
    steps = 2 * np.arange(SIDE) - (SIDE - 1)
    i, j = steps[None, None, :], steps[None, :, None]
    limit = (padded.shape[1] - 2) << FRACTION
    column = np.clip(((cos * i + sin * j) >> 1) + x, 0, limit).astype(np.int32)
    row = np.clip(((cos * j - sin * i) >> 1) + y, 0, limit).astype(np.int32)
    width = padded.shape[2]
    image = np.arange(len(padded), dtype=np.int32)[:, None, None] * padded[0].size
    corner = image + (row >> FRACTION) * width + (column >> FRACTION)
    right, down = (column >> FRACTION - 8) & 255, (row >> FRACTION - 8) & 255
    flat = padded.ravel()
    above = flat[corner] * (256 - right) + flat[corner + 1] * right
    below = flat[corner + width] * (256 - right) + flat[corner + width + 1] * right
    return (above * (256 - down) + below * down) >> 16


def _rectangles(count: int, copy: int) -> Integers:
    """Return (left, right, top, bottom, grey) of the rectangle that covers a part of every image, [5,count]."""
    low, high = (round(side * SIDE) for side in COVER)
    width = low + _random("cover width", copy, count, high - low + 1)
    height = low + _random("cover height", copy, count, high - low + 1)
    left = _random("cover left", copy, count) * (SIDE - width + 1) // STEPS
    top = _random("cover top", copy, count) * (SIDE - height + 1) // STEPS
    return np.stack([left, left + width, top, top + height, _random("cover grey", copy, count, 256)])


def _cover(grey: npt.NDArray[np.int32], rectangles: Integers) -> npt.NDArray[np.int32]:
    left, right, top, bottom, cover = rectangles[:, :, None, None]
    pixel = np.arange(SIDE)
    columns = (pixel >= left) & (pixel < right)
    rows = (pixel[:, None] >= top) & (pixel[:, None] < bottom)
    return np.where(columns & rows, cover.astype(np.int32), grey)


def _noise(count: int, copy: int) -> npt.NDArray[np.int32]:
    """Return nearly Gaussian noise, int32 [count,32,32]: centred sums of four random bytes, scaled."""
    bits = random_bits(stream_key("digits-hard", "noise", copy), count * SIDE * SIDE // 2).numpy()
    words = bits.astype("<i8").view("<u4").reshape(count, SIDE, SIDE)
    pairs = (words & 0xFF00FF) + ((words >> 8) & 0xFF00FF)
    total = ((pairs & 0xFFFF) + (pairs >> 16)).astype(np.int32) - 2 * 255
    return (total * round(NOISE / NOISE_DEVIATION * 256)) >> 8
