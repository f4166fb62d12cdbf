"""Files that are whole or not there: atomic writes, digests, canonical JSON."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_space(folder: Path) -> tuple[Path, int]:
    """The nearest folder that exists, of ``folder`` and those above it, and the bytes free on its disk."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return existing, shutil.disk_usage(existing).free


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value in canonical form: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def csv_text(columns: Mapping[str, Sequence[Any]]) -> str:
    """A table with a heading, columns of equal length side by side, in the one dialect used here."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return table.getvalue()


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `UserError` naming ``what`` if it is missing, no JSON, or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no {what}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no {what}: it holds a {type(value).__name__}, not an object")
    return value


def read_sealed(path: Path, what: str, schema: str, advice: str) -> dict[str, Any]:
    """The JSON object in a file that states its ``schema`` and the ``digest`` of the rest of it, both checked.

    Raises `UserError`, ending in ``advice``, if either is not as it should be.
    """
    content = read_json(path, what)
    rest = {name: value for name, value in content.items() if name != "digest"}
    if content.get("schema") != schema or content.get("digest") != sha256_json(rest):
        raise UserError(f"{path} is damaged or of another version: {advice}")
    return content
