"""`ragged_conv_backward` in Triton: two matrix products, that of the input and that of the weights.

Of x: pixels × (taps · channels out) × channels in. With a stride, the pixels of one remainder of rows and columns are
a grid of their own, as the same taps meet outputs there. Of the weights, for each tap: channels in × pixels × channels
out, the pixels in parts whose products are added in order. Nothing is read back to the host. Proven by Triton's
interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, L slots of x, M pixels, I channels in, O channels out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import (
    activate,
    inside_image,
    multiply_add,
    own_slot,
    padded,
    per_channel,
    reader_width,
    slot,
    window,
)
from kernels.gpu.gradients import add_parts, arriving, hand_on
from kernels.gpu.sums import totals
from kernels.gpu.tiles import parts, product_precision, tile
from kernels.layout import PANEL, Image, output_image


@triton.jit
def _conv_input_gradient_kernel(
    d, weight, x, grad_x, partials, cin_S, cout_S, source_S, weight_source_S, input_scale_LI, input_shift_LI, count,
    images, height, width, out_height, out_width, d_slot, weight_slot, x_slot, max_cin,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, INPUT_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    PANEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row, phase = tl.program_id(1), tl.program_id(2)
    tiles_across = tl.cdiv(max_cin, COLUMNS)
    number, first = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across * COLUMNS
    cin = reader_width(source_S, cin_S, row, count)
    # A slot that nobody reads is zero from end to end.
    stored = tl.where(cin > 0, cin, max_cin)
    if first >= stored:
        return
    m, i = number * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)

    # Pixel (u, v) of the phase is pixel (top + u · STRIDE, left + v · STRIDE) of x. Of the taps there, the first is
    # (first_y, first_x) and meets the output (u + out_y, v + out_x); STRIDE taps on is the output one before.
    top, left = phase // STRIDE, phase % STRIDE
    rows, columns = tl.cdiv(height - top, STRIDE), tl.cdiv(width - left, STRIDE)
    pixels = images * rows * columns
    u_M, v_M = m // tl.maximum(columns, 1) % tl.maximum(rows, 1), m % tl.maximum(columns, 1)
    n_M = m // tl.maximum(rows * columns, 1)
    pixel_M = (n_M * height + top + u_M * STRIDE) * width + left + v_M * STRIDE
    first_y, first_x = (top + KERNEL // 2) % STRIDE, (left + KERNEL // 2) % STRIDE
    # Beyond the pixels, above all outputs.
    out_y_M = tl.where(m < pixels, u_M + (top + KERNEL // 2 - first_y) // STRIDE, -1)
    out_x_M = v_M + (left + KERNEL // 2 - first_x) // STRIDE
    out_M = (n_M * out_height + out_y_M) * out_width + out_x_M
    taps_across = tl.cdiv(KERNEL - first_x, STRIDE)
    taps = tl.where(number * ROWS < pixels, tl.cdiv(KERNEL - first_y, STRIDE) * taps_across, 0)

    acc_MI = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in range(0, count):
        if tl.load(source_S + s) == row:
            cout = tl.load(cout_S + s)
            stride = padded(cout)
            arrived = own_slot(d, s, d_slot)
            panels = slot(weight, weight_source_S, s, weight_slot)
            deep = tl.cdiv(cout, DEPTH)
            for step in range(0, taps * deep):
                j, o = step // deep, step % deep * DEPTH + tl.arange(0, DEPTH)
                up, across = j // taps_across, j % taps_across
                y_M, x_M = out_y_M - up, out_x_M - across
                inside_M = (y_M >= 0) & (y_M < out_height) & (x_M >= 0) & (x_M < out_width)
                read_M = (out_M - up * out_width - across).to(tl.int64) * stride
                tap = (first_y + up * STRIDE) * KERNEL + first_x + across * STRIDE
                # Pad channels of both are zero.
                mask_MO = inside_M[:, None] & (o < stride)[None, :]
                a_MO = tl.load(arrived + read_M[:, None] + o[None, :], mask=mask_MO, other=0)
                panel_O = ((o // PANEL) * (KERNEL * KERNEL) + tap) * cin * PANEL + o % PANEL
                mask_OI = (o // PANEL * PANEL < cout)[:, None] & (i < cin)[None, :]
                b_OI = tl.load(panels + panel_O[:, None] + (i * PANEL)[None, :], mask=mask_OI, other=0)
                acc_MI = multiply_add(a_MO, b_OI, acc_MI, PRECISION)

    stride = padded(stored)
    at_MI = pixel_M.to(tl.int64)[:, None] * stride + i[None, :]
    stored_MI = (m < pixels)[:, None] & (i < stride)[None, :]
    tiles = tl.num_programs(0) // tiles_across
    hand_on(
        acc_MI, x, grad_x, partials, phase * tiles + number, tiles * STRIDE * STRIDE, row, at_MI, stored_MI, i, cin,
        max_cin, x_slot, input_scale_LI, input_shift_LI, INPUT_ACTIVATION,
    )  # fmt: skip


@triton.jit
def _conv_weight_gradient_kernel(
    d, x, parts, cin_S, cout_S, source_S, input_scale_LI, input_shift_LI, pixels, height, width, out_height, out_width,
    d_slot, x_slot, weight_slot, max_cin, max_cout, steps,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, INPUT_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    PANEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    cin, cout = tl.load(cin_S + s), tl.load(cout_S + s)
    # Tiles and taps of one part are neighbours: they read the same pixels.
    tap, tile = tl.program_id(0) % (KERNEL * KERNEL), tl.program_id(0) // (KERNEL * KERNEL)
    tiles_across, part = tl.cdiv(max_cout, COLUMNS), tl.program_id(2)
    first_i, first_o = tile // tiles_across * ROWS, tile % tiles_across * COLUMNS
    if (first_i >= cin) | (first_o >= cout):
        return
    i, o = first_i + tl.arange(0, ROWS), first_o + tl.arange(0, COLUMNS)
    stride_x, stride_d = padded(cin), padded(cout)
    inputs, arrived = slot(x, source_S, s, x_slot), own_slot(d, s, d_slot)
    if input_scale_LI is not None:
        input_slot = tl.load(source_S + s)
        scale_I = per_channel(input_scale_LI, input_slot, max_cin, i, cin)
        shift_I = per_channel(input_shift_LI, input_slot, max_cin, i, cin)

    acc_IO = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = part * steps * DEPTH
    for step in range(0, tl.minimum(steps, tl.cdiv(tl.maximum(pixels - begin, 0), DEPTH))):
        m = begin + step * DEPTH + tl.arange(0, DEPTH)
        inside_M = m < pixels
        d_MO = tl.load(
            arrived + m.to(tl.int64)[:, None] * stride_d + o[None, :],
            mask=inside_M[:, None] & (o < stride_d)[None, :],
            other=0,
        )
        if KERNEL == 1 and STRIDE == 1:
            pixel_M = m
        else:
            top_M, left_M, pixel_M = window(m, height, width, out_height, out_width, KERNEL, STRIDE)
            inside_M &= inside_image(top_M, left_M, tap, height, width, KERNEL)
            pixel_M += tap // KERNEL * width + tap % KERNEL
        # Pad channels of x end in rows of the product that are not stored.
        a_MI = tl.load(
            inputs + pixel_M.to(tl.int64)[:, None] * stride_x + i[None, :],
            mask=inside_M[:, None] & (i < stride_x)[None, :],
            other=0,
        )
        if input_scale_LI is not None:
            wide_MI = activate(a_MI.to(tl.float32) * scale_I[None, :] + shift_I[None, :], INPUT_ACTIVATION)
            a_MI = tl.where(inside_M[:, None], wide_MI, 0).to(a_MI.dtype)
        acc_IO = multiply_add(tl.trans(a_MI), d_MO, acc_IO, PRECISION)

    panel_O = ((o // PANEL) * (KERNEL * KERNEL) + tap) * cin * PANEL + o % PANEL
    own = parts + (s.to(tl.int64) * tl.num_programs(2) + part) * weight_slot
    tl.store(own + panel_O[None, :] + (i * PANEL)[:, None], acc_IO, mask=(i < cin)[:, None] & (o < cout)[None, :])


def ragged_conv_backward_triton(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels. Arguments and results: `ragged_conv_backward_reference`."""
    none = [x.new_empty(0) for _ in range(3)]
    out_image = output_image(image, kernel, stride)
    prologue = (input_scale, input_shift)
    with torch.cuda.device_of(x):
        d = arriving(grad_y, grad_sums, y, cout, out_image[0] * out_image[1] * out_image[2], max_cout)
        grad_weight = _weight_gradient(
            d, x, weight, cin, cout, source, weight_source, image, kernel, stride, max_cin, max_cout, *prologue,
            input_activation,
        )  # fmt: skip
        if not needs_x:
            return none[0], grad_weight, none[1], none[2]
        grad_x, partials = _input_gradient(
            d, x, weight, cin, cout, source, weight_source, image, kernel, stride, max_cin, max_cout, *prologue,
            input_activation,
        )  # fmt: skip
        if partials is None or input_scale is None or input_shift is None:
            return grad_x, grad_weight, none[1], none[2]
        return grad_x, grad_weight, *totals(partials, cin, source, input_scale, input_shift)


