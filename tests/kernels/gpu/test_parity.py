"""The kernels of a GPU against the tests of their ops, in processes of their own (parity.py, training_parity.py)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

from kernels import backends

HERE = Path(__file__).parent


def run_on_triton(*files: str) -> None:
    """Run test files with the Triton kernels, under the interpreter where there is no GPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    # Kernels of the CPU would only be in the way of those that take their place.
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1", "METAPRUNE_NO_EXTENSION": "1"}
    _run("triton", *files, **interpreted)


def run_on_cuda(*files: str) -> None:
    """Run test files with the CUDA C++ kernels, under emulation where there is no GPU."""
    if not torch.cuda.is_available():
        if emulated.compiler() is None:
            pytest.skip("no C++ compiler")
        _run("cuda", *files, **emulated.watched())
        return
    for op in emulated.CUDA_OPS:
        if reason := backends.why_not(op, "cuda"):
            pytest.skip(reason)
    _run("cuda", *files)


def _run(kernels: str, *files: str, **environment: str) -> None:
    # What the sanitizers find ends the run: their report must not be held back.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in files)],
        cwd=HERE.parents[2],
        env=os.environ | {"GPU_KERNELS": kernels} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_triton_kernel_passes_the_tests_of_its_op() -> None:
    run_on_triton("parity.py", "training_parity.py")


def test_every_cuda_kernel_passes_the_tests_of_its_op() -> None:
    run_on_cuda("parity.py")
