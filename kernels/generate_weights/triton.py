"""`generate_weights` in Triton: a tile of basis rows is read once and multiplied by the codes of all subnetworks.

A tile's rows are in the order of the packed weights, so what it generates for a subnetwork is one contiguous run.
Nothing is read back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, R rows of a tile (one tap of 16 channels out × some channels in), H hidden size.
"""

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import multiply_add, padded
from kernels.gpu.generators import drift_of, drifted
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
def _generate_kernel(
    basis, bias, basis_momentum, bias_momentum, written, drift, codes, weight, cin_S, cout_S, count, max_cout, max_cin,
    taps, hidden, w_slot,
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
    kept_RH = kept_R[:, None] & (h < hidden)[None, :]
    rows_RH, bias_R = tl.load(basis + at_RH, mask=kept_RH, other=0), tl.load(bias + row_R, mask=kept_R, other=0)
    if drift is not None:
        # Momentum of which nothing comes is not read.
        from_w_R, from_m_R = drift_of(drift, written, o_R, i_R, max_cin, kept_R, 0)
        moves_R = kept_R & (from_m_R != 0)
        m_RH = tl.load(basis_momentum + at_RH, mask=kept_RH & moves_R[:, None], other=0)
        rows_RH = drifted(rows_RH, m_RH, from_w_R[:, None], from_m_R[:, None])
        bias_R = drifted(bias_R, tl.load(bias_momentum + row_R, mask=moves_R, other=0), from_w_R, from_m_R)
    for first in range(0, count, COLUMNS):
        s = first + tl.arange(0, COLUMNS)
        real_S = s < count
        cin, cout = tl.load(cin_S + s, mask=real_S, other=0), tl.load(cout_S + s, mask=real_S, other=0)
        codes_HS = tl.load(
            codes + s[None, :] * hidden + h[:, None], mask=real_S[None, :] & (h < hidden)[:, None], other=0
        )
        bias_RS = tl.broadcast_to(bias_R.to(tl.float32)[:, None], (ROWS, COLUMNS))
        w_RS = multiply_add(rows_RH, codes_HS, bias_RS, PRECISION)
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
    return launch(basis, bias, (None, None, None, None), codes, cin, cout, depthwise)


def launch(
    basis: Tensor,
    bias: Tensor,
    late: tuple[Tensor | None, ...],
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
    depthwise: bool,
) -> Tensor:
    """The packed weights `[S, slot]`: of rows that waited, `late` are both momenta, `written` and `drift`."""
    (max_cout, max_cin, taps, hidden), count = basis.shape, codes.shape[0]
    size = tile("generate_weights", basis.dtype)
    slot = weight_slot(max_cin, max_cout, isqrt(taps), basis.dtype, depthwise, basis.device)
    weight = basis.new_empty(count, slot)
    run, panels = (max_cout, 1) if depthwise else (max_cin * PANEL, triton.cdiv(max_cout, PANEL))
    with torch.cuda.device_of(basis):
        _generate_kernel[taps * triton.cdiv(run, size.rows), panels](
            basis, bias, *late, codes, weight, cin, cout, count, max_cout, max_cin, taps, hidden, slot,
            depthwise, product_precision(basis.dtype), PANEL, size.rows, size.columns,
            max(triton.next_power_of_2(hidden), 16), **size.options,
        )  # fmt: skip
    return weight
