"""`ragged_max_pool_backward` in Triton: the largest pixel of every window first, then for every pixel its windows.

Nothing is read back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, L slots of x, M pixels, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import inside_image, meeting_window, own_slot, padded, reader_width, slot, window
from kernels.gpu.tiles import tile
from kernels.layout import Image, output_image


@triton.jit
def _largest_kernel(
    x, taps, channels_S, source_S, pixels, height, width, out_height, out_width, x_slot, y_slot, max_channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tap of each window at which its largest pixel lies: the last NaN, or the first that no other exceeds."""
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
    largest_MC = tl.zeros((ROWS, COLUMNS), tl.float32)
    tap_MC = tl.full((ROWS, COLUMNS), -1, tl.int16)
    for tap in tl.static_range(KERNEL * KERNEL):
        valid_MC = inside_MC & inside_image(top_M, left_M, tap, height, width, KERNEL)[:, None]
        step = (tap // KERNEL * width + tap % KERNEL) * stride
        value_MC = tl.load((pixel_M + step)[:, None] + c[None, :], mask=valid_MC, other=0).to(tl.float32)
        # As in PyTorch, a NaN is larger than every number and than the NaN before it.
        larger_MC = (tap_MC < 0) | (value_MC > largest_MC) | (value_MC != value_MC)
        largest_MC = tl.where(valid_MC & larger_MC, value_MC, largest_MC)
        tap_MC = tl.where(valid_MC & larger_MC, tap, tap_MC).to(tl.int16)
    tl.store(own_slot(taps, s, y_slot) + m.to(tl.int64)[:, None] * stride + c[None, :], tap_MC, mask=inside_MC)


@triton.jit
def _max_pool_gradient_kernel(
    grad, taps, grad_x, channels_S, source_S, count, pixels, height, width, out_height, out_width, x_slot, y_slot,
    max_channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    tiles_across = tl.cdiv(max_channels, COLUMNS)
    number, first = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across * COLUMNS
    channels = reader_width(source_S, channels_S, row, count)
    # A slot that nobody reads is zero from end to end.
    stored = tl.where(channels > 0, channels, max_channels)
    if first >= stored:
        return
    m, c = number * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    stride = padded(stored)
    stored_MC = (m < pixels)[:, None] & (c < stride)[None, :]
    acc_MC = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in range(0, count):
        if tl.load(source_S + s) == row:
            for tap in tl.static_range(KERNEL * KERNEL):
                at_M, meets_M = meeting_window(m, tap, height, width, out_height, out_width, KERNEL, STRIDE)
                at_MC = at_M.to(tl.int64)[:, None] * stride + c[None, :]
                mask_MC = meets_M[:, None] & stored_MC
                tap_MC = tl.load(own_slot(taps, s, y_slot) + at_MC, mask=mask_MC, other=-1)
                acc_MC += tl.load(own_slot(grad, s, y_slot) + at_MC, mask=mask_MC & (tap_MC == tap), other=0).to(
                    tl.float32
                )
    at_MC = m.to(tl.int64)[:, None] * stride + c[None, :]
    tl.store(own_slot(grad_x, row, x_slot) + at_MC, acc_MC.to(grad_x.dtype.element_ty), mask=stored_MC)


def ragged_max_pool_backward_triton(
    grad: Tensor,
    x: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
) -> Tensor:
    """Launch the kernels. Arguments and result: `ragged_max_pool_backward_reference`."""
    (images, *size_in), (_, *size_out) = image, output_image(image, kernel, stride)
    size = tile("ragged_max_pool", x.dtype)
    across = triton.cdiv(max_channels, size.columns)
    grad_x, taps = torch.empty_like(x), torch.empty_like(grad, dtype=torch.int16)
    rest = (*size_in, *size_out, x.shape[1], grad.shape[1], max_channels, kernel, stride, size.rows, size.columns)
    with torch.cuda.device_of(x):
        pixels = images * size_out[0] * size_out[1]
        _largest_kernel[triton.cdiv(pixels, size.rows) * across, len(channels)](
            x, taps, channels, source, pixels, *rest, **size.options
        )
        pixels = images * size_in[0] * size_in[1]
        _max_pool_gradient_kernel[triton.cdiv(pixels, size.rows) * across, len(x)](
            grad, taps, grad_x, channels, source, len(channels), pixels, *rest, **size.options
        )
    return grad_x
