"""Real digits, written in the formats the sources read."""

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def digits(per_class: int, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 pixels [M,8,8] and int64 labels [M] of the first digits of each class, class by class."""
    source = load_digits()
    chosen = np.concatenate([np.flatnonzero(source.target == label)[:per_class] for label in range(classes)])
    return np.rint(source.images[chosen] * (255 / 16)).astype(np.uint8), source.target[chosen]


def enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return uint8 [M,side,side] of grey images, resampled."""
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in pixels])


def write_tree(part: Path, per_class: int = 10, classes: int = 3, suffix: str = "png") -> None:
    """Write ``part/CLASS/0.png`` … of real digits, 24 by 20 pixels."""
    for number, (pixels, label) in enumerate(zip(*digits(per_class, classes), strict=True)):
        folder = part / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((24, 20)).save(folder / f"{number % per_class}.{suffix}")


def cifar_planes(pixels: np.ndarray) -> np.ndarray:
    """Return uint8 [M,3072]: red, green and blue plane, each of another brightness."""
    grey = enlarged(pixels, 32)
    return np.stack([grey, grey // 2, grey // 3], axis=1).reshape(len(grey), -1)


def write_cifar10(folder: Path, binary: bool, per_class: int = 2) -> None:
    """Write five training batches and a test batch, each of other digits."""
    folder.mkdir(exist_ok=True)
    pixels, labels = digits(6 * per_class)
    planes = cifar_planes(pixels)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for start, name in enumerate(names):
        part, part_labels = planes[start::6], labels[start::6]
        if binary:
            write_binary(folder / f"{name}.bin", part, part_labels)
        else:
            write_pickle(folder / name, {b"data": part, b"labels": part_labels.tolist()})


def write_binary(path: Path, planes: np.ndarray, *labels: np.ndarray) -> None:
    """Write binary records: the labels, one byte each, then the planes."""
    columns = [*(label[:, None].astype(np.uint8) for label in labels), planes]
    path.write_bytes(np.concatenate(columns, axis=1).tobytes())


def write_pickle(path: Path, content: Any) -> None:
    """Write a pickle of the protocol that Python 2 and the distributed batches use."""
    path.write_bytes(pickle.dumps(content, protocol=2))


def idx_bytes(values: np.ndarray) -> bytes:
    """Return a uint8 array as an IDX file."""
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, part: str, pixels: np.ndarray, labels: np.ndarray, zipped: bool = False) -> None:
    """Write the image and label file of ``part`` ("train", "t10k")."""
    folder.mkdir(exist_ok=True)
    for name, values in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", labels)):
        content = idx_bytes(values)
        file = folder / f"{part}-{name}{'.gz' if zipped else ''}"
        file.write_bytes(gzip.compress(content) if zipped else content)
