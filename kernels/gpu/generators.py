"""What the kernels that train weight generators share: rows of a basis, and the gradients of a step as its factors.

A step is a tuple `(codes [S, H], packed gradients [S, slot], cin [S], cout [S], S, slot)`; a launch takes a tuple of
them, and for each the numbers of a `Recurrence`, so that nothing is copied together.

Legend: S subnetworks, R rows of a tile, H hidden size.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.device import padded

Step = tuple[Tensor, Tensor, Tensor, Tensor, int, int]


@triton.jit
def place(row_R, max_cin, taps):
    """Channel out, channel in and tap of rows of a basis."""
    return row_R // taps // max_cin, row_R // taps % max_cin, row_R % taps


@triton.jit
def inside_crop(o_R, i_R, cin, cout, DEPTHWISE: tl.constexpr):
    """Whether a subnetwork keeps the rows."""
    kept_R = o_R < cout
    if not DEPTHWISE:
        kept_R &= i_R < cin
    return kept_R


@triton.jit
def kept_by_any(o_R, i_R, cin_S, cout_S, count, DEPTHWISE: tl.constexpr):
    """Whether any subnetwork keeps the rows."""
    kept_R = o_R < 0
    for s in range(0, count):
        kept_R |= inside_crop(o_R, i_R, tl.load(cin_S + s), tl.load(cout_S + s), DEPTHWISE)
    return kept_R


@triton.jit
def gradient(grad, slot, s, cin, cout, o_R, i_R, tap_R, taps, DEPTHWISE: tl.constexpr, PANEL: tl.constexpr):
    """The packed gradient of subnetwork s at some rows, 0 outside its crop."""
    if DEPTHWISE:
        at_R = tap_R * padded(cout) + o_R
    else:
        at_R = ((o_R // PANEL * taps + tap_R) * cin + i_R) * PANEL + o_R % PANEL
    kept_R = inside_crop(o_R, i_R, cin, cout, DEPTHWISE)
    return tl.load(grad + tl.cast(s, tl.int64) * slot + at_R, mask=kept_R, other=0)


@triton.jit
def step_gradients(step, h, hidden, o_R, i_R, tap_R, taps, DEPTHWISE: tl.constexpr, PANEL: tl.constexpr):
    """The gradients of rows of basis and bias of one step: Σ_s g[s] ⊗ codes[s] and Σ_s g[s]."""
    codes, grad, cin_S, cout_S, count, slot = step
    d_bias_R = tl.zeros_like(o_R).to(tl.float32)
    d_basis_RH = d_bias_R[:, None] * tl.zeros_like(h).to(tl.float32)[None, :]
    for s in range(0, count):
        g_R = gradient(grad, slot, s, tl.load(cin_S + s), tl.load(cout_S + s), o_R, i_R, tap_R, taps, DEPTHWISE, PANEL)
        code_H = tl.load(codes + s * hidden + h, mask=h < hidden, other=0)
        d_basis_RH += g_R[:, None] * code_H[None, :]
        d_bias_R += g_R
    return d_basis_RH, d_bias_R


@triton.jit
def decayed(weights, momentum, coefficients, at, mask):
    """Numbers of a basis or bias; with coefficients, what is to come makes of them, but for the factors of its steps.

    Without momentum its coefficient is zero. It may be of less precision than the numbers.
    """
    w = tl.load(weights + at, mask=mask, other=0)
    if coefficients is not None:
        # What is added is summed up first: it is far smaller than what it is added to.
        change = coefficients[0] * w
        if momentum is not None:
            change += coefficients[1] * tl.load(momentum + at, mask=mask, other=0).to(w.dtype)
        w += change
    return w


@triton.jit
def add_code_gradients(
    sums_SH, basis_RH, last, o_R, i_R, tap_R, taps, DEPTHWISE: tl.constexpr, PANEL: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Add Σ_r g[s,r] · basis[r] of a tile, summed in float32, to the float64 sums of every subnetwork."""
    _, grad, cin_S, cout_S, count, slot = last
    for s in range(0, count):
        g_R = gradient(grad, slot, s, tl.load(cin_S + s), tl.load(cout_S + s), o_R, i_R, tap_R, taps, DEPTHWISE, PANEL)
        total_H = tl.sum(g_R[:, None] * basis_RH, 0).to(tl.float64)
        sums_SH += tl.where((tl.arange(0, COUNT) == s)[:, None], total_H[None, :], 0)
    return sums_SH


@triton.jit
def store_sums(parts, part, sums_SH, h, hidden, count, COUNT: tl.constexpr):
    """Write one program's sums to `parts` [programs, S, H]."""
    s = tl.arange(0, COUNT)
    at_SH = (part.to(tl.int64) * count + s)[:, None] * hidden + h[None, :]
    tl.store(parts + at_SH, sums_SH, mask=(s < count)[:, None] & (h < hidden)[None, :])


def steps_of(
    codes: Sequence[Tensor], grads: Sequence[Tensor], cin: Sequence[Tensor], cout: Sequence[Tensor]
) -> tuple[Step, ...]:
    """The steps as a launch takes them."""
    given = zip(codes, grads, cin, cout, strict=True)
    return tuple((c, g, i, o, len(g), g.shape[1]) for c, g, i, o in given)
