"""ragged_depthwise against one dense depthwise convolution per subnetwork."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import (
    activate,
    assert_as_exact_as_torch,
    images,
    int32,
    poisoned_activations,
    poisoned_weights,
    random_activations,
    widths,
)
from torch import Tensor
from torch.nn import functional

import kernels
from kernels.layout import output_image


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 999)))
    count, limit = draw(st.integers(1, 4)), draw(st.integers(1, 19))
    channels, image = draw(widths(count, limit)), draw(images())
    kernel = draw(st.sampled_from([1, 3, 5]))
    return {
        "inputs": random_activations(channels, image, torch.float32),
        "weights": [torch.randn(c, 1, kernel, kernel) for c in channels],
        "order": draw(st.permutations(range(count))),
        "image": image,
        "stride": draw(st.integers(1, 3)),
        "max_channels": limit,
        "bias": torch.randn(count, limit) if draw(st.booleans()) else None,
        "activation": draw(st.sampled_from(["none", "relu", "relu6"])),
    }


def run(case: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Outputs of the op, of PyTorch in `dtype` and in float64, and the op's sums."""
    inputs, weights = ([t.to(dtype) for t in case[name]] for name in ("inputs", "weights"))
    limit, stride, order = case["max_channels"], case["stride"], case["order"]
    kernel, channels = weights[0].shape[-1], int32([len(w) for w in weights])
    y, sums = kernels.ragged_depthwise(
        poisoned_activations([inputs[s] for s in order], limit),
        poisoned_weights(weights, 1, limit, depthwise=True),
        channels,
        int32([order.index(s) for s in range(len(order))]),
        image=case["image"],
        kernel=kernel,
        stride=stride,
        max_channels=limit,
        bias_SC=None if case["bias"] is None else case["bias"].to(dtype),
        activation=case["activation"],
        statistics=True,
    )

    def dense(s: int, precision: torch.dtype) -> Tensor:
        x, weight = inputs[s].to(precision), weights[s].to(precision)
        out = functional.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=len(weight))
        if case["bias"] is not None:
            out = out + case["bias"][s, : len(weight), None, None].to(dtype).to(precision)
        return activate(out, case["activation"])

    everyone = range(len(weights))
    actual = kernels.unpack_activations(y, channels, output_image(case["image"], kernel, stride))
    return actual, [dense(s, dtype) for s in everyone], [dense(s, torch.float64) for s in everyone], sums


@given(convolutions(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_each_subnetwork_equals_its_own_dense_convolution(case: dict[str, Any], dtype: torch.dtype) -> None:
    for actual, in_torch, exact in zip(*run(case, dtype)[:3], strict=True):
        assert_as_exact_as_torch(actual, in_torch, exact)


@given(convolutions())
def test_sums_are_those_of_the_bare_convolution(case: dict[str, Any]) -> None:
    *_, sums = run(case, torch.float32)
    _, _, outputs, _ = run(case | {"bias": None, "activation": "none"}, torch.float32)
    expected = torch.zeros_like(sums)
    for s, out in enumerate(outputs):
        expected[s, :, : out.shape[1]] = torch.stack([out.sum((0, 2, 3)), out.square().sum((0, 2, 3))])
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)


def arguments(dtype: torch.dtype, channels: list[int]) -> list[Any]:
    torch.manual_seed(0)
    image, limit = (2, 4, 3), max(channels)
    return [
        kernels.pack_activations(random_activations(channels, image, dtype), limit).requires_grad_(),
        kernels.pack_weights(
            [torch.randn(c, 1, 3, 3, dtype=dtype) for c in channels], 1, limit, depthwise=True
        ).requires_grad_(),
        int32(channels),
        int32([1, 1]),
        list(image),
        3,
        2,
        limit,
        torch.randn(2, limit, dtype=dtype, requires_grad=True),
        "relu6",
        True,
    ]


def test_gradients_of_outputs_and_sums_are_exact() -> None:
    x, weight, *rest = arguments(torch.float64, [3, 9])
    x = kernels.pack_activations(random_activations([9, 9], (2, 4, 3), torch.float64), 9).requires_grad_()

    def outputs(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, sums = torch.ops.metaprune.ragged_depthwise(x, weight, *rest[:6], bias, *rest[7:])
        return *kernels.unpack_activations(y, rest[0], (2, 2, 2)), sums

    assert torch.autograd.gradcheck(outputs, (x, weight, rest[6]), fast_mode=True)


def test_the_op_is_registered_correctly() -> None:
    args = arguments(torch.float32, [16, 16])
    torch.library.opcheck(torch.ops.metaprune.ragged_depthwise.default, tuple(args))


def test_bad_input_is_refused_with_the_argument_named() -> None:
    x, weight, channels, source, *_ = arguments(torch.float32, [16, 16])
    options: dict[str, Any] = {"image": (2, 4, 3), "kernel": 3, "stride": 2, "max_channels": 16}
    with pytest.raises(RuntimeError, match="weight must be"):
        kernels.ragged_depthwise(x, weight[:, :5], channels, source, **options)
    with pytest.raises(RuntimeError, match=r"channels\[1\] is 17; legal values are 1..16"):
        kernels.ragged_depthwise(x, weight, int32([16, 17]), source, **options)
