"""CIFAR-10 and CIFAR-100 as distributed: python batches (pickles) or binary batches.

The pickles are read without running anything in them: the few names they use become inert stand-ins, and any
other name is refused.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.decode import Pixels
from engine.data.source import Part, Source, source_in_memory
from engine.errors import UserError

SIDE = 32
PIXELS = 3 * SIDE * SIDE
"""Bytes of one image: red plane, green plane, blue plane."""
MAX_BYTES = 1 << 30
"""Largest file read; the largest distributed one has 155 MB."""


@dataclass(frozen=True)
class Layout:
    """How one CIFAR is laid out.

    classes       number of classes
    train, test   names of the batches; with ``.bin`` in the binary version
    label_bytes   leading bytes of a binary record; the last of them is the label
    labels        key of the labels in a python batch
    meta          python file with the class names, and their key in it
    names         text file with the class names, in the binary version
    """

    classes: int
    train: tuple[str, ...]
    test: str
    label_bytes: int
    labels: str
    meta: tuple[str, str]
    names: str


CIFAR10 = Layout(
    classes=10,
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    label_bytes=1,
    labels="labels",
    meta=("batches.meta", "label_names"),
    names="batches.meta.txt",
)
CIFAR100 = Layout(
    classes=100,
    train=("train",),
    test="test",
    label_bytes=2,
    labels="fine_labels",
    meta=("meta", "fine_label_names"),
    names="fine_label_names.txt",
)


def is_cifar(path: Path, layout: Layout) -> bool:
    """Return whether ``path`` has the first training batch of ``layout``, python or binary."""
    return any((path / f"{layout.train[0]}{suffix}").is_file() for suffix in ("", ".bin"))


def open_cifar(path: Path, layout: Layout) -> Source:
    """Read all training batches, and the test batch where it is there.

    Raises UserError when a batch is damaged or a pickle names something it has no use for, and OSError when a
    batch cannot be read.
    """
    binary = not (path / layout.train[0]).is_file()
    suffix, read = (".bin", _read_binary) if binary else ("", _read_python)
    train = [read(path / f"{batch}{suffix}", layout) for batch in layout.train]
    test_path = path / f"{layout.test}{suffix}"
    return source_in_memory(
        _class_names(path, layout, binary),
        Part(np.concatenate([part.pixels for part in train]), np.concatenate([part.labels for part in train])),
        read(test_path, layout) if test_path.exists() else None,
    )


def _read_binary(path: Path, layout: Layout) -> Part:
    content = _read_bytes(path)
    record = layout.label_bytes + PIXELS
    if not content or len(content) % record:
        raise UserError(f"{str(path)!r} has {len(content)} bytes, not a multiple of {record}; restore it")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    if labels.max() >= layout.classes:
        raise UserError(f"{str(path)!r} has a label outside 0 to {layout.classes - 1}; restore it")
    return _part(records[:, layout.label_bytes :], labels)


def _read_python(path: Path, layout: Layout) -> Part:
    batch = _unpickle(path)
    data, labels = batch.get("data"), batch.get(layout.labels)
    planes = data.planes() if isinstance(data, _Array) else None
    if planes is None or not isinstance(labels, list) or len(labels) != len(planes) or not labels:
        raise UserError(f"{str(path)!r} has no uint8 'data' [n, {PIXELS}] with n {layout.labels!r}; restore it")
    if not all(type(label) is int and 0 <= label < layout.classes for label in labels):
        raise UserError(f"{str(path)!r} has a label outside 0 to {layout.classes - 1}; restore it")
    return _part(planes, np.array(labels))


def _part(planes: Pixels, labels: np.ndarray) -> Part:
    """Return images stored as rows of ``PIXELS`` bytes, with their labels."""
    return Part(planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels)


def _class_names(path: Path, layout: Layout, binary: bool) -> tuple[str, ...]:
    """Return the class names the data comes with, or their numbers where its file of names is not there."""
    meta, key = layout.meta
    file = path / (layout.names if binary else meta)
    if not file.exists():
        return tuple(str(label) for label in range(layout.classes))
    names = _read_bytes(file).decode("utf-8", "replace").split() if binary else _unpickle(file).get(key)
    if not isinstance(names, list) or not len(names) == len(set(map(str, names))) == layout.classes:
        raise UserError(f"{str(file)!r} does not name {layout.classes} classes; restore it")
    return tuple(map(str, names))


def _read_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{str(path)!r} has {size} bytes; {MAX_BYTES} is the most a batch may have")
    return path.read_bytes()


class _Array:
    """Stands in for ``numpy.ndarray`` while unpickling: keeps the state, interprets nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def planes(self) -> Pixels | None:
        """Return the uint8 [count,PIXELS] array that was pickled; None for any other."""
        match self.state:
            case (_, (int(count), 3072), _DType(code="u1"), bool(fortran), bytes(content)):
                if len(content) == count * PIXELS:
                    return np.frombuffer(content, np.uint8).reshape(count, PIXELS, order="F" if fortran else "C")
        return None


class _DType:
    """Stands in for ``numpy.dtype``: keeps the type code."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = _text(code)

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, *_: Any) -> bytes:
    return text.encode("latin-1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which image batches do not use")
        return _STAND_INS[module, name]


def _unpickle(path: Path) -> dict[str, Any]:
    """Return the dictionary in a pickle, its strings as text, running nothing. Raises UserError."""
    pickled = io.BytesIO(_read_bytes(path))
    try:
        content = _Unpickler(pickled, encoding="bytes").load()
    except Exception as error:  # A hostile pickle can make the unpickler raise anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{str(path)!r} is not a CIFAR batch ({reason}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is not a CIFAR batch (no dictionary in it); download it again")
    return {_text(key): [_text(item) for item in v] if isinstance(v, list) else v for key, v in content.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
