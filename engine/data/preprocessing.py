"""From stored uint8 images to what a network reads: the evaluation path, and training augmentation.

    eval   stored [B,3,R,R] → centre crop → normalise → float32 [B,3,resolution,resolution]
    train  stored [B,3,R,R] → random resized crop, flip → normalise → the same

``R`` is ``Preprocessing.resize``. Both paths run on the device of the images.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import UserError

PIECE = 2**20
"""Values of stored images augmented at a time on a CPU: what is made of them on the way then stays in its cache."""

RESOLUTIONS = (8, 1024)
"""Legal range of the side a network reads, in pixels."""

WHOLE = slice(None)
"""All images of a batch."""


@dataclass(frozen=True)
class Preprocessing:
    """How an evaluated image is prepared; stored with every checkpoint, compared with ``==`` on load.

    resolution  side of the square the network reads, in pixels
    resize      shorter side before the centre crop, in pixels; images are stored as its square
    mean, std   of the channels R, G, B, on the scale 0–1

    Raises UserError when a value is out of range.
    """

    resolution: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        low, high = RESOLUTIONS
        if type(self.resolution) is not int or not low <= self.resolution <= high:
            raise UserError(f"resolution {self.resolution!r}: choose {low} to {high} pixels")
        if type(self.resize) is not int or not self.resolution <= self.resize <= 2 * high:
            raise UserError(f"resize {self.resize!r}: choose {self.resolution} to {2 * high} pixels")
        if not _are_numbers(self.mean, 3) or not 0 <= min(self.mean) <= max(self.mean) <= 1:
            raise UserError(f"mean {self.mean!r}: give three numbers from 0 to 1")
        if not _are_numbers(self.std, 3) or not 0 < min(self.std) <= max(self.std) <= 1:
            raise UserError(f"std {self.std!r}: give three numbers above 0, up to 1")

    def __call__(self, images_u8: Tensor) -> Tensor:
        """Centre-crop and normalise stored images.

        images_u8  uint8 [B,3,resize,resize]

        Returns float32 [B,3,resolution,resolution]. Raises ValueError when the images are not of that shape.
        """
        self.check_stored(images_u8)
        start = (self.resize - self.resolution) // 2
        crop = slice(start, start + self.resolution)
        return self.normalise(images_u8[:, :, crop, crop].float())

    def normalise(self, images: Tensor) -> Tensor:
        """``(images / 255 - mean) / std`` for float32 images [B,3,H,W] on the scale 0–255."""
        scale = _constant(tuple(1 / (255 * std) for std in self.std), images.device)
        shift = _constant(tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True)), images.device)
        return torch.addcmul(shift[:, None, None], images, scale[:, None, None])

    def check_stored(self, images_u8: Tensor) -> None:
        """Raise ValueError unless ``images_u8`` is uint8 [B,3,resize,resize]."""
        if images_u8.dtype != torch.uint8 or images_u8.shape[1:] != (3, self.resize, self.resize):
            raise ValueError(
                f"images are {images_u8.dtype} {list(images_u8.shape)}; "
                f"this preprocessing reads uint8 [B, 3, {self.resize}, {self.resize}]"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_dict`` restores an equal object."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Restore from ``to_dict``. Raises UserError when a field is missing, unknown or out of range."""
        return cls(**_fields_of(cls, values))


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image before it is normalised.

    scale  range of the crop's area, as a fraction of the stored image
    ratio  range of the crop's width over height, drawn uniformly in its logarithm
    flip   mirror every second image on average; for data where a mirrored image keeps its label

    Raises UserError when a range is empty or out of bounds.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool

    def __post_init__(self) -> None:
        if not _are_numbers(self.scale, 2) or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"augmentation scale {self.scale!r}: give (low, high) with 0 < low <= high <= 1")
        if not _are_numbers(self.ratio, 2) or not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"augmentation ratio {self.ratio!r}: give (low, high) with 0 < low <= high")
        if not isinstance(self.flip, bool):
            raise UserError(f"augmentation flip {self.flip!r}: give true or false")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_dict`` restores an equal object."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Restore from ``to_dict``. Raises UserError when a field is missing, unknown or out of range."""
        return cls(**_fields_of(cls, values))


def augment(
    images_u8: Tensor,
    augmentation: Augmentation,
    preprocessing: Preprocessing,
    generator: torch.Generator,
    part: slice = WHOLE,
    batch: int | None = None,
) -> Tensor:
    """Random resized crop, flip and normalise a batch on the device it lives on.

    A crop of area ``a`` and aspect ``r`` is ``sqrt(a r)`` wide and ``sqrt(a / r)`` high, as fractions of the
    stored image and at most 1, placed uniformly, and resampled bilinearly.

    images_u8  uint8 [B,3,resize,resize]
    generator  of the CPU, whatever the device of the images, so every device sees the same crops; each image
               takes five numbers from it whatever the augmentation
    part       where the images stand in a batch of ``batch``; they get the crops that they would get with the others

    Returns float32 [B,3,resolution,resolution], channels last in memory. Raises ValueError when the images are
    not stored images of this preprocessing.
    """
    preprocessing.check_stored(images_u8)
    count, resolution = len(images_u8), preprocessing.resolution
    area, aspect, left, top, mirror = torch.rand(5, batch or count, generator=generator)[:, part]
    area = _between(area, *augmentation.scale)
    aspect = _between(aspect, math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1])).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    sign = torch.where(mirror < 0.5, -1.0, 1.0) if augmentation.flip else torch.ones(count)

    # Output coordinates in [-1, 1] to input coordinates in [-1, 1]: x ↦ width x + centre.
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * sign, (2 * left - 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, (2 * top - 1) * (1 - height)
    device = images_u8.device
    result = torch.empty(count, 3, resolution, resolution, device=device, memory_format=torch.channels_last)
    piece = max(1, PIECE // (3 * preprocessing.resize**2)) if device.type == "cpu" else max(1, count)
    for some, transform, images in zip(
        result.split(piece), theta.to(device).split(piece), images_u8.split(piece), strict=True
    ):
        grid = functional.affine_grid(transform, list(some.shape), align_corners=False)
        crops = functional.grid_sample(
            images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        some.copy_(preprocessing.normalise(crops))
    return result


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, copied there once: a GPU would have to be waited for every time."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def _between(unit: Tensor, low: float, high: float) -> Tensor:
    return low + unit * (high - low)


def _are_numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )


def _plain(values: Preprocessing | Augmentation) -> dict[str, Any]:
    """Return the fields with tuples as lists, as they come back from a JSON file."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(values).items()}


def _fields_of(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with lists as tuples, once its keys are exactly the fields of ``cls``."""
    expected = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(values, Mapping) or set(values) != expected:
        raise UserError(
            f"stored {cls.__name__.lower()} {values!r}: expected the fields {', '.join(sorted(expected))}; "
            "the file is damaged or of another version"
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
