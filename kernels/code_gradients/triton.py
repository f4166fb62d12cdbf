"""`code_gradients` in Triton: one pass over the rows of the basis that any subnetwork keeps.

As `kernels/update_generators/triton.py`, but that nothing is written back and rows outside all crops are not read.
Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks, R rows of a tile, H hidden size.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.generators import (
    add_code_gradients,
    decayed,
    kept_by_any,
    place,
    step_gradients,
    steps_of,
    store_sums,
)
from kernels.gpu.sums import add_programs
from kernels.gpu.tiles import generator_runs, generator_tile
from kernels.layout import PANEL


@triton.jit
def _code_gradients_kernel(
    basis, basis_momentum, parts, steps, coefficients, last, max_cin, taps, hidden, rows, tiles_each,
    DEPTHWISE: tl.constexpr, PANEL: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, DEPTH)
    sums_SH = tl.zeros((COUNT, DEPTH), tl.float64)
    for tile in range(0, tiles_each):
        row_R = (tl.program_id(0) * tiles_each + tile) * ROWS + tl.arange(0, ROWS)
        o_R, i_R, tap_R = place(row_R, max_cin, taps)
        kept_R = (row_R < rows) & kept_by_any(o_R, i_R, last[2], last[3], last[4], DEPTHWISE)
        at_RH = row_R.to(tl.int64)[:, None] * hidden + h[None, :]
        mask_RH = kept_R[:, None] & (h < hidden)[None, :]
        basis_RH = decayed(basis, basis_momentum, coefficients, at_RH, mask_RH)
        for j in tl.static_range(len(steps)):
            d_RH, _ = step_gradients(steps[j], h, hidden, o_R, i_R, tap_R, taps, DEPTHWISE, PANEL)
            basis_RH += coefficients[2 + j] * d_RH
        sums_SH = add_code_gradients(sums_SH, basis_RH, last, o_R, i_R, tap_R, taps, DEPTHWISE, PANEL, COUNT)
    store_sums(parts, tl.program_id(0), sums_SH, h, hidden, last[4], COUNT)


def code_gradients_triton(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    factor_codes: Sequence[Tensor],
    factor_grads: Sequence[Tensor],
    factor_cin: Sequence[Tensor],
    factor_cout: Sequence[Tensor],
    depthwise: bool,
    coefficients: Sequence[float],
    grad: Tensor,
    cin: Tensor,
    cout: Tensor,
) -> Tensor:
    """Launch the kernels. Arguments and results: `kernels.code_gradients`."""
    (max_cout, max_cin, taps, hidden), count = basis.shape, len(grad)
    rows, size = max_cout * max_cin * taps, generator_tile(hidden)
    tiles_each, programs = generator_runs(rows, size)
    parts = basis.new_empty(programs, count, hidden, dtype=torch.float64)
    steps = steps_of(factor_codes, factor_grads, factor_cin, factor_cout)
    [last] = steps_of([grad], [grad], [cin], [cout])
    with torch.cuda.device_of(basis):
        _code_gradients_kernel[programs,](
            basis, basis_momentum if coefficients[1] else None, parts, steps, tuple(coefficients), last, max_cin, taps,
            hidden, rows, tiles_each, depthwise, PANEL, size.rows, size.columns, triton.next_power_of_2(count),
            **size.options,
        )  # fmt: skip
        return add_programs(parts, basis.dtype)
