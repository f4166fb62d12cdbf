"""What training structures from scratch said about the scores, for a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.run.trust_report import (
    STATISTIC_HEADINGS,
    STRUCTURE_HEADINGS,
    STRUCTURES_TITLE,
    caveats,
    read_report,
    statistic_rows,
    structure_rows,
)


def trust(path: Path) -> dict[str, Any] | None:
    """``tables`` (title, headings, rows) and ``notes``; None if nothing was trained. Raises `UserError` if damaged."""
    if not path.is_file():
        return None
    report = read_report(path)
    return {
        "tables": [
            (STRUCTURES_TITLE, STRUCTURE_HEADINGS, structure_rows(report)),
            ("what they say", STATISTIC_HEADINGS, statistic_rows(report)),
        ],
        "notes": caveats(report),
    }
