"""What the gradients of `ragged_conv` and `ragged_depthwise` have in common, before and after their own kernels.

What arrives at a convolution is made where it is read (`arrived`), or once before (`arriving`). What leaves it for its
input goes through the derivative of what it does while it reads (`hand_on`). The gradients of weights are added up from
parts (`add_parts`).

Legend: S subnetworks, L slots of x, W slots of weights, M pixels, C channels, P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import own_slot, padded, per_channel, stopped
from kernels.gpu.sums import add_two
from kernels.gpu.tiles import tile
from kernels.layout import PANEL


@triton.jit
def of_sums(grad_sums, s, limit, c, channels):
    """The gradients of both sums of subnetwork s per channel, in float32."""
    one_C, other_C = tl.zeros(c.shape, tl.float32), tl.zeros(c.shape, tl.float32)
    if grad_sums is not None:
        one_C = per_channel(grad_sums, 2 * s, limit, c, channels)
        other_C = per_channel(grad_sums, 2 * s + 1, limit, c, channels)
    return one_C, other_C


@triton.jit
def arrived(grad_y, grad_sums, y, s, elements, at_MC, read_MC, one_C, other_C):
    """What arrives at a convolution: grad_y + one + 2 · y · other, with those of `of_sums`; 0 where it is not read."""
    value_MC = tl.zeros(read_MC.shape, tl.float32)
    if grad_y is not None:
        value_MC += tl.load(own_slot(grad_y, s, elements) + at_MC, mask=read_MC, other=0).to(tl.float32)
    if grad_sums is not None:
        y_MC = tl.load(own_slot(y, s, elements) + at_MC, mask=read_MC, other=0).to(tl.float32)
        value_MC += tl.where(read_MC, one_C[None, :] + 2 * y_MC * other_C[None, :], 0)
    return value_MC


@triton.jit
def _arriving_kernel(
    grad_y, grad_sums, y, d, channels_S, pixels, elements, max_channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    s = tl.program_id(1)
    channels = tl.load(channels_S + s)
    tiles_across = tl.cdiv(max_channels, COLUMNS)
    number, first = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across * COLUMNS
    if first >= channels:
        return
    m, c = number * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    stride = padded(channels)
    stored_MC = (m < pixels)[:, None] & (c < stride)[None, :]
    at_MC = m.to(tl.int64)[:, None] * stride + c[None, :]
    one_C, other_C = of_sums(grad_sums, s, max_channels, c, channels)
    value_MC = arrived(grad_y, grad_sums, y, s, elements, at_MC, stored_MC, one_C, other_C)
    value_MC = tl.where((c < channels)[None, :], value_MC, 0)
    tl.store(own_slot(d, s, elements) + at_MC, value_MC.to(d.dtype.element_ty), mask=stored_MC)


def arriving(
    grad_y: Tensor | None, grad_sums: Tensor | None, y: Tensor, channels_S: Tensor, pixels: int, max_channels: int
) -> Tensor:
    """What arrives at a convolution, rounded to the dtype of y as its products take it, zero in pad channels."""
    size, d = tile("arriving", y.dtype), torch.empty_like(y)
    _arriving_kernel[triton.cdiv(pixels, size.rows) * triton.cdiv(max_channels, size.columns), len(y)](
        grad_y, grad_sums, y, d, channels_S, pixels, y.shape[1], max_channels, size.rows, size.columns, **size.options
    )
    return d


@triton.jit
def hand_on(
    grad_MC, x, grad_x, partials, number, tiles, row, at_MC, stored_MC, c, channels, limit, elements, input_scale_LC,
    input_shift_LC, INPUT_ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store the gradient of slot `row` of x, given that of act_in(x · input_scale + input_shift), and the sums of its
    tile for the gradients of these two."""
    if input_scale_LC is not None:
        scale_C = per_channel(input_scale_LC, row, limit, c, channels)[None, :]
        shift_C = per_channel(input_shift_LC, row, limit, c, channels)[None, :]
        x_MC = tl.load(own_slot(x, row, elements) + at_MC, mask=stored_MC, other=0).to(tl.float32)
        if INPUT_ACTIVATION != "none":
            grad_MC = tl.where(stopped(x_MC * scale_C + shift_C, INPUT_ACTIVATION), 0, grad_MC)
        add_two(partials, row, number, tiles, limit, c, channels, grad_MC * x_MC, grad_MC)
        grad_MC *= scale_C
    tl.store(own_slot(grad_x, row, elements) + at_MC, grad_MC.to(grad_x.dtype.element_ty), mask=stored_MC)


@triton.jit
def _parts_kernel(
    parts, grad_weight, cin_S, cout_S, weight_source_S, count, number, elements,
    DEPTHWISE: tl.constexpr, TAPS: tl.constexpr, PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(0, count):
        if tl.load(weight_source_S + s) == slot:
            cout = tl.load(cout_S + s)
            if DEPTHWISE:
                stride = padded(cout)
                known = (at < TAPS * stride) & (at % stride < cout)
            else:
                panel = TAPS * tl.load(cin_S + s) * PANEL
                known = at // panel * PANEL + at % PANEL < cout
            for part in range(0, number):
                row = parts + (tl.cast(s, tl.int64) * number + part) * elements
                total += tl.load(row + at, mask=known & (at < elements), other=0)
    result = grad_weight + slot.to(tl.int64) * elements + at
    tl.store(result, total.to(grad_weight.dtype.element_ty), mask=at < elements)


def add_parts(
    parts: Tensor, weight: Tensor, cin_S: Tensor, cout_S: Tensor, weight_source_S: Tensor, taps: int, depthwise: bool
) -> Tensor:
    """The gradient of the weights, packed like them and zero where there are none: the sums of the float32 parts
    `[S, P, slot]`, one after another, of the subnetworks that read a slot, one after another."""
    grad, size = torch.empty_like(weight), tile("parts", torch.float32)
    count, number, elements = parts.shape
    _parts_kernel[triton.cdiv(elements, size.rows), len(weight)](
        parts, grad, cin_S, cout_S, weight_source_S, count, number, elements, depthwise, taps, PANEL, size.rows,
        **size.options,
    )  # fmt: skip
    return grad
