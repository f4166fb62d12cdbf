"""Every Triton kernel compiled for GPUs that are not here: what it uses, and which instructions it became.

Each GPU is compiled for in a process of its own, all at once; Triton's cache, by digest of the source, answers the
next run.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from budgets import BUDGETS, CAPABILITIES, MATRIX_INSTRUCTION, MEASURED_WITH

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
PIPELINED = ("conv_kernel", "generated_conv_kernel", "conv_input_gradient_kernel", "conv_weight_gradient_kernel")


as_measured = pytest.mark.skipif(
    importlib.util.find_spec("triton") is not None and version("triton") != MEASURED_WITH,
    reason=f"registers are those that Triton {MEASURED_WITH} gives out",
)


def why_not() -> str:
    """Why nothing can be compiled here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    try:
        _ = triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell, triton.knobs.nvidia.cuobjdump
    except RuntimeError as error:
        return f"Triton came without its assembler: {error}"
    return ""


def compile_for(capability: int) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "ahead_of_time.py"), str(capability)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[int, list[dict[str, Any]]]]:
    """By capability, what every kernel of every case became."""
    if reason := why_not():
        pytest.skip(reason)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield dict(zip(CAPABILITIES, pool.map(compile_for, CAPABILITIES), strict=True))


@as_measured
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills(compiled: dict[int, list[dict[str, Any]]], capability: int) -> None:
    assert {f"{k['case']}: {k['kernel']}": k["stack"] for k in compiled[capability] if k["stack"]} == {}


@as_measured
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_keeps_to_its_budget(compiled: dict[int, list[dict[str, Any]]], capability: int) -> None:
    used = [(k["case"], k["kernel"], k["registers"], k["shared"]) for k in compiled[capability]]
    assert {kernel[:2] for kernel in used} == {(case, kernel) for case in BUDGETS for kernel in BUDGETS[case]}
    over = [
        kernel
        for kernel in used
        if any(u > most for u, most in zip(kernel[2:], BUDGETS[kernel[0]][kernel[1]], strict=True))
    ]
    assert over == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_of_bfloat16_run_on_tensor_cores(compiled: dict[int, list[dict[str, Any]]], capability: int) -> None:
    products = [
        k for k in compiled[capability] if "bf16" in k["case"] and k["kernel"] in (*PIPELINED, "generate_kernel")
    ]
    assert {k["kernel"] for k in products} == {*PIPELINED, "generate_kernel"}
    assert [k for k in products if MATRIX_INSTRUCTION[capability] not in k["instructions"]] == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_convolutions_load_ahead_while_they_multiply(
    compiled: dict[int, list[dict[str, Any]]], capability: int
) -> None:
    convolutions = [k for k in compiled[capability] if k["kernel"] in PIPELINED]
    assert {k["kernel"] for k in convolutions} == {*PIPELINED}
    assert [k for k in convolutions if "cp.async" not in k["instructions"]] == []
