"""`update_generators_` in Triton: one pass over the rows of basis and momentum, each read and written once.

A program takes a run of neighbouring tiles; the gradients of the codes are its sums, which a second launch adds in
order. Nothing is read back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on a
GPU.

Legend: S subnetworks, R rows of a tile, H hidden size.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.generators import add_code_gradients, place, step_gradients, steps_of, store_sums
from kernels.gpu.sums import add_programs
from kernels.gpu.tiles import generator_runs, generator_tile
from kernels.layout import PANEL


@triton.jit
def _update_kernel(
    basis, bias, basis_momentum, bias_momentum, parts, steps, before, weights, momentum, rows, max_cin, taps, hidden,
    tiles_each,
    DEPTHWISE: tl.constexpr, PANEL: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, DEPTH)
    sums_SH = tl.zeros((COUNT, DEPTH), tl.float64)
    for tile in range(0, tiles_each):
        row_R = (tl.program_id(0) * tiles_each + tile) * ROWS + tl.arange(0, ROWS)
        exists_R = row_R < rows
        o_R, i_R, tap_R = place(row_R, max_cin, taps)
        at_RH = row_R.to(tl.int64)[:, None] * hidden + h[None, :]
        exists_RH = exists_R[:, None] & (h < hidden)[None, :]
        w_RH = tl.load(basis + at_RH, mask=exists_RH, other=0)
        m_RH = tl.load(basis_momentum + at_RH, mask=exists_RH, other=0).to(w_RH.dtype)
        w_R = tl.load(bias + row_R, mask=exists_R, other=0)
        m_R = tl.load(bias_momentum + row_R, mask=exists_R, other=0)

        changed_RH, changed_R = weights[0] * w_RH + weights[1] * m_RH, weights[0] * w_R + weights[1] * m_R
        new_RH, new_R = momentum[0] * w_RH + momentum[1] * m_RH, momentum[0] * w_R + momentum[1] * m_R
        earlier_RH = w_RH
        if before is not None:
            earlier_RH += before[0] * w_RH + before[1] * m_RH
        for j in tl.static_range(len(steps)):
            d_RH, d_R = step_gradients(steps[j], h, hidden, o_R, i_R, tap_R, taps, DEPTHWISE, PANEL)
            changed_RH += weights[2 + j] * d_RH
            changed_R += weights[2 + j] * d_R
            new_RH += momentum[2 + j] * d_RH
            new_R += momentum[2 + j] * d_R
            if before is not None and j < len(steps) - 1:
                earlier_RH += before[2 + j] * d_RH
        if before is not None:
            last = steps[len(steps) - 1]
            sums_SH = add_code_gradients(sums_SH, earlier_RH, last, o_R, i_R, tap_R, taps, DEPTHWISE, PANEL, COUNT)
        tl.store(basis + at_RH, w_RH + changed_RH, mask=exists_RH)
        tl.store(basis_momentum + at_RH, new_RH.to(basis_momentum.dtype.element_ty), mask=exists_RH)
        tl.store(bias + row_R, w_R + changed_R, mask=exists_R)
        tl.store(bias_momentum + row_R, new_R, mask=exists_R)
    if before is not None:
        store_sums(parts, tl.program_id(0), sums_SH, h, hidden, steps[len(steps) - 1][4], COUNT)


def update_generators_triton(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    codes: Sequence[Tensor],
    grads: Sequence[Tensor],
    cin: Sequence[Tensor],
    cout: Sequence[Tensor],
    depthwise: bool,
    before: Sequence[float],
    weights: Sequence[float],
    momentum: Sequence[float],
) -> Tensor:
    """Launch the kernels. Arguments and results: `kernels.update_generators_`."""
    max_cout, max_cin, taps, hidden = basis.shape
    rows, count = max_cout * max_cin * taps, len(codes[-1]) if before else 0
    size = generator_tile(hidden)
    tiles_each, programs = generator_runs(rows, size)
    parts = basis.new_empty(programs, count, hidden, dtype=torch.float64)
    with torch.cuda.device_of(basis):
        _update_kernel[programs,](
            basis, bias, basis_momentum, bias_momentum, parts, steps_of(codes, grads, cin, cout),
            tuple(before) if before else None, tuple(weights), tuple(momentum), rows, max_cin, taps, hidden, tiles_each,
            depthwise, PANEL, size.rows, size.columns, triton.next_power_of_2(max(count, 1)), **size.options,
        )  # fmt: skip
        return add_programs(parts, basis.dtype)
