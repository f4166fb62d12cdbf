"""What the records of measurements are named by."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit that is measured, marked if something was changed since; None where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def words(text: str) -> list[str]:
    """The words of a name, fit for a file name."""
    return re.findall(r"[a-z0-9]+", text.lower())
