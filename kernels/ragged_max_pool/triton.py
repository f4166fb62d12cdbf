"""`ragged_max_pool` in Triton: a tile of pixels by a tile of channels, tap by tap.

Nothing is read back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, M pixels out, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import inside_image, own_slot, padded, slot, window
from kernels.gpu.tiles import tile
from kernels.layout import Image, activation_slot, output_image


@triton.jit
def _max_pool_kernel(
    x, y, channels_S, source_S, pixels, height, width, out_height, out_width, x_slot, y_slot, max_channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    channels = tl.load(channels_S + s)
    tiles_across = tl.cdiv(max_channels, COLUMNS)
    number, first = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across * COLUMNS
    if first >= channels:
        return
    m, c = number * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    stride = padded(channels)
    inside_MC = (m < pixels)[:, None] & (c < stride)[None, :]
    top_M, left_M, pixel = window(m, height, width, out_height, out_width, KERNEL, STRIDE)
    pixel_M = slot(x, source_S, s, x_slot) + pixel.to(tl.int64) * stride
    largest_MC = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    for tap in tl.static_range(KERNEL * KERNEL):
        valid_MC = inside_MC & inside_image(top_M, left_M, tap, height, width, KERNEL)[:, None]
        step = (tap // KERNEL * width + tap % KERNEL) * stride
        value_MC = tl.load((pixel_M + step)[:, None] + c[None, :], mask=valid_MC, other=float("-inf")).to(tl.float32)
        # As in PyTorch, a NaN is larger than every number.
        largest_MC = tl.where((value_MC > largest_MC) | (value_MC != value_MC), value_MC, largest_MC)
    at = m.to(tl.int64)[:, None] * stride + c[None, :]
    tl.store(own_slot(y, s, y_slot) + at, largest_MC.to(y.dtype.element_ty), mask=inside_MC)


def ragged_max_pool_triton(
    x: Tensor, channels: Tensor, source: Tensor, image: Image, kernel: int, stride: int, max_channels: int
) -> Tensor:
    """Launch the kernel. Arguments and results: `kernels.ragged_max_pool`."""
    count, (_, height, width) = channels.shape[0], image
    out_image = output_image(image, kernel, stride)
    pixels = out_image[0] * out_image[1] * out_image[2]
    size = tile("ragged_max_pool", x.dtype)
    y = x.new_empty(count, activation_slot(out_image, max_channels))
    with torch.cuda.device_of(x):
        _max_pool_kernel[triton.cdiv(pixels, size.rows) * triton.cdiv(max_channels, size.columns), count](
            x, y, channels, source, pixels, height, width, *out_image[1:], x.shape[1], y.shape[1], max_channels, kernel,
            stride, size.rows, size.columns, **size.options,
        )  # fmt: skip
    return y
