"""The ops of networks.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, C channels, T classes.
"""

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

from kernels.checks.arguments import (
    check,
    count_of,
    expect,
    expect_activations,
    expect_buffer,
    expect_indices,
    expect_per_channel,
    expect_prologue,
    expect_shortcut,
    expect_window,
)
from kernels.checks.generators import generate_weights
from kernels.layout import Image, activation_slot, chained_image, output_image, weight_slot

MAX_FUSED = 3


def ragged_conv(
    x: Tensor,
    weight: Tensor,
    cin: Tensor,
    cout: Tensor,
    source: Tensor,
    weight_source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_cin: int,
    max_cout: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    statistics: bool,
) -> None:
    expect_window(kernel, stride, activation)
    expect_activations(x, image, max_cin)
    s = count_of(cout, "cout")
    expect_indices(x, s, cin=cin, cout=cout, source=source, weight_source=weight_source)
    expect_buffer("weight", weight, weight_slot(max_cin, max_cout, kernel, x.dtype, device=x.device), x)
    expect_per_channel(x, (s, max_cout), "S, max channels", scale=scale, shift=shift)
    expect_shortcut(x, activation_slot(output_image(image, kernel, stride), max_cout), s, shortcut, shortcut_source)
    expect_prologue(x, max_cin, input_scale, input_shift, input_activation)


def ragged_conv_backward(
    grad_y: Tensor | None,
    grad_sums: Tensor | None,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    cin: Tensor,
    cout: Tensor,
    source: Tensor,
    weight_source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_cin: int,
    max_cout: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    needs_x: bool,
) -> None:
    forward = (x, weight, cin, cout, source, weight_source, image, kernel, stride, max_cin, max_cout)
    ragged_conv(*forward, None, None, "none", None, None, input_scale, input_shift, input_activation, True)
    _output_gradients(grad_y, grad_sums, y, x, output_image(image, kernel, stride), cout.shape[0], max_cout)


def generated_conv(
    x: Tensor,
    basis: Tensor,
    bias: Tensor,
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
    source: Tensor,
    image: Image,
    stride: int,
    max_cin: int,
    max_cout: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    statistics: bool,
) -> None:
    generate_weights(basis, bias, codes, cin, cout, False)
    o, i, taps, _ = basis.shape
    expect_window(isqrt(taps), stride)
    check(
        1 <= max_cin <= i and 1 <= max_cout <= o,
        lambda: f"max_cin and max_cout must be 1..{i} and 1..{o}, got {max_cin} and {max_cout}",
    )
    expect_activations(x, image, max_cin)
    expect("basis", basis, basis.shape, (x.dtype,), x, "= [O, I, K, H] ")
    expect_indices(x, cout.shape[0], source=source)
    expect_prologue(x, max_cin, input_scale, input_shift, input_activation)


def ragged_depthwise(
    x: Tensor,
    weight: Tensor,
    channels: Tensor,
    source: Tensor,
    weight_source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    statistics: bool,
) -> None:
    expect_window(kernel, stride, activation)
    expect_activations(x, image, max_channels)
    s = count_of(channels, "channels")
    expect_indices(x, s, channels=channels, source=source, weight_source=weight_source)
    expect_buffer("weight", weight, weight_slot(1, max_channels, kernel, x.dtype, depthwise=True), x)
    expect_per_channel(x, (s, max_channels), "S, max channels", scale=scale, shift=shift)
    expect_prologue(x, max_channels, input_scale, input_shift, input_activation)


def ragged_depthwise_backward(
    grad_y: Tensor | None,
    grad_sums: Tensor | None,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    channels: Tensor,
    source: Tensor,
    weight_source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    needs_x: bool,
) -> None:
    forward = (x, weight, channels, source, weight_source, image, kernel, stride, max_channels)
    ragged_depthwise(*forward, None, None, "none", input_scale, input_shift, input_activation, True)
    _output_gradients(grad_y, grad_sums, y, x, output_image(image, kernel, stride), channels.shape[0], max_channels)


