"""Timings that survive a killed command: one line of a file for every group of networks timed together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.runtimes import ROUNDS, Network, Settings, Timing, measure


class Measurements:
    """Timings by group, kept in a file of lines as they are made: a killed build loses the group it was in.

    ``identity`` says what they belong to. Raises `UserError` if the file is of another one, or damaged; a line cut
    short by a crash is dropped.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], settings: Settings) -> None:
        self.path, self.settings = path, settings
        self.groups: dict[str, list[Timing]] = {}
        whole = path.read_bytes().rpartition(b"\n")[0].split(b"\n") if path.exists() else []
        if not any(whole):
            path.write_text(json.dumps(identity) + "\n", encoding="utf-8")
            return
        try:
            lines = [json.loads(line) for line in whole]
            for line in lines[1:]:
                self.groups[line["group"]] = [Timing(tuple(map(float, rounds))) for rounds in line["ms"]]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise UserError(f"{path} is damaged: start anew with --overwrite") from None
        if lines[0] != json.loads(json.dumps(identity)):
            different = [name for name, value in identity.items() if dict(lines[0]).get(name) != value]
            raise UserError(
                f"{path} was begun with other {', '.join(different)}: resume with what it was begun with, "
                "or start anew with --overwrite"
            )
        with path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in whole))

    def of(self, group: str, networks: Sequence[Network], cold: bool, rounds: int = ROUNDS) -> list[Timing]:
        """Timings of networks, measured unless the file has this group of as many."""
        if len(self.groups.get(group, [])) != len(networks):
            timings = measure(networks, self.settings, rounds, cold)
            line = {"group": group, "ms": [timing.rounds for timing in timings]}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.groups[group] = timings
        return self.groups[group]
