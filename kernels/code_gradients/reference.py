"""`code_gradients` in PyTorch: the definition every kernel is held to.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, H hidden size of the weight generator.
"""

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

from kernels.generate_delayed.reference import delayed
from kernels.generate_weights.reference import crops
from kernels.layout import read_weights


def code_gradients_reference(
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
    """The gradients of the codes that went into `generate_delayed`, with w the basis that a delayed update would make:

        d_codes[s,h] = Σ_{o < cout[s], i < cin[s], k} grad[s,o,i,k] · w[o,i,k,h]

    Shapes and errors: `kernels.code_gradients`. Returns `[S, H]`.
    """
    factors = (factor_codes, factor_grads, factor_cin, factor_cout)
    w_OIKH, _ = delayed(basis, bias, basis_momentum, bias_momentum, *factors, depthwise, coefficients)
    kernel, hidden = isqrt(basis.shape[2]), basis.shape[-1]
    d_codes = []
    for packed, (o, i) in zip(grad, crops(cin, cout, basis, depthwise), strict=True):
        g_R = read_weights(packed, i, o, kernel, depthwise).reshape(-1)
        d_codes.append(g_R @ w_OIKH[:o, :i].reshape(len(g_R), hidden))
    return torch.stack(d_codes)