def _weight_gradient(
    d: Tensor, x: Tensor, weight: Tensor, cin: Tensor, cout: Tensor, source: Tensor, weight_source: Tensor,
    image: Image, kernel: int, stride: int, max_cin: int, max_cout: int, input_scale: Tensor | None,
    input_shift: Tensor | None, input_activation: str,
) -> Tensor:  # fmt: skip
    """The gradient of the weights, of what arrives at their outputs."""
    out_image, taps = output_image(image, kernel, stride), kernel * kernel
    pixels = out_image[0] * out_image[1] * out_image[2]
    size = tile("ragged_conv_weights", x.dtype, max_cin, max_cout, input_scale is not None)
    blocks = triton.cdiv(max_cin, size.rows) * triton.cdiv(max_cout, size.columns) * taps
    steps = triton.cdiv(pixels, size.depth)
    number = parts(blocks, steps)
    summed = x.new_empty(len(cin), number, weight.shape[1], dtype=torch.float32)
    _conv_weight_gradient_kernel[blocks, len(cin), number](
        d, x, summed, cin, cout, source, input_scale, input_shift, pixels, *image[1:], *out_image[1:], d.shape[1],
        x.shape[1], weight.shape[1], max_cin, max_cout, triton.cdiv(steps, number), kernel, stride, input_activation,
        product_precision(x.dtype), PANEL, size.rows, size.columns, size.depth, **size.options,
    )  # fmt: skip
    return add_parts(summed, weight, cin, cout, weight_source, taps, depthwise=False)


