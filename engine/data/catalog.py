"""The table of data sources. A new source is one entry here and one function that returns a ``Source``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.data.cifar import CIFAR10, CIFAR100, is_cifar, open_cifar
from engine.data.digits import CLASSES, digits
from engine.data.folder import is_folder, open_folder
from engine.data.hard_digits import open_hard_digits
from engine.data.idx import is_idx, open_idx
from engine.data.preprocessing import Augmentation, Preprocessing
from engine.data.source import Source, source_in_memory
from engine.errors import UserError

BUILT_IN = ("digits", "digits-hard")
"""Specs that name a source that needs no files."""


@dataclass(frozen=True)
class Kind:
    """One kind of data source.

    description   what a legal spec of this kind is, for a person
    accepts       whether a spec is of this kind
    open          reads it
    resolution    natural side in pixels
    enlarge       stored side over the side the network reads: room for the centre crop
    mean, std     of the channels R, G, B, on the scale 0–1
    augmentation  that keeps the labels true
    """

    description: str
    accepts: Callable[[str], bool]
    open: Callable[[Path], Source]
    resolution: int
    enlarge: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augmentation: Augmentation

    def preprocessing(self, resolution: int | None) -> Preprocessing:
        """Return the preprocessing for ``resolution`` pixels, or the natural side. Raises UserError."""
        side = self.resolution if resolution is None else resolution
        return Preprocessing(side, round(side * self.enlarge), self.mean, self.std)


# Means and deviations: of the digits and the hard ones at 32 px, measured; the others are those published for ImageNet,
# CIFAR-10, CIFAR-100 and MNIST. A mirrored digit is another sign, so digits are not flipped.
_WRITING = Augmentation(scale=(0.7, 1.0), ratio=(0.9, 1.1), flip=False)
_SMALL_PHOTO = Augmentation(scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3), flip=True)
_PHOTO = Augmentation(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=True)

KINDS = (
    Kind(
        description="'digits' (scikit-learn's handwritten digits)",
        accepts=lambda spec: spec == "digits",
        open=lambda _: source_in_memory(CLASSES, digits()),
        resolution=32,
        enlarge=1,
        mean=(0.3055, 0.3055, 0.3055),
        std=(0.3235, 0.3235, 0.3235),
        augmentation=_WRITING,
    ),
    Kind(
        description="'digits-hard' (the same, rotated, scaled, shifted, partly covered and noisy)",
        accepts=lambda spec: spec == "digits-hard",
        open=lambda _: open_hard_digits(),
        resolution=32,
        enlarge=1,
        mean=(0.2619, 0.2619, 0.2619),
        std=(0.3007, 0.3007, 0.3007),
        augmentation=_WRITING,
    ),
    Kind(
        description="a folder with train/CLASS/IMAGE and optionally val/CLASS/IMAGE",
        accepts=lambda spec: is_folder(Path(spec).expanduser()),
        open=open_folder,
        resolution=224,
        enlarge=8 / 7,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augmentation=_PHOTO,
    ),
    Kind(
        description="a folder with CIFAR-10's data_batch_1 … 5 or data_batch_1.bin … 5.bin",
        accepts=lambda spec: is_cifar(Path(spec).expanduser(), CIFAR10),
        open=lambda path: open_cifar(path, CIFAR10),
        resolution=32,
        enlarge=1,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augmentation=_SMALL_PHOTO,
    ),
    Kind(
        description="a folder with CIFAR-100's train or train.bin",
        accepts=lambda spec: is_cifar(Path(spec).expanduser(), CIFAR100),
        open=lambda path: open_cifar(path, CIFAR100),
        resolution=32,
        enlarge=1,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augmentation=_SMALL_PHOTO,
    ),
    Kind(
        description="a folder with NAMEtrain-images-idx3-ubyte[.gz], or that file",
        accepts=lambda spec: is_idx(Path(spec).expanduser()),
        open=open_idx,
        resolution=32,
        enlarge=1,
        mean=(0.1307, 0.1307, 0.1307),
        std=(0.3081, 0.3081, 0.3081),
        augmentation=_WRITING,
    ),
)


def find_kind(spec: str) -> Kind:
    """Return the kind of source that ``spec`` names. Raises UserError, listing the legal ones, for none."""
    for kind in KINDS:
        if kind.accepts(spec):
            return kind
    legal = "; ".join(kind.description for kind in KINDS)
    missing = "" if Path(spec).expanduser().exists() else " (no such path)"
    raise UserError(f"data {spec!r}{missing}: give {legal}")
