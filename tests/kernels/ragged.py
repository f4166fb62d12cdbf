"""Random ragged batches, and buffers with NaN wherever nothing may be read."""

import os
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.layout import Image, activation_slot, view_activations, weight_slot, write_weights

NAN = float("nan")
# The kernels under test where they are those of a GPU (gpu/parity.py): triton or cuda.
GPU_KERNELS = os.environ.get("GPU_KERNELS", "")
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if GPU_KERNELS else [])]
ACTIVATIONS = ["none", "relu", "relu6"]
# Triton's interpreter is thousands of times slower than a kernel: fewer and smaller examples for it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LARGEST_SIDE = 7 if INTERPRETED else 12
kernel_sizes = st.sampled_from([1, 3] if INTERPRETED else [1, 3, 5, 7])
# The fixture `kernel` is the same for all examples of a test, as it should be.
one_kernel_for_all_examples = settings(
    max_examples=6 if INTERPRETED else 20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# Most channels of a layer: the least, whole and broken registers and panels of weights, primes, and a wide one.
limits = st.sampled_from([1, 2, 7, 8, 9, 16, 17, 24, 31, 33, 40, 70]) | st.integers(1, 40)


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def widths(draw: st.DrawFn, count: int, limit: int) -> list[int]:
    """`count` channel counts: least, full and anything between."""
    one = st.sampled_from([1, limit]) | st.integers(1, limit)
    return draw(st.lists(one, min_size=count, max_size=count))


@st.composite
def images(draw: st.DrawFn) -> tuple[int, int, int]:
    """(N, H, W) from 1 × 1 pixel up."""
    return draw(st.tuples(st.integers(1, 3), st.integers(1, LARGEST_SIDE), st.integers(1, LARGEST_SIDE)))


def moved(value: Any, device: str) -> Any:
    """Tensors, and those in lists and tuples, on another device; whatever else it is, as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def random_activations(channels: Sequence[int], image: Image, dtype: torch.dtype) -> list[Tensor]:
    n, height, width = image
    return [torch.randn(n, c, height, width).to(dtype) for c in channels]


def poisoned_activations(images: Sequence[Tensor], max_channels: int) -> Tensor:
    """The images packed, NaN in pad channels and behind the fronts."""
    n, _, height, width = images[0].shape
    slot = activation_slot((n, height, width), max_channels)
    x = torch.full((len(images), slot), NAN, dtype=images[0].dtype)
    for row, dense in zip(x, images, strict=True):
        view_activations(row, (n, height, width), dense.shape[1]).copy_(dense)
    return x


def poisoned_weights(weights: Sequence[Tensor], max_cin: int, max_cout: int, depthwise: bool = False) -> Tensor:
    """The weights packed, zero in pad channels, NaN behind the fronts; after them a slot of nothing but NaN."""
    kernel, dtype = weights[0].shape[-1], weights[0].dtype
    packed = torch.full((len(weights) + 1, weight_slot(max_cin, max_cout, kernel, dtype, depthwise)), NAN, dtype=dtype)
    for slot, dense in zip(packed, weights, strict=False):
        write_weights(slot, dense, depthwise)
    return packed


def poisoned_channels(channels: Sequence[int], limit: int) -> Tensor:
    """Random numbers of order one per subnetwork and channel `[S, limit]`, NaN beyond a subnetwork's channels."""
    numbers = torch.randn(len(channels), limit)
    for row, c in zip(numbers, channels, strict=True):
        row[c:] = NAN
    return numbers


def activate(x: Tensor, activation: str) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda t: t,
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
    }
    return functions[activation](x)


def largest(values: Tensor) -> float:
    """The largest absolute value, 0 of none."""
    return values.abs().max().item() if values.numel() else 0.0


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference from a float64 result."""
    return largest(actual.double() - exact)


def assert_as_exact_as_torch(actual: Tensor, in_torch: Tensor, exact: Tensor, inner: float = 0) -> None:
    """At most twice the error of PyTorch's own result in the same precision, against float64.

    PyTorch's may be zero by luck: the float32 rounding of a few terms of order one, and of the result to its own
    precision, is allowed on top; so is that of an inner result of size `inner`, where a kernel may round one.
    """
    size = largest(exact)
    luck = 4 * torch.finfo(torch.float32).eps * (1 + size) + torch.finfo(actual.dtype).eps * (size + inner)
    theirs = error(in_torch, exact)
    # PyTorch's bfloat16 convolution of a single channel and column may read memory that nobody wrote.
    assert error(actual, exact) <= 2 * (theirs if isfinite(theirs) else 0) + luck
