"""`generated_conv` in Triton: `ragged_conv`, but that each tile of weights is made where it is multiplied.

A tile is the product of rows of the basis and one code, summed in registers; it is rounded as a stored weight would be
and goes to the convolution's product. The grid is that of `ragged_conv`; nothing is read back to the host. Proven by
Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, L slots of x, M pixels out, I channels in, O channels out, H hidden size.
"""

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import finish, multiply_add, padded, slot, window
from kernels.gpu.sums import add_tile, total
from kernels.gpu.tiles import product_precision, tile
from kernels.layout import Image, activation_slot, output_image
from kernels.ragged_conv.triton import input_tile

# Bytes of a row of the basis that are multiplied at a time: as many as memory gives together.
AT_ONCE = 32


@triton.jit
def _generated_tile(
    basis, bias, code, i, o, tap, cin, cout, basis_cin, taps, hidden, AT_ONCE: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """The weights of the channels i and o for one tap, 0 outside the crop."""
    row_IO = (o.to(tl.int64)[None, :] * basis_cin + i[:, None]) * taps + tap
    kept_IO = (i < cin)[:, None] & (o < cout)[None, :]
    w_IO = tl.load(bias + row_IO, mask=kept_IO, other=0).to(tl.float32)
    for first in tl.range(0, hidden, AT_ONCE, num_stages=STAGES):
        h = first + tl.arange(0, AT_ONCE)
        code_H = tl.load(code + h, mask=h < hidden, other=0).to(tl.float32)
        rows_IOH = tl.load(
            basis + row_IO[:, :, None] * hidden + h[None, None, :],
            mask=kept_IO[:, :, None] & (h < hidden)[None, None, :], other=0,
        )  # fmt: skip
        w_IO += tl.sum(rows_IOH.to(tl.float32) * code_H[None, None, :], 2)
    return w_IO.to(basis.dtype.element_ty)


@triton.jit
def _generated_conv_kernel(
    x, basis, bias, codes_SH, y, partials, cin_S, cout_S, source_S, input_scale_LI, input_shift_LI, pixels, height,
    width, out_height, out_width, x_slot, y_slot, max_cin, max_cout, basis_cin, hidden,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, INPUT_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, AT_ONCE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    cin, cout = tl.load(cin_S + s), tl.load(cout_S + s)
    tiles_across = tl.cdiv(max_cout, COLUMNS)
    number, first = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across * COLUMNS
    if first >= cout:
        return
    m, o = number * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    top_M, left_M, pixel_M = window(m, height, width, out_height, out_width, KERNEL, STRIDE)
    stride = padded(cin)
    pixel_M = slot(x, source_S, s, x_slot) + pixel_M.to(tl.int64) * stride

    acc_MO = tl.zeros((ROWS, COLUMNS), tl.float32)
    blocks = tl.cdiv(cin, DEPTH)
    for step in range(0, KERNEL * KERNEL * blocks):
        tap, i = step // blocks, step % blocks * DEPTH + tl.arange(0, DEPTH)
        a_MI = input_tile(
            tap, i, pixel_M, m < pixels, top_M, left_M, height, width, stride, cin, input_scale_LI, input_shift_LI,
            tl.load(source_S + s), max_cin, KERNEL, False, INPUT_ACTIVATION,
        )  # fmt: skip
        w_IO = _generated_tile(
            basis, bias, codes_SH + s * hidden, i, o, tap, cin, cout, basis_cin, KERNEL * KERNEL, hidden,
            AT_ONCE, STAGES,
        )  # fmt: skip
        acc_MO = multiply_add(a_MI, w_IO, acc_MO, PRECISION)

    if partials is not None:
        add_tile(partials, s, number, tl.cdiv(pixels, ROWS), max_cout, o, cout, acc_MO)
    finish(y, acc_MO, s, m, pixels, o, cout, max_cout, y_slot, None, None, None, None, "none")


def generated_conv_triton(
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
) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Arguments and results: `kernels.generated_conv`."""
    count, (_, height, width), (_, basis_cin, taps, hidden) = cin.shape[0], image, basis.shape
    out_image = output_image(image, isqrt(taps), stride)
    pixels = out_image[0] * out_image[1] * out_image[2]
    size = tile("generated_conv", x.dtype)
    tiles = triton.cdiv(pixels, size.rows)
    y = x.new_empty(count, activation_slot(out_image, max_cout))
    partials = x.new_empty(count, tiles, 2, max_cout, dtype=torch.float32) if statistics else None
    with torch.cuda.device_of(x):
        _generated_conv_kernel[tiles * triton.cdiv(max_cout, size.columns), count](
            x, basis, bias, codes, y, partials, cin, cout, source, input_scale, input_shift, pixels, height, width,
            *out_image[1:], x.shape[1], y.shape[1], max_cin, max_cout, basis_cin, hidden, isqrt(taps), stride,
            input_activation, product_precision(x.dtype), size.rows, size.columns, size.depth,
            AT_ONCE // x.element_size(), size.stages,
            **size.options,
        )  # fmt: skip
        return y, total(partials, cout, x)
