"""Sub-train, sub-validation and test: which image belongs where, made once and stored with the run.

Splits are stratified by class and depend on nothing but the labels, the official test part if there is one, the
groups of images that belong together if there are any, and the seed: the place of an image, or of a group, in the
order is a random number that (seed, its number) alone decides.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self

from engine.errors import UserError
from engine.files import read_json, sha256_json, write_atomically
from engine.random import random_bits, stream_key

SPLIT_NAMES = ("sub_train", "sub_validation", "test")
HELD_OUT_ONE_IN = 5
"""One image in so many becomes test, and as many again sub-validation."""
LARGE_CLASS, LARGE_CLASS_VALIDATION = 500, 50
"""Where every class has 500 images outside test, sub-validation takes 50 of each, the paper's choice."""


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of image indices, and what they were made from.

    sub_train       indices that train the PruningNet and calibrate BatchNorm
    sub_validation  indices the search scores on
    test            indices held back until a structure is final
    seed            that ordered the images
    fingerprint     of the data the indices point into
    files           "relative/path:bytes" of every file of a folder tree, so that a changed tree can be named;
                    empty for other data

    Raises UserError when the sets overlap, or a value is not of its type.
    """

    sub_train: tuple[int, ...]
    sub_validation: tuple[int, ...]
    test: tuple[int, ...]
    seed: int
    fingerprint: str
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        indices = self.members
        if not all(type(index) is int and index >= 0 for index in indices):
            raise UserError("stored splits: an index is not a whole number from 0; the file is damaged")
        if type(self.seed) is not int or not all(isinstance(t, str) for t in (self.fingerprint, *self.files)):
            raise UserError("stored splits: the seed, fingerprint or a file name is not one; the file is damaged")
        if len(set(indices)) != len(indices):
            raise UserError("stored splits: sub_train, sub_validation and test overlap; the file is damaged")

    @property
    def members(self) -> tuple[int, ...]:
        """Every index of the three sets; the images of the data that are not here were quarantined."""
        return self.sub_train + self.sub_validation + self.test

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything above, in hexadecimal."""
        return sha256_json(self._content())

    def _content(self) -> dict[str, Any]:
        return {
            **{name: list(getattr(self, name)) for name in SPLIT_NAMES},
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "files": list(self.files),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, digest included."""
        return {**self._content(), "digest": self.digest}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Restore from ``to_dict``. Raises UserError when anything differs from what the digest covers."""
        content = dict(values) if isinstance(values, Mapping) else {}
        digest = content.pop("digest", None)
        expected = {*SPLIT_NAMES, "seed", "fingerprint", "files"}
        if set(content) != expected or digest != sha256_json(content):
            raise UserError("stored splits: the content does not match its digest; restore the file from a copy")
        for name in (*SPLIT_NAMES, "files"):
            if not isinstance(content[name], list | tuple):
                raise UserError(f"stored splits: {name} is not a list; restore the file from a copy")
            content[name] = tuple(content[name])
        return cls(**content)

    def save(self, path: Path) -> None:
        """Write JSON to ``path`` atomically: a reader sees the old file or the new one, never a part."""
        write_atomically(path, json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote. Raises UserError when the file is missing or damaged."""
        return cls.from_dict(read_json(path, "splits file"))

    def verify(self, fingerprint: str, count: int, files: Sequence[str]) -> None:
        """Check that data of ``count`` images is what the splits were made from.

        Raises UserError, naming the files that changed where they are known, when it is not.
        """
        if fingerprint != self.fingerprint:
            raise UserError(
                f"the images are not those of the stored splits ({_difference(self.files, files)}); "
                "restore the data or start a new run"
            )
        if max(self.members, default=0) >= count:
            raise UserError(f"stored splits: an index is beyond the {count} images; the file is damaged")


def make_splits(
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    official_test: Iterable[int] = (),
    excluded: Iterable[int] = (),
    seed: int = 0,
    fingerprint: str = "",
    files: tuple[str, ...] = (),
    groups: Sequence[int] = (),
) -> Splits:
    """Split images into sub-train, sub-validation and test, stratified by class.

    Test is the official test part where there is one, otherwise 20 % of the images (rounded up).
    Sub-validation is 50 images of each class where every class has at least 500 outside test, otherwise 20 %
    of the images that are not official test (rounded up). Shares of a class are the largest remainders of its
    exact share, so they differ from it by less than one image.

    labels         class index of every image
    classes        name of every class
    official_test  indices of the official test part
    excluded       indices that belong to no split (quarantined images)
    groups         number of the group of every image, where images belong together (copies of one original, all
                   of one class): a group is never divided, and all counts above are of groups

    Raises UserError when a class has fewer than three images, or two beside an official test part; ValueError
    when a group has images of two classes, or some in the official test part and some outside.
    """
    held_back, dropped = set(official_test), set(excluded)
    group_of = groups or range(len(labels))
    if not len({*zip(group_of, labels, strict=True)}) == len({*group_of}):
        raise ValueError("a group has images of two classes")
    images_of: dict[int, list[int]] = {}
    pool: list[list[int]] = [[] for _ in classes]
    for index, (label, group) in enumerate(zip(labels, group_of, strict=True)):
        if index in held_back or index in dropped:
            continue
        if group not in images_of:
            pool[label].append(group)
        images_of.setdefault(group, []).append(index)
    if any(group_of[index] in images_of for index in held_back):
        raise ValueError("a group has images in the official test part and outside")
    least = 2 if held_back else 3
    order = random_bits(stream_key(seed, "splits"), max(group_of, default=-1) + 1).tolist()
    for name, members in zip(classes, pool, strict=True):
        if len(members) < least:
            raise UserError(f"class {name!r} has {len(members)} usable images; give it at least {least}")
        members.sort(key=order.__getitem__)

    sizes = [len(members) for members in pool]
    fifth = _proportional(sizes, -(-sum(sizes) // HELD_OUT_ONE_IN))
    test_counts = [0] * len(sizes) if held_back else fifth
    remaining = [size - count for size, count in zip(sizes, test_counts, strict=True)]
    large = min(remaining) >= LARGE_CLASS
    validation_counts = [LARGE_CLASS_VALIDATION] * len(sizes) if large else fifth

    test, sub_validation, sub_train = list[int](), list[int](), list[int]()
    for members, tests, validations in zip(pool, test_counts, validation_counts, strict=True):
        test += members[:tests]
        sub_validation += members[tests : tests + validations]
        sub_train += members[tests + validations :]

    def images(chosen: Iterable[int]) -> Iterator[int]:
        return chain.from_iterable(images_of[group] for group in chosen)

    return Splits(
        sub_train=tuple(sorted(images(sub_train))),
        sub_validation=tuple(sorted(images(sub_validation))),
        test=tuple(sorted({*images(test), *(held_back - dropped)})),
        seed=seed,
        fingerprint=fingerprint,
        files=files,
    )


def _proportional(sizes: Sequence[int], total: int) -> list[int]:
    """Share ``total`` among classes in proportion to ``sizes``: floors first, then the largest remainders."""
    whole = sum(sizes)
    counts = [size * total // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda label: (-(sizes[label] * total % whole), label))
    for label in by_remainder[: total - sum(counts)]:
        counts[label] += 1
    return counts


def _difference(stored: Sequence[str], found: Sequence[str]) -> str:
    """Say in a few words which files differ between two lists of "path:bytes"."""
    before, after = (
        {path: size for path, _, size in (entry.rpartition(":") for entry in entries)} for entries in (stored, found)
    )
    changes = [f"missing {path!r}" for path in before if path not in after]
    changes += [f"added {path!r}" for path in after if path not in before]
    changes += [f"changed {path!r}" for path in before if before[path] != after.get(path, before[path])]
    if not (stored and found) or not changes:
        return "the contents differ"
    return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
