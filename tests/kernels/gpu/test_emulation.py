"""What emulates a GPU computes what a GPU would, and sees what a GPU would not forgive."""

import ctypes
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler")


def library() -> Path:
    return emulated.build("emulation", (HERE / "emulation.cu",), (), ())


def call(name: str, *tensors: Tensor) -> None:
    getattr(ctypes.CDLL(str(library())), name)(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))


def call_with(name: str, size: int = 64) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(size), torch.full((size,), -1.0)
    call(name, x, y)
    return x, y


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_a_product_by_a_warp_is_that_of_the_matrices(name: str, dtype: torch.dtype) -> None:
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.full((16, 8), float("nan"))
    call(f"product_{name}", a, b, c)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_a_warp_exchanges_its_numbers_and_no_other() -> None:
    x, sums, following = torch.randn(64), torch.empty(64), torch.empty(64)
    call("both_shuffles", x, sums, following)
    by_warp = x.view(2, 32)
    torch.testing.assert_close(sums.view(2, 32), by_warp.sum(1, keepdim=True).expand(2, 32))
    assert torch.equal(following.view(2, 32), torch.cat([by_warp[:, 1:], by_warp[:, -1:]], 1))


def test_a_barrier_makes_what_threads_wrote_visible_and_its_absence_shows() -> None:
    x, y = call_with("with_barrier")
    assert torch.equal(y, x.flip(0))
    x, y = call_with("without_barrier")
    assert y.isnan().any()


def test_a_copy_has_happened_only_when_it_was_waited_for() -> None:
    x, y = call_with("all_copies")
    expected = torch.cat([x.view(8, 8)[:, :4], torch.zeros(8, 4)], 1).flatten()
    assert torch.equal(y, expected)
    x, y = call_with("all_but_one")
    assert torch.equal(y.view(8, 8)[:, :4], x.view(8, 8)[:, :4])
    assert y.view(8, 8)[:, 4:].isnan().all()


FAULTS = {
    "beyond": "",  # a page that nobody may touch
    "before": "something was written before the shared memory",
    "copy_beyond": "an address outside of the shared memory",
    "copy_misaligned": "a misaligned access",
    "waiting": "threads wait for others that never come",
    "too_much": "more shared memory than a block can have",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_process(name: str) -> None:
    code = f"import ctypes; x = ctypes.create_string_buffer(512); ctypes.CDLL({str(library())!r}).{name}(x, x)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert FAULTS[name] in done.stderr


numbers = st.floats(width=32) | st.floats(-10, 10, width=32)


@given(numbers, numbers)
def test_numbers_are_rounded_as_by_torch(low: float, high: float) -> None:
    x, back = torch.tensor([low, high]), torch.empty(2)
    words = {torch.bfloat16: torch.empty(2, dtype=torch.int16), torch.float16: torch.empty(2, dtype=torch.int16)}
    call("rounded", x, *words.values(), back)
    for dtype, word in words.items():
        torch.testing.assert_close(word.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
    expected = torch.stack([x[1].to(dtype).float() for dtype in words])
    torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)


@given(numbers, numbers)
def test_a_nan_is_no_number_after_a_comparison(a: float, b: float) -> None:
    x, y = torch.tensor([a, b]), torch.empty(2)
    call("clamps", x, y)
    expected = torch.stack([torch.maximum(x[0], x[1]), torch.minimum(x[0], x[1])])
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
