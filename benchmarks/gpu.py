"""On a machine with an NVIDIA GPU: build for it, test the kernels and the search on it, and measure, in eight minutes.

    make gpu                          in .venv
    make gpu GPU_PYTHON=python3       with the packages that Python has, without a network
    python benchmarks/gpu.py --only "scoring mobilenet_v2" weights

Every part is a process of its own with a deadline of its own; what does not end in time, or fails, is said and does not
stop the others. Writes ``<out>/<gpu>-<commit>.json`` and prints a table. Exit status: 0 all passed; 1 something failed
or did not end in time; 2 no GPU here, or bad options. Not run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from record import commit, words

ROOT = Path(__file__).parents[1]
MINUTES = 8.0
TESTS = "tests/kernels/gpu"
SANITIZER = "compute-sanitizer"
# Compiles several files at a time, which setuptools does not.
BUILD = """
import os, runpy, sys
from pybind11.setup_helpers import ParallelCompile
ParallelCompile(default=os.cpu_count() or 1).install()
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
PRESENT = """
import json, torch
properties = torch.cuda.get_device_properties(0)
print(json.dumps({
    "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
    "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
    "torch": torch.__version__, "cuda": torch.version.cuda,
}))
"""
NO_GPU = "make gpu: there is no NVIDIA GPU here that this Python's torch can use"


@dataclass(frozen=True)
class Part:
    """A command and the seconds it may take; lines of JSON that it prints are figures where it ``measures``."""

    name: str
    seconds: float
    command: Sequence[str]
    measures: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a part ended: passed, failed, out of time or skipped, and why; figures found before that are kept."""

    name: str
    status: str
    seconds: float = 0.0
    why: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


def parts(python: str, sanitizer: str | None, capability: str) -> list[Part]:
    """All parts, in order: what is most worth knowing comes before what takes long."""

    def case(name: str, seconds: float) -> Part:
        return Part(name, seconds, (python, "benchmarks/gpu_cases.py", name), measures=True)

    def tests(name: str, seconds: float, *chosen: str) -> Part:
        return Part(name, seconds, (python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen))

    small = (f"{TESTS}/test_on_a_gpu.py", "-k", "equals_its_reference")
    watched = Part(
        "memcheck",
        60,
        (sanitizer or "", "--tool", "memcheck", "--error-exitcode", "1", python, "-m", "pytest", "-q", "-x", *small),
        # PyTorch's pool of memory would hide what is read beyond the end of a tensor.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    return [
        Part("build", 150, (python, "-c", BUILD), environment={"TORCH_CUDA_ARCH_LIST": capability}),
        tests("ops on the device", 60, f"{TESTS}/test_on_a_gpu.py"),
        tests("networks and generations", 75, f"{TESTS}/test_networks_on_a_gpu.py"),
        case("scoring mobilenet_v2", 70),
        case("scoring resnet50", 60),
        case("whole scores mobilenet_v2", 40),
        case("weights mobilenet_v2", 20),
        case("weights resnet50", 20),
        case("generations mobilenet_v2", 40),
        tests("parity", 120, f"{TESTS}/test_parity.py", f"{TESTS}/test_idle.py"),
        watched,
    ]


def run(part: Part, seconds_left: float) -> Outcome:
    """Run a part within its deadline, or what is left of all time."""
    if not part.command[0]:
        return Outcome(part.name, "skipped", why=f"{SANITIZER} was not found")
    limit = min(part.seconds, seconds_left)
    if limit <= 0:
        return Outcome(part.name, "skipped", why="no time was left")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **part.environment}
    began = monotonic()
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        status = "failed" if process.returncode else "passed"
    except subprocess.TimeoutExpired:
        # With all that it has started.
        os.killpg(process.pid, signal.SIGKILL)
        output, status = process.communicate()[0], "out of time"
    lines = [line for line in output.splitlines() if line.strip()]
    figures = figures_of(lines) if part.measures else {}
    why = f"after {limit:.3g} s" if status == "out of time" else reason(lines) if status == "failed" else ""
    if status == "passed" and not part.measures:
        why = "".join(lines[-1:])
    return Outcome(part.name, status, round(monotonic() - began, 1), why, figures)


def figures_of(lines: Sequence[str]) -> dict[str, float]:
    """The figures among the lines a case printed."""
    figures: dict[str, float] = {}
    for line in lines:
        if line.startswith("{"):
            figures |= json.loads(line)
    return figures


def reason(lines: Sequence[str]) -> str:
    """The line that says most of why a command failed: the last error in it, or the last line."""
    errors = [line for line in lines if re.match(r"(E  |\w*Error\b|FAILED|=+ ERROR|=+ Invalid)", line)]
    return [*lines[-1:], *errors][-1].strip() if lines else "it printed nothing"


def gpu_of(python: str) -> dict[str, Any] | None:
    """What torch says of the first GPU; None if it has none."""
    done = subprocess.run((python, "-c", PRESENT), capture_output=True, text=True, check=False)
    return dict(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def write_record(folder: Path, gpu: Mapping[str, Any], outcomes: Sequence[Outcome]) -> Path:
    """Write what came out to a file named by the GPU and the commit."""
    content: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": dict(gpu),
        "parts": [asdict(outcome) for outcome in outcomes],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("-".join([*words(gpu["name"]), *words(content["commit"] or "unknown")]) + ".json")
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for every part, and one for every figure."""
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.name:<28}{outcome.status:<12}{outcome.seconds:>7.1f} s  {outcome.why}".rstrip())
        lines += [f"    {name:<42}{value:>14,.4g}" for name, value in outcome.figures.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the record")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"all there is, {MINUTES:g} unless given")
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose names begin so (default: all)")
    parser.add_argument("--check", action="store_true", help="look for a GPU and do nothing")
    options = parser.parse_args(arguments)
    if shutil.which("nvidia-smi") is None or subprocess.run(("nvidia-smi", "-L"), capture_output=True).returncode:
        print(NO_GPU, file=sys.stderr)
        return 2
    if options.check:
        return 0
    gpu = gpu_of(sys.executable)
    if gpu is None:
        print(NO_GPU, file=sys.stderr)
        return 2
    sanitizer = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    everything = parts(sys.executable, sanitizer, gpu["capability"])
    chosen = [part for part in everything if part.name.startswith(tuple(options.only))]
    if not chosen or options.minutes <= 0:
        print(f"legal are more than 0 minutes, and of: {', '.join(part.name for part in everything)}", file=sys.stderr)
        return 2
    end, outcomes = monotonic() + 60 * options.minutes, list[Outcome]()
    for part in chosen:
        outcomes.append(run(part, end - monotonic()))
        print(table(outcomes[-1:]), flush=True)
    print(f"written to {write_record(options.out, gpu, outcomes)}")
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
