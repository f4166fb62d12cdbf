"""What torchrun tells a process about its place among the others."""

from __future__ import annotations

import os


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def number() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ["RANK"]) if is_launched() else 0


def count_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1


def launch_id() -> str | None:
    """What the processes of one torchrun have in common, those it starts again among them; None without torchrun."""
    if not is_launched():
        return None
    # torchrun calls itself "none" where neither --standalone nor --rdzv-id names it.
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"process {os.getppid()}"
