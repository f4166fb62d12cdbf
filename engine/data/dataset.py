"""Open a data source: decode and verify it, split it, and keep it on the device when it fits."""

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.data.cache import open_cache
from engine.data.catalog import BUILT_IN, find_kind
from engine.data.decode import FileImages, Images, Pixels
from engine.data.images import ImageSet, Stream
from engine.data.loader import CHUNK, MAX_WORKERS, decode_batches, with_progress
from engine.data.preprocessing import Augmentation, Preprocessing
from engine.data.splits import SPLIT_NAMES, Splits, make_splits
from engine.errors import UserError

log = logging.getLogger(__name__)

FEW_IMAGES = 512
"""Below this many images, starting worker processes takes longer than decoding."""


@dataclass(frozen=True, eq=False)
class Data:
    """An opened data source.

    name           "digits", "digits-hard", or the last part of the path
    classes        name of every class
    preprocessing  of the evaluation path; what a checkpoint stores
    augmentation   that suits the source
    splits         which image belongs where; what a run stores
    device         that images and labels live on
    quarantined    names of images that could not be decoded, and are in no split
    sets           the images of each split; use ``subset``
    groups         of every image of the source, the number of its group (see `Source`); or empty
    """

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    augmentation: Augmentation
    splits: Splits
    device: torch.device
    quarantined: tuple[str, ...]
    sets: Mapping[str, ImageSet]
    groups: tuple[int, ...] = ()

    def subset(self, name: str) -> ImageSet:
        """Return the images of one split. Raises UserError when there is no such split."""
        if name not in self.sets:
            raise UserError(f"split {name!r}: choose one of {', '.join(SPLIT_NAMES)}")
        return self.sets[name]