def _input_gradient(
    d: Tensor, x: Tensor, weight: Tensor, cin: Tensor, cout: Tensor, source: Tensor, weight_source: Tensor,
    image: Image, kernel: int, stride: int, max_cin: int, max_cout: int, input_scale: Tensor | None,
    input_shift: Tensor | None, input_activation: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradient of x, of what arrives at the outputs, and the tiles of those of input_scale and input_shift."""
    images, height, width = image
    size = tile("ragged_conv_input", x.dtype, max_cout, max_cin)
    tiles = triton.cdiv(images * triton.cdiv(height, stride) * triton.cdiv(width, stride), size.rows)
    grad_x, partials = torch.empty_like(x), None
    if input_scale is not None:
        partials = x.new_empty(len(x), stride * stride * tiles, 2, max_cin, dtype=torch.float32)
    _conv_input_gradient_kernel[tiles * triton.cdiv(max_cin, size.columns), len(x), stride * stride](
        d, weight, x, grad_x, partials, cin, cout, source, weight_source, input_scale, input_shift, len(cin), *image,
        *output_image(image, kernel, stride)[1:], d.shape[1], weight.shape[1], x.shape[1], max_cin, kernel, stride,
        input_activation, product_precision(x.dtype), PANEL, size.rows, size.columns, size.depth, **size.options,
    )  # fmt: skip
    return grad_x, partials
