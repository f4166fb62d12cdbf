"""The cache of decoded images: the same bits, no second decoding, and nothing used that is not what it should be."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data import Data, ImageSet, open_data
from engine.data.cache import CachedImages
from engine.data.decode import DecodeError, decode_file
from engine.errors import UserError
from engine.files import sha256_json

ROOT = Path(__file__).parents[2]
COUNT, PER_BLOCK = 21, 8
EVERYTHING = slice(None)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.cache.LEAST_BLOCK", PER_BLOCK)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of real JPEG files, each of another shape and content: three classes of seven."""
    random = np.random.default_rng(0)
    for number in range(COUNT):
        folder = tmp_path / "photos" / "train" / f"class {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (5, 7, 3), np.uint8)
        image = Image.fromarray(pixels).resize((60 + number, 50), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:02d}.jpg")
    return tmp_path / "photos"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files decoded so far."""
    names: list[str] = []

    def decode(path: Path, size: int) -> np.ndarray:
        names.append(path.name)
        return decode_file(path, size)

    monkeypatch.setattr("engine.data.decode.decode_file", decode)
    return names


def open_small(photos: Path, cache: Path | None = None, **options: Any) -> Data:
    return open_data(str(photos), **{"resolution": 28, "workers": 0, "memory_limit": 0, "cache": cache} | options)


def assert_same_images(one: Data, other: Data) -> None:
    assert one.splits == other.splits
    for name, images in one.sets.items():
        assert torch.equal(images.images(EVERYTHING), other.subset(name).images(EVERYTHING))


def blocks(cache: Path, suffix: str = "u8") -> list[Path]:
    return sorted(cache.glob(f"photos-32px-*/block-*.{suffix}"))


def rewrite(header: Path, **changes: Any) -> None:
    """Change a header and seal it again."""
    content = {**json.loads(header.read_text()), **changes}
    del content["digest"]
    header.write_text(json.dumps({**content, "digest": sha256_json(content)}))


@pytest.mark.parametrize("limit", [0, None], ids=["streamed", "resident"])
def test_cached_images_are_the_decoded_ones_bit_for_bit(
    photos: Path, cache: Path, limit: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    plain = open_small(photos, memory_limit=limit)
    for workers in (2, 0):
        cached = open_small(photos, cache, memory_limit=limit, workers=workers)
        assert_same_images(cached, plain)
    stream = plain.subset("sub_train"), cached.subset("sub_train")
    batches = [torch.tensor([5, 3, 3]), torch.tensor([0])]
    for one, other in zip(*(images.stream(iter(batches)) for images in stream), strict=True):
        assert torch.equal(one[0], other[0])
    assert [path.stat().st_size // (3 * 32 * 32) for path in blocks(cache)] == [8, 8, 5]
    assert not caplog.records


def test_an_image_is_decoded_once_whatever_is_done_with_it_afterwards(
    photos: Path, cache: Path, decoded: list[str]
) -> None:
    first = open_small(photos, cache)
    assert len(decoded) == COUNT
    for options in ({}, {"splits": first.splits}, {"memory_limit": None}, {"seed": 4}, {"build_cache": False}):
        data = open_small(photos, cache, **options)
        assert data.subset("test").resident == ("memory_limit" in options)
        data.subset("sub_train").images(EVERYTHING)
    assert len(decoded) == COUNT
    open_small(photos, cache, resolution=14)
    assert len(decoded) == 2 * COUNT, "another stored side is another cache"


def test_a_whole_cache_is_only_read(photos: Path, cache: Path) -> None:
    open_small(photos, cache)
    (lock,) = cache.glob("*/.lock")
    lock.unlink()
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    first, second = open_small(photos, cache), open_small(photos, cache, build_cache=False)
    assert_same_images(first, second)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def truncate(block: Path) -> None:
    os.truncate(block, block.stat().st_size - 1)


def scribble(header: Path) -> None:
    header.write_bytes(header.read_bytes().replace(b'"size"', b'"side"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda block, _: truncate(block), "block-0001.u8 has 24575 of 24576 bytes"),
        (lambda block, _: block.unlink(), "block-0001.u8 has 0 of 24576 bytes"),
        (lambda _, header: scribble(header), "block-0001.json is damaged or of another version"),
        (lambda _, header: header.write_text("{"), "block-0001.json is no header of decoded images: not valid JSON"),
        (lambda _, header: rewrite(header, schema="metaprune.decoded/0"), "damaged or of another version"),
        (
            lambda _, header: header.write_bytes(header.with_name("block-0000.json").read_bytes()),
            "images of .*block-0001.u8 were changed, added or removed",
        ),
        (
            lambda _, header: rewrite(
                header, origin={**json.loads(header.read_text())["origin"], "decoder": "metaprune 0, Pillow 1"}
            ),
            "block-0001.u8 was decoded by metaprune 0, Pillow 1, this is metaprune 1",
        ),
    ],
    ids=["truncated", "no pixels", "header changed", "no JSON", "schema", "foreign", "decoder"],
)
def test_a_block_that_is_not_what_it_should_be_is_decoded_anew_and_no_other(
    photos: Path,
    cache: Path,
    damage: Callable[[Path, Path], None],
    message: str,
    decoded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = open_small(photos)
    open_small(photos, cache)
    block = blocks(cache)[1]
    damage(block, block.with_suffix(".json"))
    decoded.clear()
    unused = open_small(photos, cache, build_cache=False, splits=plain.splits)
    assert not decoded
    assert_same_images(unused, plain)
    decoded.clear()
    with caplog.at_level(logging.WARNING):
        again = open_small(photos, cache)
    assert re.search(message, caplog.text)
    assert len(decoded) == PER_BLOCK
    assert_same_images(again, plain)
    caplog.clear()
    decoded.clear()
    open_small(photos, cache)
    assert not caplog.records
    assert not decoded


def test_what_is_wrong_with_a_cache_is_said_in_one_line(
    photos: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_small(photos, cache)
    for block in blocks(cache)[:2]:
        truncate(block)
    open_small(photos, cache)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"cache: {blocks(cache)[0]} has 24575 of 24576 bytes; decoding 2 of 3 blocks")


def test_damaged_pixels_are_never_used(
    photos: Path, cache: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    plain = open_small(photos)
    cached = open_small(photos, cache)
    content = bytearray(blocks(cache)[1].read_bytes())
    content[3 * 32 * 32 * 2 + 17] ^= 1
    content[-1] ^= 128
    blocks(cache)[1].write_bytes(content)
    decoded.clear()
    for data in (cached, open_small(photos, cache)):
        assert_same_images(data, plain)
    # Two images, read twice; plain decodes every image of the splits each time it is asked.
    assert len(decoded) == 2 * 2 + 2 * COUNT
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, "one line for each time the cache is opened"
    assert "block-0001.u8 is damaged at 'train/class 1/" in messages[0]


def test_a_changed_image_is_noticed_even_if_its_file_is_as_long_as_before(
    photos: Path, cache: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    open_small(photos, cache)
    victim = photos / "train" / "class 2" / "20.jpg"
    content = victim.read_bytes()
    Image.new("RGB", (70, 50), (9, 200, 30)).save(victim)
    victim.write_bytes(victim.read_bytes().ljust(len(content), b"\0"))
    os.utime(victim, ns=(0, 0))
    assert victim.stat().st_size == len(content)
    decoded.clear()
    changed = open_small(photos, cache)
    assert len(decoded) == COUNT - 2 * PER_BLOCK
    assert "were changed, added or removed" in caplog.text
    assert_same_images(changed, open_small(photos))


def test_an_image_that_changes_while_the_cache_is_built_is_decoded_again_next_time(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    victim = photos / "train" / "class 0" / "00.jpg"

    def decode(path: Path, size: int) -> np.ndarray:
        pixels = decode_file(path, size)
        if path == victim:
            content = path.read_bytes()
            Image.new("RGB", (60, 50), (9, 200, 30)).save(path)
            path.write_bytes(path.read_bytes().ljust(len(content), b"\0"))
        return pixels

    with monkeypatch.context() as patch:
        patch.setattr("engine.data.decode.decode_file", decode)
        open_small(photos, cache)
    assert_same_images(open_small(photos, cache), open_small(photos))
    assert "were changed, added or removed; decoding 1 of 3 blocks anew" in caplog.text


def test_removed_images_leave_no_block_behind(photos: Path, cache: Path) -> None:
    open_small(photos, cache)
    for image in (photos / "train" / "class 2").glob("*.jpg"):
        if image.stem > "10":
            image.unlink()
    (blocks(cache)[0].parent / ".block-0007.u8.tmp").touch()
    fewer = open_small(photos, cache)
    assert len(fewer.splits.members) == 17
    assert_same_images(fewer, open_small(photos))
    for image in (photos / "train" / "class 1").glob("*.jpg"):
        if image.stem > "10":
            image.unlink()
    open_small(photos, cache)
    assert [path.name for path in blocks(cache)] == ["block-0000.u8", "block-0001.u8"]
    assert not list(cache.glob("*/*.tmp"))


def test_corrupt_images_are_quarantined_as_without_a_cache(
    photos: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    victim = photos / "train" / "class 1" / "10.jpg"
    content = victim.read_bytes()
    victim.write_bytes(content[:60])
    plain = open_small(photos)
    for _ in range(2):
        caplog.clear()
        cached = open_small(photos, cache)
        assert cached.quarantined == plain.quarantined == ("train/class 1/10.jpg",)
        assert "quarantined 'train/class 1/10.jpg': " in caplog.text
        assert_same_images(cached, plain)
        assert_same_images(open_small(photos, cache, splits=cached.splits, memory_limit=None), plain)

    other = photos / "train" / "class 2" / "14.jpg"
    other.write_bytes(b"?")
    for cached_in in (cache, cache.with_name("new")):
        with pytest.raises(UserError, match=r"at least 2 of 21 images cannot be decoded, at most 1 may: 'train/class "):
            open_small(photos, cached_in)


def test_an_image_that_could_not_be_read_for_a_while_is_taken_in_again(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    victim = photos / "train" / "class 0" / "03.jpg"

    def unreadable(path: Path, size: int) -> np.ndarray:
        if path == victim:
            raise DecodeError("Permission denied")
        return decode_file(path, size)

    with monkeypatch.context() as patch:
        patch.setattr("engine.data.decode.decode_file", unreadable)
        assert open_small(photos, cache).quarantined == ("train/class 0/03.jpg",)
    caplog.clear()
    restored = open_small(photos, cache)
    assert not restored.quarantined
    assert "'train/class 0/03.jpg' can be decoded again; decoding 1 of 3 blocks anew" in caplog.text
    assert_same_images(restored, open_small(photos))


BUILD = """
import sys, time
from engine.data import decode, cache, open_data

