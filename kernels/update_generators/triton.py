"""`update_generators_` in Triton: one pass over the rows of basis and momentum, each read and written once.

A program takes a run of neighbouring tiles; the gradients of the codes are its sums, which a second launch adds in
order. Rows that wait are neither read nor written. When rows were written is noted afterwards: tiles may share a
channel. Nothing is read back to the host. Proven by Triton's interpreter and by compilation ahead of time; not run on
a GPU.

Legend: S subnetworks, R rows of a tile, H hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.generators import add_gradients, drift_of, drifted, kept_by_any, place, store_sums
from kernels.gpu.sums import add_programs
from kernels.gpu.tiles import generator_runs, generator_tile
from kernels.layout import PANEL
from kernels.update_generators.reference import note_written, visited

# A thread's. The compiler prefers 72, and spills one.
REGISTERS = 80


@triton.jit
def _update_kernel(
    basis, bias, basis_momentum, bias_momentum, written, drift, parts, codes, grad, cin_S, cout_S, count, slot, rows,
    max_cin, taps, hidden, tiles_each, lr, momentum, weight_decay,
    EVERYWHERE: tl.constexpr, DEPTHWISE: tl.constexpr, PANEL: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, DEPTH)
    sums_SH = tl.zeros((COUNT, DEPTH), tl.float64)
    for tile in range(0, tiles_each):
        row_R = (tl.program_id(0) * tiles_each + tile) * ROWS + tl.arange(0, ROWS)
        o_R, i_R, tap_R = place(row_R, max_cin, taps)
        visited_R = row_R < rows
        if not EVERYWHERE:
            visited_R &= kept_by_any(o_R, i_R, cin_S, cout_S, count, DEPTHWISE)
        at_RH = row_R.to(tl.int64)[:, None] * hidden + h[None, :]
        visited_RH = visited_R[:, None] & (h < hidden)[None, :]
        old_RH = tl.load(basis + at_RH, mask=visited_RH, other=0)
        m_RH = tl.load(basis_momentum + at_RH, mask=visited_RH, other=0).to(old_RH.dtype)
        change_w_R, change_m_R = drift_of(drift, written, o_R, i_R, max_cin, visited_R, 0)
        from_w_R, from_m_R = drift_of(drift, written, o_R, i_R, max_cin, visited_R, 2)
        w_RH = drifted(old_RH, m_RH, change_w_R[:, None], change_m_R[:, None])
        m_RH = momentum * (from_w_R[:, None] * old_RH + from_m_R[:, None] * m_RH) + weight_decay * w_RH
        sums_SH, m_RH, d_R = add_gradients(
            sums_SH, m_RH, w_RH, codes, grad, cin_S, cout_S, count, slot, h, hidden, o_R, i_R, tap_R, taps, DEPTHWISE,
            PANEL, COUNT,
        )  # fmt: skip
        tl.store(basis + at_RH, w_RH - lr * m_RH, mask=visited_RH)
        tl.store(basis_momentum + at_RH, m_RH.to(basis_momentum.dtype.element_ty), mask=visited_RH)

        old_R = tl.load(bias + row_R, mask=visited_R, other=0)
        m_R = tl.load(bias_momentum + row_R, mask=visited_R, other=0)
        w_R = drifted(old_R, m_R, change_w_R, change_m_R)
        m_R = momentum * (from_w_R * old_R + from_m_R * m_R) + weight_decay * w_R + d_R
        tl.store(bias + row_R, w_R - lr * m_R, mask=visited_R)
        tl.store(bias_momentum + row_R, m_R, mask=visited_R)
    store_sums(parts, tl.program_id(0), sums_SH, h, hidden, count, COUNT)


def update_generators_triton(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    written: Tensor,
    drift: Tensor,
    codes: Tensor,
    grad: Tensor,
    cin: Tensor,
    cout: Tensor,
    depthwise: bool,
    lr: float,
    momentum: float,
    weight_decay: float,
    everywhere: bool,
    step: int,
) -> Tensor:
    """Launch the kernels. Arguments and results: `kernels.update_generators_`."""
    max_cout, max_cin, taps, hidden = basis.shape
    rows, count = max_cout * max_cin * taps, len(codes)
    size = generator_tile(hidden)
    tiles_each, programs = generator_runs(rows, size)
    parts = basis.new_empty(programs, count, hidden, dtype=torch.float64)
    with torch.cuda.device_of(basis):
        _update_kernel[programs,](
            basis, bias, basis_momentum, bias_momentum, written, drift, parts, codes, grad, cin, cout, count,
            grad.shape[1], rows, max_cin, taps, hidden, tiles_each, lr, momentum, weight_decay, everywhere, depthwise,
            PANEL, size.rows, size.columns, triton.next_power_of_2(max(count, 1)), maxnreg=REGISTERS, **size.options,
        )  # fmt: skip
        note_written(written, visited(written, cin, cout, depthwise, everywhere), everywhere, step)
        return add_programs(parts, basis.dtype)
