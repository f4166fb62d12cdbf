"""`ragged_conv` in Triton: an implicit matrix product, pixels × (taps · channels in) × channels out.

The grid is sized for the widest subnetwork; a tile beyond a subnetwork's channels ends at once. Nothing is read
back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, L slots of x, M pixels out, I channels in, O channels out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import activate, finish, inside_image, multiply_add, padded, per_channel, slot, window
from kernels.gpu.sums import add_tile, total
from kernels.gpu.tiles import product_precision, tile
from kernels.layout import PANEL, Image, activation_slot, output_image


@triton.jit
def input_tile(
    tap, i, pixel_M, inside_M, top_M, left_M, height, width, stride, cin, input_scale_LI, input_shift_LI, input_slot,
    max_cin,
    KERNEL: tl.constexpr, WHOLE: tl.constexpr, INPUT_ACTIVATION: tl.constexpr,
):  # fmt: skip
    """What one tap sees of the channels `i`, 0 outside the image and from `cin` on, if these are not all below it."""
    if KERNEL > 1:
        inside_M &= inside_image(top_M, left_M, tap, height, width, KERNEL)
    address = (pixel_M + (tap // KERNEL * width + tap % KERNEL) * stride)[:, None] + i[None, :]
    if WHOLE:
        a_MI = tl.load(address, mask=inside_M[:, None], other=0)
    else:
        # Loaded to the end of the pixel, whose pad channels are dropped here: that keeps loads aligned.
        a_MI = tl.load(address, mask=inside_M[:, None] & (i < stride)[None, :], other=0)
        if input_scale_LI is not None:
            scale_I = per_channel(input_scale_LI, input_slot, max_cin, i, cin)
            shift_I = per_channel(input_shift_LI, input_slot, max_cin, i, cin)
            wide = activate(a_MI.to(tl.float32) * scale_I[None, :] + shift_I[None, :], INPUT_ACTIVATION)
            a_MI = tl.where(inside_M[:, None], wide, 0).to(a_MI.dtype)
        a_MI = tl.where((i < cin)[None, :], a_MI, 0)
    return a_MI


@triton.jit
def _add_tap(
    acc_MO, tap, i, pixel_M, inside_M, top_M, left_M, height, width, stride, cin, cout, weight, o,
    input_scale_LI, input_shift_LI, input_slot, max_cin,
    KERNEL: tl.constexpr, WHOLE: tl.constexpr, INPUT_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    PANEL: tl.constexpr,
):  # fmt: skip
    """Add the product of one tap and the channels `i`; with WHOLE, all of them are known to be below `cin`."""
    panel = ((o // PANEL) * (KERNEL * KERNEL) + tap) * cin * PANEL
    rows = weight + (panel + o % PANEL)[None, :] + (i * PANEL)[:, None]
    kept = (o // PANEL * PANEL < cout)[None, :]
    a_MI = input_tile(
        tap, i, pixel_M, inside_M, top_M, left_M, height, width, stride, cin, input_scale_LI, input_shift_LI,
        input_slot, max_cin, KERNEL, WHOLE, INPUT_ACTIVATION,
    )  # fmt: skip
    b_IO = tl.load(rows, mask=kept if WHOLE else kept & (i < cin)[:, None], other=0)
    return multiply_add(a_MI, b_IO, acc_MO, PRECISION)


@triton.jit
def _conv_kernel(
    x, weight, y, partials, cin_S, cout_S, source_S, weight_source_S, scale_SO, shift_SO, shortcut,
    shortcut_source_S, input_scale_LI, input_shift_LI, pixels, height, width, out_height, out_width, x_slot,
    weight_slot, y_slot, max_cin, max_cout,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, INPUT_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, PANEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    cin, cout = tl.load(cin_S + s), tl.load(cout_S + s)
    tiles_across = tl.cdiv(max_cout, COLUMNS)
    number, first = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across * COLUMNS
    if first >= cout:
        return
    m, o = number * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    inside_M = m < pixels
    if KERNEL == 1 and STRIDE == 1:
        top_M, left_M, pixel = m, m, m
    else:
        top_M, left_M, pixel = window(m, height, width, out_height, out_width, KERNEL, STRIDE)
    stride = padded(cin)
    pixel_M = slot(x, source_S, s, x_slot) + pixel.to(tl.int64) * stride
    panels = slot(weight, weight_source_S, s, weight_slot)
    input_slot = tl.load(source_S + s)

    acc_MO = tl.zeros((ROWS, COLUMNS), tl.float32)
    whole = 0
    if input_scale_LI is None:
        whole = cin // DEPTH
        for step in range(0, KERNEL * KERNEL * whole):
            acc_MO = _add_tap(
                acc_MO, step // whole, step % whole * DEPTH + tl.arange(0, DEPTH), pixel_M, inside_M, top_M, left_M,
                height, width, stride, cin, cout, panels, o, None, None, input_slot, max_cin,
                KERNEL, True, INPUT_ACTIVATION, PRECISION, PANEL,
            )  # fmt: skip
    rest = tl.cdiv(cin, DEPTH) - whole
    for step in range(0, KERNEL * KERNEL * rest):
        acc_MO = _add_tap(
            acc_MO, step // rest, (whole + step % rest) * DEPTH + tl.arange(0, DEPTH), pixel_M, inside_M, top_M,
            left_M, height, width, stride, cin, cout, panels, o, input_scale_LI, input_shift_LI, input_slot, max_cin,
            KERNEL, False, INPUT_ACTIVATION, PRECISION, PANEL,
        )  # fmt: skip

    if partials is not None:
        add_tile(partials, s, number, tl.cdiv(pixels, ROWS), max_cout, o, cout, acc_MO)
    finish(
        y, acc_MO, s, m, pixels, o, cout, max_cout, y_slot, scale_SO, shift_SO, shortcut, shortcut_source_S, ACTIVATION
    )


def ragged_conv_triton(
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
) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Arguments and results: `kernels.ragged_conv`."""
    count, (_, height, width) = cin.shape[0], image
    out_image = output_image(image, kernel, stride)
    pixels = out_image[0] * out_image[1] * out_image[2]
    size = tile("ragged_conv", x.dtype, max_cin, max_cout, input_scale is not None)
    tiles = triton.cdiv(pixels, size.rows)
    y = x.new_empty(count, activation_slot(out_image, max_cout))
    partials = x.new_empty(count, tiles, 2, max_cout, dtype=torch.float32) if statistics else None
    with torch.cuda.device_of(x):
        _conv_kernel[tiles * triton.cdiv(max_cout, size.columns), count](
            x, weight, y, partials, cin, cout, source, weight_source, scale, shift, shortcut, shortcut_source,
            input_scale, input_shift, pixels, height, width, *out_image[1:], x.shape[1], weight.shape[1], y.shape[1],
            max_cin, max_cout, kernel, stride, activation, input_activation, product_precision(x.dtype), PANEL,
            size.rows, size.columns, size.depth, **size.options,
        )  # fmt: skip
        return y, total(partials, cout, x)