cache.LEAST_BLOCK = 8
plain = decode.decode_file
def slowly(path, size):
    time.sleep(0.05)
    return plain(path, size)
decode.decode_file = slowly
cache.CHUNK = 1
open_data(sys.argv[1], resolution=28, workers=0, memory_limit=0, cache=sys.argv[2])
"""


def test_a_build_that_is_killed_goes_on_where_it_was(
    photos: Path, cache: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(photos), str(cache)], cwd=ROOT)
    while process.poll() is None and not list(cache.glob("*/.block-0001.u8.tmp")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(blocks(cache, "json")) == 1, "killed too late: nothing was tested"
    unfinished = open_small(photos, cache, build_cache=False)
    assert not isinstance(stream_of(unfinished.subset("test")), CachedImages)
    assert "is not used: it is missing or not finished" in caplog.text
    decoded.clear()
    assert_same_images(open_small(photos, cache), unfinished)
    assert len([name for name in decoded if name in {f"{n:02d}.jpg" for n in range(COUNT)}]) < 3 * COUNT
    assert isinstance(stream_of(open_small(photos, cache).subset("test")), CachedImages)
    assert not list(cache.glob("*/*.tmp"))


def stream_of(images: ImageSet) -> object:
    assert not isinstance(images.stored, torch.Tensor)
    return images.stored.images


def test_a_build_that_fails_leaves_only_whole_blocks(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    calls = []

    def full(descriptor: int) -> None:
        # Pixels, header and folder of the first block are synced; the pixels of the second are not.
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be used \(No space left on device\): choose another folder with"):
            open_small(photos, cache)
    assert [path.name for path in blocks(cache)] == ["block-0000.u8"]
    assert not list(cache.glob("*/*.tmp"))
    decoded.clear()
    open_small(photos, cache)
    assert len(decoded) == COUNT - PER_BLOCK


def test_a_folder_that_cannot_be_written_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be used \(.*\): choose another folder with --cache, or do without"):
        open_small(photos, tmp_path / "file" / "cache")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = COUNT * 3 * 32 * 32 - 1

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(UserError, match=r"needs 0.0 GB for 21 decoded images and .* has 0.0 GB free"):
        open_small(photos, cache)
    assert not cache.exists()
    Usage.free += 1
    open_small(photos, cache)
    # What is replaced makes room.
    Usage.free = 0
    rewrite(blocks(cache, "json")[1], schema="metaprune.decoded/0")
    open_small(photos, cache)


def test_two_processes_do_not_build_at_once(
    photos: Path, cache: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    open_small(photos, cache)
    (lock,) = cache.glob("*/.lock")
    header = blocks(cache, "json")[2]
    content = header.read_bytes()
    header.unlink()
    decoded.clear()
    found: list[Data] = []
    waiting = threading.Thread(target=lambda: found.append(open_small(photos, cache)))
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting.start()
        while "another process builds the cache" not in caplog.text:
            time.sleep(0.01)
        header.write_bytes(content)
    waiting.join()
    assert found
    assert not decoded


def test_the_folder_of_a_cache_names_its_images_and_their_side(photos: Path, cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "photos"
    elsewhere.parent.mkdir()
    open_small(photos, cache)
    photos.rename(elsewhere)
    open_small(elsewhere, cache)
    names = sorted(path.name for path in cache.iterdir())
    assert len(names) == 2
    assert all(name.startswith("photos-32px-") for name in names)


def test_a_cached_image_is_asked_for_at_its_own_side(photos: Path, cache: Path) -> None:
    images: Any = stream_of(open_small(photos, cache).subset("test"))
    with pytest.raises(ValueError, match="stored at 32 px, not 33"):
        images(0, 33)
