"""Random ragged batches, and buffers with NaN wherever nothing may be read."""

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.layout import Image, activation_slot, view_activations, view_weights, weight_slot

NAN = float("nan")


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
    return draw(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)))


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
    """The weights packed, zero in pad channels, NaN behind the fronts."""
    kernel = weights[0].shape[-1]
    packed = torch.full((len(weights), weight_slot(max_cin, max_cout, kernel, depthwise)), NAN, dtype=weights[0].dtype)
    for row, dense in zip(packed, weights, strict=True):
        cout, cin = dense.shape[:2]
        front = row[: weight_slot(cin, cout, kernel, depthwise)].zero_()
        view_weights(front, cin, cout, kernel, depthwise).copy_(dense)
    return packed


def activate(x: Tensor, activation: str) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda t: t,
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
    }
    return functions[activation](x)


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference from a float64 result."""
    return (actual.double() - exact).abs().max().item()


def assert_as_exact_as_torch(actual: Tensor, in_torch: Tensor, exact: Tensor) -> None:
    """At most twice the error of PyTorch's own result in the same precision, against float64.

    PyTorch's may be zero by luck: the float32 rounding of a few terms of order one, and of the result to its own
    precision, is allowed on top.
    """
    largest = exact.abs().max().item()
    luck = 4 * torch.finfo(torch.float32).eps * (1 + largest) + torch.finfo(actual.dtype).eps * largest
    assert error(actual, exact) <= 2 * error(in_torch, exact) + luck
