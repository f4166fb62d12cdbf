"""Every CUDA kernel compiled by nvcc for GPUs that are not here: what it uses, and which instructions it became.

What nvcc and the disassembler of Triton say is kept in build/ under the digest of what went in.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from budgets import CAPABILITIES, CUDA_BUDGETS, CUDA_INSTRUCTIONS
from emulated import CSRC, CUDA_OPS, ROOT

NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
FLAGS = ["-std=c++20", "-O3", f"-I{CSRC / 'include'}", "-Xptxas", "-v", "-cubin"]
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?[^\n]*",
    re.DOTALL,
)
CASES = [(op, capability) for op in CUDA_OPS for capability in CAPABILITIES]

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def compile_for(case: tuple[str, int]) -> list[dict[str, Any]]:
    """Every kernel of the op on one GPU: its name, registers, spills, static shared memory, and instructions."""
    op, capability = case
    assert NVCC is not None
    command = [NVCC, *FLAGS, f"-arch=sm_{capability}", str(CSRC / "cuda" / f"{op}.cu")]
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sorted([*(CSRC / "cuda").iterdir(), *(CSRC / "include").rglob("*.h")]):
        digest.update(path.read_bytes())
    known = ROOT / "build" / "nvcc" / f"{op}-{capability}-{digest.hexdigest()[:16]}.json"
    if not known.exists():
        known.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=known.parent) as unfinished:
            cubin, text = Path(unfinished, "cubin"), Path(unfinished, "json")
            done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            text.write_text(json.dumps(list(_kernels(done.stderr, disassembled(cubin)))))
            text.rename(known)
    return list(json.loads(known.read_text()))


def _kernels(report: str, code: dict[str, str]) -> Iterator[dict[str, Any]]:
    for entry in ENTRY.finditer(report):
        # In a mangled name the length of an identifier precedes it.
        kernel = re.search(r"\d([a-z_]+_kernel)I", entry["name"])
        assert kernel is not None, f"{entry['name']} is not named like a kernel"
        yield {
            "kernel": kernel[1],
            "name": entry["name"],
            "registers": int(entry["registers"]),
            "spills": int(entry["stores"]) + int(entry["loads"]),
            "shared": int(entry["shared"] or 0),
            "instructions": sorted(set(re.findall(r"\*/\s+(?:@!?U?P\d )?([A-Z][\w.]+)", code.get(entry["name"], "")))),
        }


def disassembled(cubin: Path) -> dict[str, str]:
    """The code of every kernel by name; nothing without a disassembler."""
    if importlib.util.find_spec("triton") is None:
        return {}
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    listing = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {part.split(maxsplit=1)[0]: part for part in listing.split("Function : ")[1:]}


Compiled = dict[tuple[str, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(CASES, pool.map(compile_for, CASES), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_no_kernel_spills(compiled: Compiled, case: tuple[str, int]) -> None:
    assert {k["name"]: k["spills"] for k in compiled[case] if k["spills"]} == {}


@pytest.mark.parametrize("case", CASES)
def test_every_kernel_keeps_to_its_budget(compiled: Compiled, case: tuple[str, int]) -> None:
    budget = CUDA_BUDGETS[case[0]]
    assert {k["kernel"] for k in compiled[case]} == set(budget)
    assert [k for k in compiled[case] if k["registers"] > budget[k["kernel"]]] == []


@pytest.mark.parametrize("case", CASES)
def test_all_shared_memory_is_dynamic(compiled: Compiled, case: tuple[str, int]) -> None:
    assert {k["name"]: k["shared"] for k in compiled[case] if k["shared"]} == {}


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_became_the_instructions_it_was_written_for(compiled: Compiled, case: tuple[str, int]) -> None:
    if not any(k["instructions"] for k in compiled[case]):
        pytest.skip("no disassembler")
    missing = [
        (k["name"], wanted)
        for k in compiled[case]
        for wanted in CUDA_INSTRUCTIONS[case[0]].get(k["kernel"], ())
        if not any(wanted in instruction for instruction in k["instructions"])
    ]
    assert missing == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_of_sixteen_bits_run_on_tensor_cores(compiled: Compiled, capability: int) -> None:
    kernels = compiled["fused_block", capability]
    if not any(k["instructions"] for k in kernels):
        pytest.skip("no disassembler")
    on_tensor_cores = {k["name"]: any("HMMA" in found for found in k["instructions"]) for k in kernels}
    assert on_tensor_cores == {k["name"]: "Float16" in k["name"] for k in kernels}
