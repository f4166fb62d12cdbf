"""What every data source provides, whatever it was read from."""

import hashlib
from dataclasses import dataclass

import numpy as np

from engine.data.decode import ArrayImages, Images, Pixels


@dataclass(frozen=True)
class Source:
    """Labelled images before any of them is decoded for use.

    classes        name of every class
    labels         class index of every image
    official_test  indices of the images the source sets aside for testing; empty when it does not
    images         decodes image ``index``
    fingerprint    of everything above: SHA-256, in hexadecimal
    files          "relative/path:bytes" of every file, for a folder tree; empty for data held in memory
    groups         of every image, the number of its group: a split takes all of a group or none; empty where
                   every image stands for itself
    """

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    official_test: range
    images: Images
    fingerprint: str
    files: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """Images in memory, uint8 [M,H,W] (grey) or [M,H,W,3] (RGB), and their labels, integer [M]."""

    pixels: Pixels
    labels: np.ndarray


def source_in_memory(
    classes: tuple[str, ...], train: Part, test: Part | None = None, groups: np.ndarray | None = None
) -> Source:
    """Make a source of a training part and, where there is one, the official test part.

    Labels are indices into ``classes``; the caller has checked them. ``groups``, integer [M], are those of
    `Source`.
    """
    parts = [train] if test is None else [train, test]
    pixels = np.concatenate([part.pixels for part in parts])
    labels = np.concatenate([part.labels for part in parts]).astype(np.int64)
    official_test = range(len(train.labels), len(labels))
    description = f"{classes} {pixels.shape} {official_test}"
    content = hashlib.sha256(description.encode())
    content.update(pixels.tobytes())
    content.update(labels.astype("<i8").tobytes())
    if groups is not None:
        content.update(groups.astype("<i8").tobytes())
    return Source(
        classes=classes,
        labels=tuple(labels.tolist()),
        official_test=official_test,
        images=ArrayImages(pixels),
        fingerprint=content.hexdigest(),
        groups=() if groups is None else tuple(groups.tolist()),
    )
