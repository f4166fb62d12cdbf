"""`update_generators_` in PyTorch: the definition every kernel is held to.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, R = O·I·K rows, H hidden size of the weight
generator.
"""

from math import isqrt

import torch
from torch import Tensor

from kernels.generate_delayed.reference import drifted
from kernels.generate_weights.reference import crops
from kernels.layout import read_weights


def update_generators_reference(
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
    """A step of momentum SGD from the factors of the gradients, in place, of rows in a crop, or of all if `everywhere`:

        w, m  ← what `drift` says of the steps since they were `written`
        m     ← momentum · m + d + weight_decay · w       d = Σ_s grad[s] ⊗ codes[s], of the bias Σ_s grad[s]
        w     ← w - lr · m

    and `written` ← `step`, or 0 if everywhere. A bfloat16 m is rounded to nearest when it is written. Shapes and
    errors: `kernels.update_generators_`. Returns the gradients `[S, H]` of the codes: Σ_{o,i,k} grad[s] · basis, of
    the basis before this step.
    """
    g_SOIK = dense_gradients(grad, basis, cin, cout, depthwise)
    visited_OI = visited(written, cin, cout, depthwise, everywhere)
    d_basis, d_bias = (g_SOIK.flatten(1).T @ codes).view_as(basis), g_SOIK.sum(0)
    d_codes = None
    for own, own_momentum, d in ((basis, basis_momentum, d_basis), (bias, bias_momentum, d_bias)):
        w, m = drifted(own, own_momentum, written, drift)
        if own is basis:
            # Rows outside all crops may hold anything.
            seen = torch.where(visited_OI.view(*visited_OI.shape, 1, 1), w, 0)
            d_codes = g_SOIK.flatten(1) @ seen.flatten(0, -2)
        m = momentum * m + (d + weight_decay * w)
        here = visited_OI.view(*visited_OI.shape, *[1] * (own.dim() - 2))
        own.copy_(torch.where(here, w - lr * m, own))
        own_momentum.copy_(torch.where(here, m, own_momentum.to(m.dtype)))
    note_written(written, visited_OI, everywhere, step)
    assert d_codes is not None
    return d_codes


def visited(written: Tensor, cin: Tensor, cout: Tensor, depthwise: bool, everywhere: bool) -> Tensor:
    """Which channels out and in, bool `[O, I]`, a step changes."""
    if everywhere:
        return torch.ones_like(written, dtype=torch.bool)
    o, i = (torch.arange(n, device=written.device) for n in written.shape)
    inside_SOI = (o < cout[:, None])[:, :, None] & (depthwise | (i < cin[:, None]))[:, None, :]
    return inside_SOI.any(0)


def note_written(written: Tensor, visited_OI: Tensor, everywhere: bool, step: int) -> None:
    """Note that they were written after this step."""
    written.masked_fill_(visited_OI, 0 if everywhere else step)


def dense_gradients(grad: Tensor, basis: Tensor, cin: Tensor, cout: Tensor, depthwise: bool) -> Tensor:
    """Packed gradients `[S, slot]` as `[S, O, I, K]`, zero outside their crops."""
    kernel = isqrt(basis.shape[2])
    g_SOIK = basis.new_zeros(len(grad), *basis.shape[:3])
    for g_OIK, packed, (o, i) in zip(g_SOIK, grad, crops(cin, cout, basis, depthwise), strict=True):
        g_OIK[:o, :i] = read_weights(packed, i, o, kernel, depthwise).flatten(2)
    return g_SOIK
