"""What the kernels that train weight generators share: rows of a basis, what becomes of them, and gradients as factors.

Legend: S subnetworks, R rows of a tile, H hidden size.
"""

import triton
import triton.language as tl

from kernels.gpu.device import padded


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
    # In numbers: predicates that go through a loop would be spilled.
    kept_R = tl.zeros_like(o_R)
    for s in range(0, count):
        kept_R |= inside_crop(o_R, i_R, tl.load(cin_S + s), tl.load(cout_S + s), DEPTHWISE).to(tl.int32)
    return kept_R != 0


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
def drift_of(drift, written, o_R, i_R, max_cin, mask_R, FIRST: tl.constexpr):
    """Two numbers of what has become of rows since they were written: from 0 on of weights, from 2 on of momentum."""
    step_R = tl.load(written + o_R.to(tl.int64) * max_cin + i_R, mask=mask_R, other=0).to(tl.int32)
    from_weight_R = tl.load(drift + 4 * step_R + FIRST, mask=mask_R, other=0)
    return from_weight_R, tl.load(drift + 4 * step_R + FIRST + 1, mask=mask_R, other=0)


@triton.jit
def drifted(w, m, from_weight, from_momentum):
    """Weights after the steps since they were written. The momentum may be of less precision than they are."""
    # What is added is summed up first: it is far smaller than what it is added to.
    return w + (from_weight * w + from_momentum * m.to(w.dtype))


@triton.jit
def add_gradients(
    sums_SH, m_RH, w_RH, codes, grad, cin_S, cout_S, count, slot, h, hidden, o_R, i_R, tap_R, taps,
    DEPTHWISE: tl.constexpr, PANEL: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a tile's rows, Σ_s g[s] ⊗ codes[s], and those of the codes, Σ_r g[s,r] · w[r], to the sums.

    These are summed in float32, added in float64. Returns the gradients of the bias, Σ_s g[s], besides.
    """
    d_bias_R = tl.zeros_like(o_R).to(tl.float32)
    for s in range(0, count):
        g_R = gradient(grad, slot, s, tl.load(cin_S + s), tl.load(cout_S + s), o_R, i_R, tap_R, taps, DEPTHWISE, PANEL)
        code_H = tl.load(codes + s * hidden + h, mask=h < hidden, other=0)
        m_RH += g_R[:, None] * code_H[None, :]
        d_bias_R += g_R
        total_H = tl.sum(g_R[:, None] * w_RH, 0).to(tl.float64)
        sums_SH += tl.where((tl.arange(0, COUNT) == s)[:, None], total_H[None, :], 0)
    return sums_SH, m_RH, d_bias_R


@triton.jit
def store_sums(parts, part, sums_SH, h, hidden, count, COUNT: tl.constexpr):
    """Write one program's sums to `parts` [programs, S, H]."""
    s = tl.arange(0, COUNT)
    at_SH = (part.to(tl.int64) * count + s)[:, None] * hidden + h[None, :]
    tl.store(parts + at_SH, sums_SH, mask=(s < count)[:, None] & (h < hidden)[None, :])
