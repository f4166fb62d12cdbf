"""What only a GPU can show: that no op waits for it, and that a CUDA graph may hold them all."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_fused_block
import test_generate_weights
import test_ragged_conv
import test_ragged_depthwise
import test_ragged_max_pool
import test_ragged_normalise
import test_score_logits
import torch
from ragged import moved
from torch import Tensor

from kernels import backends
from kernels.ops import REFERENCE_NAMESPACE, overload

FP32 = torch.float32
# Widths are full, so that no pad channel is compared.
ARGUMENTS: dict[str, Callable[[], list[Any]]] = {
    "generate_weights": lambda: [*test_generate_weights.small(FP32, 8, 16)[:3], *full_widths(), False],
    "ragged_conv": lambda: test_ragged_conv.arguments(FP32, [8, 8], [16, 16]),
    "ragged_depthwise": lambda: test_ragged_depthwise.arguments(FP32, [16, 16]),
    "ragged_normalise": lambda: test_ragged_normalise.arguments(FP32, [16, 16]),
    "ragged_max_pool": lambda: test_ragged_max_pool.arguments(FP32, [16, 16]),
    "score_logits": test_score_logits.arguments,
    "fused_block": test_fused_block.arguments,
}

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.parametrize("backend", ["triton", "cuda"]),
    pytest.mark.parametrize("op", ARGUMENTS),
]


@pytest.fixture(autouse=True)
def forced(op: str, backend: str) -> Iterator[None]:
    """The kernel of this backend, if the op has one."""
    if reason := backends.why_not(op, backend):
        pytest.skip(reason)
    with backends.use(backend):
        yield


def full_widths() -> list[Tensor]:
    return [torch.tensor([8, 8], dtype=torch.int32), torch.tensor([16, 16], dtype=torch.int32)]


def call(op: str, arguments: list[Any]) -> list[Tensor]:
    with torch.no_grad():
        results = backends.implementation(op, arguments[0])(*arguments)
    return list(results) if isinstance(results, tuple) else [results]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_an_op_equals_its_reference(op: str) -> None:
    arguments = ARGUMENTS[op]()
    with torch.no_grad():
        expected = overload(REFERENCE_NAMESPACE, op)(*arguments)
    for actual, wanted in zip(
        call(op, moved(arguments, "cuda")), expected if isinstance(expected, tuple) else [expected], strict=True
    ):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-5, atol=1e-4)


def test_an_op_does_not_wait_for_the_gpu(op: str, request: pytest.FixtureRequest) -> None:
    arguments = moved(ARGUMENTS[op](), "cuda")
    call(op, arguments)  # compiles
    request.getfixturevalue("no_waiting")
    call(op, arguments)


def test_an_op_in_a_cuda_graph_computes_the_same(op: str) -> None:
    arguments = moved(ARGUMENTS[op](), "cuda")
    expected = call(op, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(op, arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