def open_data(
    spec: str = "digits",
    *,
    resolution: int | None = None,
    device: str | torch.device = "cpu",
    splits: Splits | None = None,
    seed: int = 0,
    workers: int | None = None,
    memory_limit: int | None = None,
    cache: str | Path | None = None,
    build_cache: bool = True,
) -> Data:
    """Open the images that ``spec`` names.

    spec          "digits", "digits-hard", or a path whose content decides how it is read (see ``engine.data.catalog``)
    resolution    side in pixels the network reads; None: the natural one of the source
    device        where images and labels live
    splits        of a stored run, verified against the data; None: made from ``seed``
    workers       processes that decode; 0: this one; None: as many as help
    memory_limit  bytes the decoded images may take on the device before they are streamed instead; None: a
                  quarter of what is free there and on the host
    cache         folder that keeps decoded images, so that none is decoded twice (see ``engine.data.cache``)
    build_cache   whether to make the cache, or what is missing of it; else it is used only where it is whole

    An image that cannot be decoded is logged, listed in ``Data.quarantined`` and left out of the splits. That
    may befall 0.1 % of the images, or one where that is less than one; with stored splits, none of theirs.
    Every file is decoded once for this before a run starts; a resumed run that streams trusts that pass.

    Raises UserError when ``spec`` or ``resolution`` is not legal, a file is damaged, too many images are
    corrupt, the data is not what ``splits`` were made from, or a cache is asked for and there is nothing to decode
    or it cannot be made.
    """
    try:
        kind = find_kind(spec)
        source = kind.open(Path(spec).expanduser())
    except OSError as error:
        raise UserError(f"data {spec!r} cannot be read: {error}; restore it") from None
    preprocessing = kind.preprocessing(resolution)
    device, size, count = torch.device(device), preprocessing.resize, len(source.labels)
    if splits is not None:
        splits.verify(source.fingerprint, count, source.files)
    members: Collection[int] = range(count) if splits is None else set(splits.members)
    chosen = sorted(members)

    limit = _default_memory_limit(device) if memory_limit is None else memory_limit
    resident = len(chosen) * 3 * size * size <= limit
    if workers is None:
        quick = count < FEW_IMAGES or (resident and not source.files)
        workers = 0 if quick else min(MAX_WORKERS, os.cpu_count() or 1)

    images = source.images
    corrupt = _Corrupt(images, members, max(1, count // 1000) if splits is None else 0)
    cached = None
    if cache is not None:
        if not isinstance(images, FileImages):
            raise UserError(f"--cache {cache}: the images of {spec!r} need no decoding; do without it")
        folder = Path(cache).expanduser()
        cached = open_cache(folder, images, size, report=corrupt, workers=workers, build=build_cache)
    if cached is not None:
        images, workers = cached, 0  # Reading takes no time that a process would save.

    pixels = np.empty((len(chosen), 3, size, size), np.uint8) if resident else None
    if resident or (source.files and splits is None and cached is None):
        _decode_all(images, [index for index in chosen if index not in corrupt], size, workers, corrupt, pixels)
    if splits is None:
        splits = make_splits(
            source.labels,
            source.classes,
            official_test=source.official_test,
            excluded=corrupt.indices,
            seed=seed,
            fingerprint=source.fingerprint,
            files=source.files,
            groups=source.groups,
        )

    labels = torch.tensor(source.labels)
    row_of = torch.empty(count, dtype=torch.int64)
    whole = [index for index in chosen if index not in corrupt]
    row_of[whole] = torch.arange(len(whole))
    sets = {}
    for name in SPLIT_NAMES:
        indices = torch.tensor(getattr(splits, name), dtype=torch.int64)
        stored: Tensor | Stream = Stream(images, size, workers)
        if pixels is not None:
            stored = torch.from_numpy(pixels)[row_of[indices]].to(device)
        sets[name] = ImageSet(name, indices, labels[indices].to(device), stored)
    members = set(splits.members)
    return Data(
        name=spec if spec in BUILT_IN else Path(spec).expanduser().resolve().name,
        classes=source.classes,
        preprocessing=preprocessing,
        augmentation=kind.augmentation,
        splits=splits,
        device=device,
        quarantined=tuple(source.images.name(index) for index in range(count) if index not in members),
        sets=sets,
        groups=source.groups,
    )


@dataclass(frozen=True)
class _Corrupt:
    """The images among ``chosen`` that turned out corrupt; more than ``allowed`` are too many."""

    images: Images
    chosen: Collection[int]
    allowed: int
    indices: set[int] = field(default_factory=set)

    def __contains__(self, index: int) -> bool:
        return index in self.indices

    def __call__(self, failures: Mapping[int, str]) -> None:
        """Note images that cannot be decoded, and why. Raises UserError as soon as there are too many."""
        for index in sorted(failures):
            if index in self.chosen:
                log.warning("quarantined %r: %s", self.images.name(index), failures[index])
                self.indices.add(index)
        if len(self.indices) > self.allowed:
            names = ", ".join(repr(self.images.name(index)) for index in sorted(self.indices)[:5])
            raise UserError(
                f"at least {len(self.indices)} of {len(self.chosen)} images cannot be decoded, at most {self.allowed} "
                f"may: {names}; restore them, or remove them and start a new run"
            )


def _decode_all(
    images: Images, chosen: Sequence[int], size: int, workers: int, corrupt: _Corrupt, pixels: Pixels | None
) -> None:
    """Decode the ``chosen`` images once, into the rows of ``pixels`` where given; tell ``corrupt`` of failures."""
    chunks = (list(chosen[start : start + CHUNK]) for start in range(0, len(chosen), CHUNK))
    row = 0
    for batch in with_progress(decode_batches(images, size, chunks, workers), "checking images", len(chosen)):
        if pixels is not None:
            pixels[row : row + len(batch.indices)] = batch.images
        row += len(batch.indices)
        corrupt(batch.failures)


def _default_memory_limit(device: torch.device) -> int:
    """Return a quarter of the free memory of the host, or of the device where that is less; in bytes."""
    free = _free_host_memory()
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free // 4


def _free_host_memory() -> int:
    """Return the memory the system can hand out, in bytes; all of it where it does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
