"""Commands started by torchrun, and what their processes print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from small_runs import ROOT


class Printed(NamedTuple):
    """What a rank printed, and its exit status."""

    lines: list[str]
    status: int


def torchrun(
    ranks: int, *arguments: object, options: tuple[str, ...] = (), own_group: bool = False
) -> subprocess.Popen[str]:
    # After "--", or torchrun takes our --run for the beginning of an option of its own.
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    return subprocess.Popen(
        [*line, *map(str, arguments)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        process_group=0 if own_group else None,
    )  # fmt: skip


def in_turn(folder: Path, ranks: int, plans: list[dict[str, Any]]) -> dict[str, list[Printed]]:
    """What every rank of each command printed (`ranks_in_turn.py`)."""
    (folder / "plans.json").write_text(json.dumps(plans))
    process = torchrun(ranks, Path(__file__).with_name("ranks_in_turn.py"), folder / "plans.json")
    _, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint
    result = {}
    for plan in plans:
        texts = [(folder / f"{plan['name']}.{rank}").read_text().splitlines() for rank in range(plan["ranks"])]
        result[plan["name"]] = [
            Printed([line for line in lines[:-1] if line.strip()], int(lines[-1])) for lines in texts
        ]
    return result


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """The process of each rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in children:
        for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(child)
    return found
