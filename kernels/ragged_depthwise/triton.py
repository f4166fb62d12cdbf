"""`ragged_depthwise` in Triton: a tile of pixels by a tile of channels, tap by tap.

The grid is sized for the widest subnetwork; a tile beyond a subnetwork's channels ends at once. Nothing is read
back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, L slots of x, M pixels out, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import activate, finish, inside_image, padded, per_channel, slot, window
from kernels.gpu.sums import add_tile, total
from kernels.gpu.tiles import tile
from kernels.layout import Image, activation_slot, output_image


@triton.jit
def _depthwise_kernel(
    x, weight, y, partials, channels_S, source_S, weight_source_S, scale_SC, shift_SC, shortcut, shortcut_source_S,
    input_scale_LC, input_shift_LC, pixels, height, width, out_height, out_width, x_slot, weight_slot, y_slot,
    max_channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, INPUT_ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    channels = tl.load(channels_S + s)
    tiles_across = tl.cdiv(max_channels, COLUMNS)
    number, first = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across * COLUMNS
    if first >= channels:
        return
    m, c = number * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    top_M, left_M, pixel = window(m, height, width, out_height, out_width, KERNEL, STRIDE)
    stride = padded(channels)
    stored_C = c < stride
    pixel_M = slot(x, source_S, s, x_slot) + pixel.to(tl.int64) * stride
    taps = slot(weight, weight_source_S, s, weight_slot)
    if input_scale_LC is not None:
        input_slot = tl.load(source_S + s)
        input_scale_C = per_channel(input_scale_LC, input_slot, max_channels, c, channels)
        input_shift_C = per_channel(input_shift_LC, input_slot, max_channels, c, channels)

    acc_MC = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tap in tl.static_range(KERNEL * KERNEL):
        valid_MC = ((m < pixels) & inside_image(top_M, left_M, tap, height, width, KERNEL))[:, None]
        valid_MC &= stored_C[None, :]
        step = (tap // KERNEL * width + tap % KERNEL) * stride
        value_MC = tl.load((pixel_M + step)[:, None] + c[None, :], mask=valid_MC, other=0).to(tl.float32)
        if input_scale_LC is not None:
            value_MC = activate(value_MC * input_scale_C[None, :] + input_shift_C[None, :], INPUT_ACTIVATION)
            value_MC = tl.where(valid_MC, value_MC, 0)
        w_C = tl.load(taps + tap * stride + c, mask=stored_C, other=0).to(tl.float32)
        acc_MC += value_MC * w_C[None, :]

    if partials is not None:
        add_tile(partials, s, number, tl.cdiv(pixels, ROWS), max_channels, c, channels, acc_MC)
    finish(
        y, acc_MC, s, m, pixels, c, channels, max_channels, y_slot, scale_SC, shift_SC, shortcut, shortcut_source_S,
        ACTIVATION,
    )  # fmt: skip


def depthwise_with_shortcut(
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
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """`ragged_depthwise_triton` with the shortcut of `ragged_conv`, added before the activation."""
    count, (_, height, width) = channels.shape[0], image
    out_image = output_image(image, kernel, stride)
    pixels = out_image[0] * out_image[1] * out_image[2]
    size = tile("ragged_depthwise", x.dtype)
    tiles = triton.cdiv(pixels, size.rows)
    y = x.new_empty(count, activation_slot(out_image, max_channels))
    partials = x.new_empty(count, tiles, 2, max_channels, dtype=torch.float32) if statistics else None
    with torch.cuda.device_of(x):
        _depthwise_kernel[tiles * triton.cdiv(max_channels, size.columns), count](
            x, weight, y, partials, channels, source, weight_source, scale, shift, shortcut, shortcut_source,
            input_scale, input_shift, pixels, height, width, *out_image[1:], x.shape[1], weight.shape[1], y.shape[1],
            max_channels, kernel, stride, activation, input_activation, size.rows, size.columns, **size.options,
        )  # fmt: skip
        return y, total(partials, channels, x)


def ragged_depthwise_triton(
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
) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Arguments and results: `kernels.ragged_depthwise`."""
    return depthwise_with_shortcut(
        x, weight, channels, source, weight_source, image, kernel, stride, max_channels, scale, shift, activation,
        None, None, input_scale, input_shift, input_activation, statistics,
    )  # fmt: skip
