"""A tree of images with a folder for each class: ``train/CLASS/IMAGE`` and optionally ``val/CLASS/IMAGE``.

Hidden files, and files whose suffix is not in ``SUFFIXES``, are not images and are passed over.
"""

from pathlib import Path

from engine.data.decode import FileImages
from engine.data.source import Source
from engine.errors import UserError
from engine.files import sha256_json

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def is_folder(path: Path) -> bool:
    """Return whether ``path`` has a folder ``train``."""
    return (path / "train").is_dir()


def open_folder(root: Path) -> Source:
    """List the images under ``root``, by class and name whatever the order of the file system; decode none.

    ``val`` becomes the test split. Raises UserError when a part holds no image, ``val`` has a class that
    ``train`` has not, or a folder lies where an image belongs.
    """
    classes = tuple(path.name for path in _visible(root / "train") if path.is_dir())
    train = _list_part(root / "train", classes)
    test = _list_part(root / "val", classes) if (root / "val").is_dir() else []
    paths = tuple(path.relative_to(root).as_posix() for path, _ in train + test)
    sizes = [path.stat().st_size for path, _ in train + test]
    files = tuple(f"{path}:{size}" for path, size in zip(paths, sizes, strict=True))
    return Source(
        classes=classes,
        labels=tuple(label for _, label in train + test),
        official_test=range(len(train), len(paths)),
        images=FileImages(root.resolve(), paths),
        fingerprint=sha256_json([classes, files]),
        files=files,
    )


def _list_part(part: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Return the images of one part with the index of their class."""
    labels = {name: label for label, name in enumerate(classes)}
    found = []
    for folder in _visible(part):
        if not folder.is_dir():
            continue
        if folder.name not in labels:
            raise UserError(f"class {folder.name!r} is in {str(part)!r} but not in train; remove or rename it")
        for path in _visible(folder):
            if path.is_dir():
                raise UserError(f"{str(path)!r} is a folder; put its images into the folder of their class")
            if path.suffix.lower() in SUFFIXES:
                found.append((path, labels[folder.name]))
    if not found:
        raise UserError(f"{str(part)!r} holds no image; expected CLASS/IMAGE, of {' '.join(sorted(SUFFIXES))}")
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
