"""The kernels of a GPU against the tests of their ops, in processes of their own (parity.py)."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import emulated
import pytest
import torch

from kernels import backends

PARITY = Path(__file__).with_name("parity.py")


def run(kernels: str, **environment: str) -> None:
    # What the sanitizers find ends the run: their report must not be held back.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", str(PARITY)]
    done = subprocess.run(
        command,
        cwd=PARITY.parents[3],
        env=os.environ | {"GPU_KERNELS": kernels} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_triton_kernel_passes_the_tests_of_its_op() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        run("triton")
        return
    if version("triton") < "3.7":
        pytest.skip("before 3.7, Triton's interpreter knows neither bfloat16 nor loops over a number it is given")
    run("triton", TRITON_INTERPRET="1")


def test_every_cuda_kernel_passes_the_tests_of_its_op() -> None:
    if torch.cuda.is_available():
        for op in emulated.CUDA_OPS:
            if reason := backends.why_not(op, "cuda"):
                pytest.skip(reason)
        run("cuda")
        return
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler")
    run("cuda", **emulated.watched())
