"""The Triton kernels against the tests of their ops, in a process of their own (parity.py)."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

PARITY = Path(__file__).with_name("parity.py")


def test_every_kernel_passes_the_tests_of_its_op() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        if version("triton") < "3.7":
            pytest.skip("before 3.7, Triton's interpreter knows neither bfloat16 nor loops over a number it is given")
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PARITY)]
    done = subprocess.run(command, cwd=PARITY.parents[3], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
