"""`ragged_depthwise_backward` in Triton: the gradient of x tap by tap, that of the weights with all taps at once.

Both take tiles of pixels by channels; the pixels that the weights see are cut in parts, which are added in order.
Nothing is read back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, L slots of x, T taps, M pixels, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import activate, meeting_window, padded, per_channel, reader_width, slot
from kernels.gpu.gradients import add_parts, arrived, hand_on, of_sums
from kernels.gpu.sums import totals
from kernels.gpu.tiles import depthwise_taps, parts, tile
from kernels.layout import Image, output_image


@triton.jit
def _depthwise_input_gradient_kernel(
    grad_y, grad_sums, y, weight, x, grad_x, partials, channels_S, source_S, weight_source_S, input_scale_LC,
    input_shift_LC, count, pixels, height, width, out_height, out_width, y_slot, weight_slot, x_slot, max_channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, INPUT_ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
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
            one_C, other_C = of_sums(grad_sums, s, max_channels, c, channels)
            taps = slot(weight, weight_source_S, s, weight_slot)
            for tap in tl.static_range(KERNEL * KERNEL):
                at_M, meets_M = meeting_window(m, tap, height, width, out_height, out_width, KERNEL, STRIDE)
                at_MC = at_M.to(tl.int64)[:, None] * stride + c[None, :]
                read_MC = meets_M[:, None] & stored_MC
                d_MC = arrived(grad_y, grad_sums, y, s, y_slot, at_MC, read_MC, one_C, other_C)
                w_C = tl.load(taps + tap * stride + c, mask=c < stride, other=0)
                acc_MC += d_MC * w_C.to(tl.float32)[None, :]

    hand_on(
        acc_MC, x, grad_x, partials, number, tl.num_programs(0) // tiles_across, row,
        m.to(tl.int64)[:, None] * stride + c[None, :], stored_MC, c, channels, max_channels, x_slot, input_scale_LC,
        input_shift_LC, INPUT_ACTIVATION,
    )  # fmt: skip


@triton.jit
def _depthwise_weight_gradient_kernel(
    grad_y, grad_sums, y, x, parts, channels_S, source_S, input_scale_LC, input_shift_LC, pixels, height, width,
    out_height, out_width, y_slot, x_slot, weight_slot, max_channels, steps,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, INPUT_ACTIVATION: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    s, part = tl.program_id(1), tl.program_id(2)
    channels, first = tl.load(channels_S + s), tl.program_id(0) * COLUMNS
    if first >= channels:
        return
    tap_T, c = tl.arange(0, TAPS), first + tl.arange(0, COLUMNS)
    stride = padded(channels)
    inputs = slot(x, source_S, s, x_slot)
    one_C, other_C = of_sums(grad_sums, s, max_channels, c, channels)
    if input_scale_LC is not None:
        input_slot = tl.load(source_S + s)
        scale_C = per_channel(input_scale_LC, input_slot, max_channels, c, channels)[None, None, :]
        shift_C = per_channel(input_shift_LC, input_slot, max_channels, c, channels)[None, None, :]

    acc_TMC = tl.zeros((TAPS, ROWS, COLUMNS), tl.float32)
    begin = part * steps * ROWS
    for step in range(0, tl.minimum(steps, tl.cdiv(tl.maximum(pixels - begin, 0), ROWS))):
        m = begin + step * ROWS + tl.arange(0, ROWS)
        at_MC, read_MC = m.to(tl.int64)[:, None] * stride + c[None, :], (m < pixels)[:, None] & (c < stride)[None, :]
        d_MC = arrived(grad_y, grad_sums, y, s, y_slot, at_MC, read_MC, one_C, other_C)
        y_TM = (m // out_width % out_height * STRIDE - KERNEL // 2)[None, :] + (tap_T // KERNEL)[:, None]
        x_TM = (m % out_width * STRIDE - KERNEL // 2)[None, :] + (tap_T % KERNEL)[:, None]
        pixel_TM = ((m // (out_width * out_height) * height)[None, :] + y_TM) * width + x_TM
        inside_TM = (y_TM >= 0) & (y_TM < height) & (x_TM >= 0) & (x_TM < width)
        inside_TM &= (tap_T < KERNEL * KERNEL)[:, None] & (m < pixels)[None, :]
        # Pad channels of x end in sums that are not stored.
        a_TMC = tl.load(
            inputs + pixel_TM.to(tl.int64)[:, :, None] * stride + c[None, None, :],
            mask=inside_TM[:, :, None] & (c < stride)[None, None, :],
            other=0,
        ).to(tl.float32)
        if input_scale_LC is not None:
            a_TMC = activate(a_TMC * scale_C + shift_C, INPUT_ACTIVATION)
            a_TMC = tl.where(inside_TM[:, :, None], a_TMC, 0)
        acc_TMC += a_TMC * d_MC[None, :, :]

    own = parts + (s.to(tl.int64) * tl.num_programs(2) + part) * weight_slot
    known_TC = (tap_T < KERNEL * KERNEL)[:, None] & (c < channels)[None, :]
    tl.store(own + tap_T[:, None] * stride + c[None, :], tl.sum(acc_TMC, 1), mask=known_TC)


def ragged_depthwise_backward_triton(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels. Arguments and results: `ragged_depthwise_backward_reference`."""
    none = [x.new_empty(0) for _ in range(3)]
    images, *size_in = image
    _, *size_out = output_image(image, kernel, stride)
    prologue = (input_scale, input_shift)
    with torch.cuda.device_of(x):
        pixels = images * size_out[0] * size_out[1]
        size = depthwise_taps(kernel)
        blocks, steps = triton.cdiv(max_channels, size.columns), triton.cdiv(pixels, size.rows)
        number = parts(blocks, steps)
        summed = x.new_empty(len(channels), number, weight.shape[1], dtype=torch.float32)
        _depthwise_weight_gradient_kernel[blocks, len(channels), number](
            grad_y, grad_sums, y, x, summed, channels, source, *prologue, pixels, *size_in, *size_out, y.shape[1],
            x.shape[1], weight.shape[1], max_channels, triton.cdiv(steps, number), kernel, stride, input_activation,
            triton.next_power_of_2(kernel * kernel), size.rows, size.columns, **size.options,
        )  # fmt: skip
        grad_weight = add_parts(summed, weight, channels, channels, weight_source, kernel * kernel, depthwise=True)
        if not needs_x:
            return none[0], grad_weight, none[1], none[2]

        size, pixels = tile("ragged_depthwise", x.dtype), images * size_in[0] * size_in[1]
        tiles = triton.cdiv(pixels, size.rows)
        grad_x, partials = torch.empty_like(x), None
        if input_scale is not None:
            partials = x.new_empty(len(x), tiles, 2, max_channels, dtype=torch.float32)
        _depthwise_input_gradient_kernel[tiles * triton.cdiv(max_channels, size.columns), len(x)](
            grad_y, grad_sums, y, weight, x, grad_x, partials, channels, source, weight_source, *prologue,
            len(channels), pixels, *size_in, *size_out, y.shape[1], weight.shape[1], x.shape[1], max_channels, kernel,
            stride, input_activation, size.rows, size.columns, **size.options,
        )  # fmt: skip
        if partials is None or input_scale is None or input_shift is None:
            return grad_x, grad_weight, none[1], none[2]
        return grad_x, grad_weight, *totals(partials, channels, source, input_scale, input_shift)
