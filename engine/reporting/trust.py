"""Whatever ``trust.json`` holds, as tables: numbers and words by name, and lists of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.files import read_json
from engine.reporting.text import NONE

HIDDEN = {"schema", "digest"}
ROWS_SHOWN = 50


def trust_tables(path: Path) -> dict[str, Any] | None:
    """``facts`` (name, value) and ``tables`` (title, names, rows, rows left out); None if there is nothing to show.

    Raises `UserError` if the file is no JSON object.
    """
    if not path.is_file():
        return None
    content = {name: value for name, value in read_json(path, "trust table").items() if name not in HIDDEN}
    facts = [(_words(name), _cell(value)) for name, value in content.items() if _is_plain(value)]
    tables = [_table(_words(name), value) for name, value in content.items() if _is_table(value)]
    return {"facts": facts, "tables": tables} if facts or tables else None


def _table(title: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in records[0] if all(_is_plain(record.get(name)) for record in records)]
    rows = [[_cell(record.get(name)) for name in names] for record in records[:ROWS_SHOWN]]
    return {"title": title, "names": [_words(name) for name in names], "rows": rows, "more": len(records) - len(rows)}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) and entry for entry in value)


def _cell(value: Any) -> str:
    if value is None:
        return NONE
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
