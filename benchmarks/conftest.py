"""What benchmarks share: the machine's limits, one table of what they found out, and a small record of it.

    pytest --benchmark-only --benchmark-quiet --benchmark-record=benchmarks/results

The record is a new JSON file: machine, versions, commit, and for every benchmark its median, interquartile range,
rounds and figures.
"""

import json
import os
import platform
import re
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import cpuinfo
import peak
import pytest
import torch
from record import commit, words
from rich.console import Console
from rich.table import Table

from engine.run.training import keep_freed_memory
from kernels import backends

# Of a table that is not printed on a terminal.
COLUMNS = 160


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--benchmark-record=DIR``."""
    parser.addoption(
        "--benchmark-record", metavar="DIR", type=Path, help="Write what was found out to a new file there."
    )


@pytest.fixture(scope="session", autouse=True)
def _keep_memory() -> None:
    """As every command does: without it, large outputs are page faults for whoever computes them."""
    keep_freed_memory()


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying a large tensor."""
    return peak.copy_bytes_per_second()


@pytest.fixture(scope="session")
def in_place_bandwidth() -> float:
    """Bytes per second, read and written, of changing a large tensor in place."""
    return peak.in_place_bytes_per_second()


@pytest.fixture(scope="session")
def peak_flops() -> Any:
    """`peak.peak_flops`, measured once for each dtype."""
    return cache(peak.peak_flops)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One table of all benchmarks and, if asked for, the record."""
    session = getattr(config, "_benchmarksession", None)
    benches = [bench for bench in session.benchmarks if not bench.has_error] if session else []
    if not benches:
        return
    console = Console(width=None if sys.stdout.isatty() else COLUMNS)
    with console.capture() as capture:
        console.print(_table(benches))
    terminalreporter.write(capture.get())
    if config.option.benchmark_record is not None:
        terminalreporter.write_line(f"written to {_record(config.option.benchmark_record, benches)}")


def _table(benches: list[Any]) -> Table:
    table = Table("benchmark", "median", "figures", show_lines=True)
    table.columns[0].overflow = "fold"
    table.columns[1].justify = "right"
    for bench in benches:
        figures = ", ".join(f"{name} [bold]{_short(value)}[/bold]" for name, value in bench.extra_info.items())
        table.add_row(bench.name.removeprefix("test_").replace("[", r"\["), _seconds(bench.stats.median), figures)
    return table


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _seconds(value: float) -> str:
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if value >= s), ("µs", 1e-6))
    return f"{value / scale:.3g} {unit}"


def _record(folder: Path, benches: list[Any]) -> Path:
    """Write the results to a file named by time, processor and cores."""
    now = datetime.now(UTC)
    extension = backends.extension
    cpu = cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or platform.machine()
    content = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "pytorch_instruction_set": torch.backends.cpu.get_cpu_capability(),
            "kernels_instruction_set": extension.build_info()["instruction_set"] if extension else None,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()},
        "benchmarks": [
            {
                "name": bench.name,
                "median_s": _significant(bench.stats.median),
                "iqr_s": _significant(bench.stats.iqr),
                "rounds": bench.stats.rounds,
                "figures": bench.extra_info,
            }
            for bench in benches
        ],
    }
    processor = re.sub(r"\((r|tm)\)|processor|cpu|@.*", "", cpu.lower())
    name = "-".join([now.strftime("%Y%m%dT%H%M%SZ"), *words(processor), str(torch.get_num_threads())])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _significant(value: float) -> float:
    return float(f"{value:.4g}")
