"""IDX files, the format of MNIST and its descendants, plain or gzipped.

A file is four bytes ``0 0 type dimensions``, the sizes as big-endian uint32, then the values. Images are
``NAMEtrain-images-idx3-ubyte`` and labels ``NAMEtrain-labels-idx1-ubyte``; the test part has ``t10k`` or
``test`` for ``train``.
"""

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np

from engine.data.decode import Pixels
from engine.data.source import Part, Source, source_in_memory
from engine.errors import UserError

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
TEST_PARTS = ("t10k", "test")
MAX_BYTES = 1 << 33
"""Largest array read, so that a small gzip file cannot fill the memory."""


def is_idx(path: Path) -> bool:
    """Return whether ``path`` is an IDX file of training images, or a folder with one."""
    return bool(_training_files(path))


def open_idx(path: Path) -> Source:
    """Read the training part, and the test part where there is one.

    Raises UserError when there are several data sets, a file is damaged or missing, or labels do not fit.
    """
    found = _training_files(path)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{str(path)!r} holds several data sets; give the path of one of {names}")
    folder, prefix = found[0].parent, found[0].name.partition(f"train-{IMAGES}")[0]
    train = _read_part(folder, f"{prefix}train")
    tests = [f"{prefix}{part}" for part in TEST_PARTS if _existing(folder, f"{prefix}{part}-{IMAGES}")]
    test = _read_part(folder, tests[0]) if tests else None

    values = np.unique(train.labels)
    for part in filter(None, (train, test)):
        if part.pixels.shape[1:] != train.pixels.shape[1:]:
            raise UserError(f"{str(folder)!r}: training and test images differ in size; restore the files")
        unknown = np.setdiff1d(part.labels, values)
        if len(unknown):
            raise UserError(f"{str(folder)!r}: test label {unknown[0]} is no training label; restore the files")
    return source_in_memory(
        tuple(str(value) for value in values),
        Part(train.pixels, np.searchsorted(values, train.labels)),
        test and Part(test.pixels, np.searchsorted(values, test.labels)),
    )


def _training_files(path: Path) -> list[Path]:
    candidates = [path] if path.is_file() else sorted(path.glob(f"*train-{IMAGES}*")) if path.is_dir() else []
    endings = (f"train-{IMAGES}", f"train-{IMAGES}.gz")
    files = [file for file in candidates if file.name.endswith(endings)]
    # Where both a file and its gzipped original lie there, the plain one is read.
    return [file for file in files if file.suffix != ".gz" or file.with_suffix("") not in files]


def _existing(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_part(folder: Path, part: str) -> Part:
    images, labels = (_existing(folder, f"{part}-{suffix}") for suffix in (IMAGES, LABELS))
    if images is None or labels is None:
        missing = f"{part}-{LABELS if images else IMAGES}"
        raise UserError(f"{str(folder)!r} has no {missing}[.gz]; restore it")
    pixels, values = _read_array(images, 3), _read_array(labels, 1)
    if len(pixels) != len(values):
        raise UserError(f"{str(images)!r} has {len(pixels)} images but {len(values)} labels; restore both files")
    return Part(pixels, values)


def _read_array(path: Path, dimensions: int) -> Pixels:
    """Read uint8 values of known dimensions. Raises UserError unless header and length are exactly right."""
    header = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(header)
            if len(head) < header or head[:4] != bytes((0, 0, 8, dimensions)):
                raise UserError(
                    f"{str(path)!r} begins with {head[:4].hex(' ')}, an IDX file of bytes in {dimensions} "
                    f"dimensions with 00 00 08 0{dimensions}; restore it"
                )
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = prod(shape)
            if not 0 < size <= MAX_BYTES:
                raise UserError(f"{str(path)!r} claims {shape} values; 1 to {MAX_BYTES} are legal; restore it")
            body = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); restore it") from None
    if len(body) != size:
        found = "more" if len(body) > size else f"{len(body)}"
        raise UserError(f"{str(path)!r} has {found} of the {size} bytes its header claims; restore it")
    return np.frombuffer(body, np.uint8).reshape(shape)
