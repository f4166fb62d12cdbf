"""Images decoded once: what the decoder gave, in files that later epochs and later runs map into memory.

    DIR/NAME-256px-1f0a9c3e/         images of one folder (by its name, and a digest of where it is) at one stored side
        block-0003.u8                uint8 [images of the block,3,256,256]
        block-0003.json              what they are of, and the SHA-256 of each; sealed, and written last

A block is used if its header is whole and was written for just these files (name, bytes, time of modification) by this
decoder, and the block has its length. An image is compared with its SHA-256 whenever it is read. So a read image is
the decoded one, bit for bit; whatever else lies there is decoded anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from engine.data.decode import DECODER, DecodeError, FileImages, Pixels
from engine.data.loader import CHUNK, Batch, decode_batches, with_progress
from engine.errors import UserError
from engine.files import free_space, read_sealed, sha256_json, write_atomically

log = logging.getLogger(__name__)

SCHEMA = "metaprune.decoded/1"
LEAST_BLOCK, MOST_BLOCKS = 1024, 256
"""Images of a block, at least: what a build that was killed does again. Blocks, at most: each is an open file."""
DIGEST_BYTES = hashlib.sha256().digest_size
ABSENT = ""

Origin = Mapping[str, object]
Report = Callable[[Mapping[int, str]], None]
"""Told of images that cannot be decoded, and why; may raise UserError to give up."""


@dataclass(frozen=True, eq=False)
class Block:
    """Decoded images that can be used: ``pixels`` is uint8 [M,3,size,size]; ``failures`` have zeros there."""

    pixels: Pixels
    digests: bytes
    failures: Mapping[int, str]


@dataclass(frozen=True, eq=False)
class CachedImages:
    """Numbered images that are read instead of decoded, as `Images`.

    files      decodes an image whose stored pixels are damaged
    size       stored side, in pixels
    per_block  images of every block but the last
    folder     of the blocks
    """

    files: FileImages
    size: int
    per_block: int
    folder: Path
    blocks: tuple[Block, ...]
    _damaged: set[int] = field(default_factory=set)

    def __call__(self, index: int, size: int) -> Pixels:
        if size != self.size:
            raise ValueError(f"images are stored at {self.size} px, not {size}")
        number, row = divmod(index, self.per_block)
        block = self.blocks[number]
        if index in block.failures:
            raise DecodeError(block.failures[index])
        pixels = np.array(block.pixels[row])
        if hashlib.sha256(pixels.data).digest() == block.digests[DIGEST_BYTES * row : DIGEST_BYTES * (row + 1)]:
            return pixels
        if number not in self._damaged:
            self._damaged.add(number)
            log.warning(
                "%s is damaged at %r: what is damaged there is decoded from its file; delete it to build it anew",
                _data(self.folder, number),
                self.name(index),
            )
        return self.files(index, size)

    def name(self, index: int) -> str:
        """Return what to call image ``index`` in a message."""
        return self.files.name(index)


@dataclass(frozen=True)
class _Layout:
    """Where the images of ``files`` belong in the cache folder ``root``."""

    root: Path
    files: FileImages
    size: int

    @cached_property
    def folder(self) -> Path:
        place = hashlib.sha256(os.fsencode(self.files.root)).hexdigest()[:8]
        return self.root / f"{self.files.root.name}-{self.size}px-{place}"

    @property
    def per_block(self) -> int:
        return max(LEAST_BLOCK, -(-len(self.files.paths) // MOST_BLOCKS))

    @property
    def numbers(self) -> range:
        return range(-(-len(self.files.paths) // self.per_block))

    def images(self, number: int) -> range:
        """The images of a block."""
        return range(number * self.per_block, min((number + 1) * self.per_block, len(self.files.paths)))

    def bytes(self, number: int) -> int:
        """The length of a block."""
        return len(self.images(number)) * 3 * self.size * self.size

    def data(self, number: int) -> Path:
        return _data(self.folder, number)

    def header(self, number: int) -> Path:
        return self.data(number).with_suffix(".json")

    def origin(self, number: int) -> Origin:
        """What the pixels of a block depend on."""
        files = []
        for index in self.images(number):
            with contextlib.suppress(FileNotFoundError):
                status = (self.files.root / self.files.paths[index]).stat()
                files.append([self.files.paths[index], status.st_size, status.st_mtime_ns])
        return {"size": self.size, "decoder": DECODER, "files": sha256_json(files)}


def open_cache(
    root: Path, files: FileImages, size: int, *, report: Report, workers: int = 0, build: bool = True
) -> CachedImages | None:
    """Open the cache of ``files``, stored at ``size`` pixels, in the folder ``root``.

    What is missing of it is decoded first, by ``workers`` processes, or, unless ``build``, the answer is None. A block
    appears when it is whole, so a build that was killed goes on where it was. Two processes do not build at once: the
    second waits, and finds what the first built. ``report`` learns of every image that cannot be decoded, early.

    Raises UserError, before anything is written, when the disk is too small, and when the folder cannot be used.
    """
    layout = _Layout(root, files, size)
    try:
        blocks = [_read_block(layout, number) for number in layout.numbers]
        if not build and not _whole(blocks):
            reason = _first_reason(blocks) or "it is missing or not finished"
            log.warning("cache %s is not used: %s", layout.folder, reason)
            return None
        with contextlib.ExitStack() as stack:
            if not _whole(blocks):
                _check_space(layout, blocks)
                stack.enter_context(_alone(layout.folder))
                blocks = [_read_block(layout, n) if isinstance(block, str) else block for n, block in enumerate(blocks)]
            for block in blocks:
                report({} if isinstance(block, str) else block.failures)
            whole = _whole(blocks) or _build(layout, blocks, workers, report)
    except OSError as error:
        raise UserError(
            f"the cache {layout.folder} cannot be used ({error.strerror or error}): "
            "choose another folder with --cache, or do without"
        ) from None
    return CachedImages(files, size, layout.per_block, layout.folder, tuple(whole))


def _data(folder: Path, number: int) -> Path:
    return folder / f"block-{number:04d}.u8"


def _whole(blocks: Sequence[Block | str]) -> list[Block]:
    """The blocks if all can be used, else an empty list."""
    usable = [block for block in blocks if isinstance(block, Block)]
    return usable if len(usable) == len(blocks) else []


def _first_reason(blocks: Sequence[Block | str]) -> str:
    """Why a block that is there cannot be used; empty if all that are there can."""
    return next((block for block in blocks if isinstance(block, str) and block != ABSENT), "")


def _read_block(layout: _Layout, number: int) -> Block | str:
    """A block that can be used, or why it cannot."""
    header, data = layout.header(number), layout.data(number)
    if not header.exists():
        return ABSENT
    try:
        content = read_sealed(header, "header of decoded images", SCHEMA, "it is no header of decoded images")
    except UserError as error:
        return str(error)
    origin, found = layout.origin(number), content["origin"]
    if found != origin:
        if found["decoder"] != origin["decoder"]:
            return f"{data} was decoded by {found['decoder']}, this is {origin['decoder']}"
        return f"images of {data} were changed, added or removed"
    length = data.stat().st_size if data.exists() else 0
    if length != layout.bytes(number):
        return f"{data} has {length} of {layout.bytes(number)} bytes"
    failures = {int(index): reason for index, reason in content["failures"].items()}
    for index in failures:
        with contextlib.suppress(DecodeError):
            layout.files(index, layout.size)
            return f"{layout.files.name(index)!r} can be decoded again"
    return Block(_map(layout, number), bytes.fromhex("".join(content["sha256"])), failures)


def _map(layout: _Layout, number: int) -> Pixels:
    shape = (len(layout.images(number)), 3, layout.size, layout.size)
    return np.memmap(layout.data(number), np.uint8, "r", shape=shape)


def _check_space(layout: _Layout, blocks: Sequence[Block | str]) -> None:
    """Raise `UserError` unless the blocks that are missing fit the disk in place of what they replace."""
    missing = [number for number, block in enumerate(blocks) if isinstance(block, str)]
    needed = sum(map(layout.bytes, missing))
    replaced = sum(data.stat().st_size for data in map(layout.data, missing) if data.exists())
    existing, free = free_space(layout.folder)
    if needed > free + replaced:
        images = sum(len(layout.images(number)) for number in missing)
        raise UserError(
            f"the cache {layout.folder} needs {needed / 1e9:.1f} GB for {images} decoded images and {existing} has "
            f"{(free + replaced) / 1e9:.1f} GB free: choose another folder with --cache, or do without"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the one process that writes to a cache; another that does is waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process builds the cache %s: waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(layout: _Layout, blocks: Sequence[Block | str], workers: int, report: Report) -> list[Block]:
    """Decode the images of the blocks that are missing, and of no other; return all blocks."""
    # Looked at before anything is decoded: of a file that changes meanwhile, no header must know the later time.
    origins = {number: layout.origin(number) for number, block in enumerate(blocks) if isinstance(block, str)}
    if reason := _first_reason(blocks):
        log.warning("cache: %s; decoding %d of %d blocks anew", reason, len(origins), len(blocks))
    own = {path for number in layout.numbers for path in (layout.data(number), layout.header(number))}
    for stray in set(layout.folder.glob("*block-*")) - own:
        stray.unlink()
    chunks = {number: _chunks(layout.images(number)) for number in origins}
    decoded = decode_batches(layout.files, layout.size, chain.from_iterable(chunks.values()), workers)
    images = sum(len(layout.images(number)) for number in origins)
    with contextlib.closing(with_progress(decoded, f"decoding into {layout.folder}", images)) as batches:
        built = {
            number: _build_block(layout, number, origin, zip(chunks[number], batches, strict=False), report)
            for number, origin in origins.items()
        }
    return [built[number] if isinstance(block, str) else block for number, block in enumerate(blocks)]


def _chunks(images: range) -> list[list[int]]:
    return [list(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]


def _build_block(
    layout: _Layout, number: int, origin: Origin, decoded: Iterable[tuple[list[int], Batch]], report: Report
) -> Block:
    """Write a block, ``decoded`` chunk by chunk: pixels under another name, then both under their own, header last."""
    header, data = layout.header(number), layout.data(number)
    header.unlink(missing_ok=True)
    temporary = data.with_name(f".{data.name}.tmp")
    undecoded = np.zeros((3, layout.size, layout.size), np.uint8)
    digests: list[str] = []
    failures: dict[int, str] = {}
    try:
        with temporary.open("wb") as file:
            for chunk, batch in decoded:
                report(batch.failures)
                failures |= batch.failures
                whole = iter(batch.images)
                for index in chunk:
                    pixels = undecoded if index in batch.failures else next(whole)
                    file.write(pixels.data)
                    digests.append(hashlib.sha256(pixels.data).hexdigest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(data)
    finally:
        temporary.unlink(missing_ok=True)
    named = {str(index): reason for index, reason in failures.items()}
    content = {"schema": SCHEMA, "origin": origin, "sha256": digests, "failures": named}
    write_atomically(header, json.dumps({**content, "digest": sha256_json(content)}))
    return Block(_map(layout, number), bytes.fromhex("".join(digests)), failures)
