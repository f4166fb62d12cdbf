"""`generate_weights` in Triton: a tile of basis rows is read once and multiplied by the codes of all subnetworks.

A tile's rows are in the order of the packed weights, so what it generates for a subnetwork is one contiguous run.
Nothing is read back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, R rows of a tile (one tap of 16 channels out × some channels in), H hidden size.
"""

from collections.abc import Sequence
from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import multiply_add, padded
from kernels.gpu.generators import Step, decayed, gradient
from kernels.gpu.tiles import product_precision, tile
from kernels.layout import PANEL, weight_slot


@triton.jit
def _most(channels_S, count, COLUMNS: tl.constexpr):
    """The most channels that any subnetwork has."""
    most_channels = 0
    for first in range(0, count, COLUMNS):
        s = first + tl.arange(0, COLUMNS)
        most_channels = tl.maximum(most_channels, tl.max(tl.load(channels_S + s, mask=s < count, other=0)))
    return most_channels


@triton.jit
def _add_step(
    w_RS, step, coefficient, codes_HS, h, hidden, o_R, i_R, tap, taps, DEPTHWISE: tl.constexpr, PANEL: tl.constexpr
):  # fmt: skip
    """Add what the gradient of an earlier step has changed: Σ_f g[f,r] · (1 + codes[f] · codes[s]), 1 for the bias."""
    codes, grad, cin_S, cout_S, count, slot = step
    for f in range(0, count):
        g_R = gradient(grad, slot, f, tl.load(cin_S + f), tl.load(cout_S + f), o_R, i_R, tap, taps, DEPTHWISE, PANEL)
        code_H = tl.load(codes + f * hidden + h, mask=h < hidden, other=0)
        alike_S = 1 + tl.sum(code_H[:, None] * codes_HS, 0)
        w_RS += (coefficient * g_R)[:, None] * alike_S[None, :]
    return w_RS


@triton.jit
def _generate_kernel(
    basis, bias, basis_momentum, bias_momentum, steps, coefficients, codes, weight, cin_S, cout_S, count, max_cout,
    max_cin, taps, hidden, w_slot,
    DEPTHWISE: tl.constexpr, PRECISION: tl.constexpr, PANEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    tap, block, panel = tl.program_id(0) % taps, tl.program_id(0) // taps, tl.program_id(1)
    r = block * ROWS + tl.arange(0, ROWS)
    if DEPTHWISE:
        i_R, o_R = tl.zeros_like(r), r
    else:
        i_R, o_R = r // PANEL, panel * PANEL + r % PANEL
    h = tl.arange(0, DEPTH)
    row_R = (o_R.to(tl.int64) * max_cin + i_R) * taps + tap
    kept_R = (o_R < _most(cout_S, count, COLUMNS)) & (DEPTHWISE | (i_R < _most(cin_S, count, COLUMNS)))
    at_RH = row_R[:, None] * hidden + h[None, :]
    rows_RH = decayed(basis, basis_momentum, coefficients, at_RH, kept_R[:, None] & (h < hidden)[None, :])
    bias_R = decayed(bias, bias_momentum, coefficients, row_R, kept_R).to(tl.float32)
    for first in range(0, count, COLUMNS):
        s = first + tl.arange(0, COLUMNS)
        real_S = s < count
        cin, cout = tl.load(cin_S + s, mask=real_S, other=0), tl.load(cout_S + s, mask=real_S, other=0)
        codes_HS = tl.load(
            codes + s[None, :] * hidden + h[:, None], mask=real_S[None, :] & (h < hidden)[:, None], other=0
        )
        bias_RS = tl.broadcast_to(bias_R[:, None], (ROWS, COLUMNS))
        w_RS = multiply_add(rows_RH, codes_HS, bias_RS, PRECISION)
        for j in tl.static_range(len(steps)):
            w_RS = _add_step(
                w_RS, steps[j], coefficients[2 + j], codes_HS, h, hidden, o_R, i_R, tap, taps, DEPTHWISE, PANEL
            )
        kept_RS = o_R[:, None] < cout[None, :]
        if DEPTHWISE:
            stride = padded(cout)
            start, inside_RS = tap * stride, r[:, None] < stride[None, :]
        else:
            start, inside_RS = (panel * taps + tap) * cin * PANEL, i_R[:, None] < cin[None, :]
            inside_RS &= (panel * PANEL < cout)[None, :]
        start_S = tl.multiple_of(s.to(tl.int64) * w_slot + start, 8)
        tl.store(
            weight + start_S[None, :] + r[:, None],
            tl.where(kept_RS, w_RS, 0).to(weight.dtype.element_ty),
            mask=inside_RS,
        )


def generate_weights_triton(
    basis: Tensor, bias: Tensor, codes: Tensor, cin: Tensor, cout: Tensor, depthwise: bool
) -> Tensor:
    """Launch the kernel. Arguments and results: `kernels.generate_weights`."""
    return launch(basis, bias, (None, None), (), None, codes, cin, cout, depthwise)


def launch(
    basis: Tensor,
    bias: Tensor,
    momentum: Sequence[Tensor | None],
    steps: tuple[Step, ...],
    coefficients: tuple[float, ...] | None,
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
    depthwise: bool,
) -> Tensor:
    """The packed weights `[S, slot]`, with coefficients those of some steps later (`kernels.gpu.generators`)."""
    (max_cout, max_cin, taps, hidden), count = basis.shape, codes.shape[0]
    size = tile("generate_weights", basis.dtype)
    slot = weight_slot(max_cin, max_cout, isqrt(taps), basis.dtype, depthwise, basis.device)
    weight = basis.new_empty(count, slot)
    run, panels = (max_cout, 1) if depthwise else (max_cin * PANEL, triton.cdiv(max_cout, PANEL))
    with torch.cuda.device_of(basis):
        _generate_kernel[taps * triton.cdiv(run, size.rows), panels](
            basis, bias, *momentum, steps, coefficients, codes, weight, cin, cout, count, max_cout, max_cin, taps,
            hidden, slot, depthwise, product_precision(basis.dtype), PANEL, size.rows, size.columns,
            max(triton.next_power_of_2(hidden), 16), **size.options,
        )  # fmt: skip
    return weight
