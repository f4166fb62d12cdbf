"""Say what this installation can do: versions, devices, backends, and why the others are not there.

python -m engine.doctor
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from engine.run.command import Options, run_command
from engine.versions import versions_of
from kernels import backends
from kernels.ops import OPS

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pillow", "scikit-learn", "rich", "tyro")


@dataclass(frozen=True, kw_only=True)
class Doctor(Options):
    """Say what this installation can do: versions, devices, backends, and why the others are not there."""


def main(options: Doctor) -> None:
    """Run the command."""
    console = Console()
    facts = Table(show_header=False)
    for name, value in {**_software(), **_devices(), **_extension()}.items():
        facts.add_row(name, value)
    console.print(facts)

    ops = Table(title="kernels")
    for heading in ("op", *backends.BACKENDS):
        ops.add_column(heading)
    for op in OPS:
        ops.add_row(op, *("yes" if not backends.why_not(op, b) else "–" for b in backends.BACKENDS))
    console.print(ops)
    for backend in backends.BACKENDS:
        refusals: dict[str, list[str]] = {}
        for op in OPS:
            if reason := backends.why_not(op, backend):
                refusals.setdefault(reason, []).append(op)
        for reason, refused in refusals.items():
            which = "no op" if len(refused) == len(OPS) else f"not {', '.join(refused)}"
            console.print(f"{backend}: {which}: {reason}", highlight=False, soft_wrap=True)


def _software() -> dict[str, str]:
    """Versions of Python, the system and the packages."""
    system = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return system | versions_of(PACKAGES)


def _devices() -> dict[str, str]:
    """CPU and GPUs."""
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        devices["cuda"] = f"none (torch was built with {built})"
    return devices


def _extension() -> dict[str, str]:
    """How the C++ kernels were built, and what they chose."""
    if backends.extension is None:
        return {"C++ kernels": backends.why_not(next(iter(OPS)), "cpu")}
    info = backends.extension.build_info()
    return {"C++ kernels": f"{info['instruction_set']}; built by {info['compiler']} against torch {info['torch']}"}


if __name__ == "__main__":
    sys.exit(run_command(main, Doctor))
