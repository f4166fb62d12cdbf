"""What only a GPU can show: that no op waits for it, and that a CUDA graph may hold them all."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_fused_block
import test_generate_weights
import test_generated_conv
import test_ragged_conv
import test_ragged_conv_backward
import test_ragged_depthwise
import test_ragged_depthwise_backward
import test_ragged_max_pool
import test_ragged_max_pool_backward
import test_ragged_normalise
import test_ragged_normalise_backward
import test_score_logits
import torch
from ragged import moved
from torch import Tensor
from weight_generators import Generator, state_of

from kernels import backends
from kernels.registration import REFERENCE_NAMESPACE, overload

FP32 = torch.float32
# Widths are full, so that no pad channel is compared.
ARGUMENTS: dict[str, Callable[[], list[Any]]] = {
    "generate_weights": lambda: [*test_generate_weights.small(FP32, 8, 16)[:3], *full_widths(), False],
    "ragged_conv": lambda: test_ragged_conv.arguments(FP32, [8, 8], [16, 16]),
    "generated_conv": lambda: test_generated_conv.arguments(FP32, [8, 8], [16, 16]),
    "ragged_depthwise": lambda: test_ragged_depthwise.arguments(FP32, [16, 16]),
    "ragged_normalise": lambda: test_ragged_normalise.arguments(FP32, [16, 16]),
    "ragged_max_pool": lambda: test_ragged_max_pool.arguments(FP32, [16, 16]),
    "ragged_conv_backward": lambda: test_ragged_conv_backward.with_outputs(
        test_ragged_conv_backward.arguments(FP32, [8, 8], [16, 16], (2, 9, 8))
    ),
    "ragged_depthwise_backward": lambda: test_ragged_depthwise_backward.fixed_arguments(
        test_ragged_depthwise_backward.fixed_case([16, 16], (2, 9, 8), 3, 2, FP32)
    ),
    "ragged_normalise_backward": lambda: test_ragged_normalise_backward.arguments(FP32, [16, 16], (2, 9, 8)),
    "ragged_max_pool_backward": lambda: test_ragged_max_pool_backward.arguments(FP32, [16, 16], (2, 9, 8)),
    "score_logits": test_score_logits.arguments,
    "fused_block": test_fused_block.arguments,
    "generate_delayed": lambda: training("generate_delayed"),
    "update_generators_": lambda: training("update_generators_"),
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


def training(op: str) -> list[Any]:
    """A step of two structures after one of smaller ones, whose other rows wait."""
    torch.manual_seed(0)
    shapes = [(16, 8, 9, 20), (16, 8, 9)] * 2
    generator = Generator(state_of(torch.randn(shape) for shape in shapes), weight_decay=0.01)
    generator.update(generator.random_factors([(9, 8), (16, 3)]), everywhere=False)
    factors = generator.random_factors([(16, 8), (16, 8)])
    late = [*generator.state.tensors, generator.recurrence.drift(factors.grad), factors.codes_SH]
    if op == "generate_delayed":
        return [*late, factors.cin_S, factors.cout_S, False]
    return [*late, factors.grad, factors.cin_S, factors.cout_S, False, 0.1, 0.9, 0.01, False, 2]


def call(op: str, arguments: list[Any], implementation: Callable[..., Any] | None = None) -> list[Tensor]:
    """What the op returns, and of an op in place also what it changed, which was a copy."""
    changed = [a.clone() for a in arguments[:5]] if op.endswith("_") else []
    with torch.no_grad():
        results = (implementation or backends.implementation(op, arguments[0]))(*changed, *arguments[len(changed) :])
    return [*(results if isinstance(results, tuple) else [results]), *changed]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_an_op_equals_its_reference(op: str) -> None:
    arguments = ARGUMENTS[op]()
    expected = call(op, arguments, overload(REFERENCE_NAMESPACE, op))
    for actual, wanted in zip(call(op, moved(arguments, "cuda")), expected, strict=True):
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