def fused_block(
    x: Tensor,
    channels: Tensor,
    source: Tensor,
    weights: Sequence[Tensor],
    weight_sources: Sequence[Tensor],
    widths: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    image: Image,
    max_channels: int,
    max_widths: Sequence[int],
    depthwise: Sequence[bool],
    kernels: Sequence[int],
    strides: Sequence[int],
    activations: Sequence[str],
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
) -> None:
    lists = (weights, weight_sources, widths, scales, shifts, max_widths, depthwise, kernels, strides, activations)
    lengths = [len(values) for values in lists]
    check(
        1 <= lengths[0] <= MAX_FUSED and len(set(lengths)) == 1,
        lambda: f"a fused block is 1 to {MAX_FUSED} convolutions, each with all its arguments; got lists of {lengths}",
    )
    expect_activations(x, image, max_channels)
    s = count_of(channels, "channels")
    expect_indices(x, s, channels=channels, source=source)
    max_cin = max_channels
    for j, (weight, kernel, max_width) in enumerate(zip(weights, kernels, max_widths, strict=True)):
        expect_window(kernel, strides[j], activations[j])
        check(max_width >= 1, lambda: f"max_widths must be at least 1, got {list(max_widths)}")
        expect_indices(x, s, **{f"weight_sources[{j}]": weight_sources[j], f"widths[{j}]": widths[j]})
        slot = weight_slot(max_cin, max_width, kernel, x.dtype, depthwise[j], x.device)
        expect_buffer(f"weights[{j}]", weight, slot, x)
        expect_per_channel(
            x, (s, max_width), "S, max channels", **{f"scales[{j}]": scales[j], f"shifts[{j}]": shifts[j]}
        )
        max_cin = max_width
    out_image = chained_image(image, kernels, strides)
    expect_shortcut(x, activation_slot(out_image, max_cin), s, shortcut, shortcut_source)


def ragged_normalise(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    max_channels: int,
    activation: str,
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
) -> None:
    expect_window(1, 1, activation)
    expect_activations(x, image, max_channels)
    s = count_of(channels, "channels")
    expect_indices(x, s, channels=channels, source=source)
    expect_per_channel(x, (s, max_channels), "S, max channels", scale=scale, shift=shift)
    expect_shortcut(x, activation_slot(image, max_channels), s, shortcut, shortcut_source)


def ragged_normalise_backward(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    max_channels: int,
    activation: str,
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
) -> None:
    forward = (x, scale, shift, channels, source, image, max_channels, activation)
    ragged_normalise(*forward, shortcut, shortcut_source)
    for name, tensor in (("grad", grad), ("y", y)):
        expect(name, tensor, (channels.shape[0], x.shape[1]), (x.dtype,), x, "= [S, slot] ")


def scale_and_shift(sums: Tensor, count: int, epsilon: float) -> None:
    check(
        sums.dim() == 3 and sums.shape[1] == 2,
        lambda: f"sums must be [S, 2, max channels], got {list(sums.shape)}",
    )
    expect("sums", sums, sums.shape, (torch.float64,), sums, "= [S, 2, max channels] ")
    check(count >= 1 and epsilon > 0, lambda: f"count and epsilon must be positive, got {count} and {epsilon}")


def scale_and_shift_backward(grad_scale: Tensor, grad_shift: Tensor, sums: Tensor, count: int, epsilon: float) -> None:
    scale_and_shift(sums, count, epsilon)
    for name, grad in (("grad_scale", grad_scale), ("grad_shift", grad_shift)):
        expect(name, grad, (sums.shape[0], sums.shape[2]), (torch.float32,), sums, "= [S, max channels] ")


def ragged_max_pool(
    x: Tensor, channels: Tensor, source: Tensor, image: Image, kernel: int, stride: int, max_channels: int
) -> None:
    expect_window(kernel, stride)
    expect_activations(x, image, max_channels)
    expect_indices(x, count_of(channels, "channels"), channels=channels, source=source)


def ragged_max_pool_backward(
    grad: Tensor,
    x: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
) -> None:
    ragged_max_pool(x, channels, source, image, kernel, stride, max_channels)
    slot = activation_slot(output_image(image, kernel, stride), max_channels)
    expect("grad", grad, (channels.shape[0], slot), (x.dtype,), x, "= [S, slot] ")


def score_logits(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, channels: Tensor, source: Tensor, image: Image
) -> None:
    check(
        weight.dim() == 2 and weight.shape[0] >= 1,
        lambda: f"weight must be [classes, max channels], got {list(weight.shape)}",
    )
    expect_activations(x, image, weight.shape[1])
    expect_per_channel(x, weight.shape, "classes, max channels", weight=weight)
    expect_per_channel(x, weight.shape[:1], "classes", bias=bias)
    expect("labels", labels, (image[0],), (torch.int64,), x, "= [N] ")
    expect_indices(x, count_of(channels, "channels"), channels=channels, source=source)


def _output_gradients(
    grad_y: Tensor | None,
    grad_sums: Tensor | None,
    y: Tensor,
    x: Tensor,
    out_image: Image,
    count: int,
    max_channels: int,
) -> None:
    """The output of a bare convolution, and the gradients of it and of its sums, if there are any."""
    for name, tensor in (("y", y), ("grad_y", grad_y)):
        if tensor is not None:
            expect(name, tensor, (count, activation_slot(out_image, max_channels)), (x.dtype,), x, "= [S, slot] ")
    if grad_sums is not None:
        expect("grad_sums", grad_sums, (count, 2, max_channels), (torch.float64,), x, "= [S, 2, max channels] ")
