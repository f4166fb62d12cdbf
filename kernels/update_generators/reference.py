"""`update_generators_` in PyTorch: the definition every kernel is held to.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, H hidden size of the weight generator.
"""

from math import isqrt

from torch import Tensor

from kernels.generate_weights.reference import crops
from kernels.layout import read_weights


def update_generators_reference(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    codes: Tensor,
    grad: Tensor,
    cin: Tensor,
    cout: Tensor,
    depthwise: bool,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """One step of momentum SGD from the factors of the gradient, in place. With g[s] = grad[s], 0 outside its crop:

        d_codes[s,h] = Σ_{o,i,k} g[s,o,i,k] · basis[o,i,k,h]                        of the basis before the step
        m ← momentum · m + Σ_s g[s] ⊗ codes[s] + weight_decay · basis               basis ← basis - lr · m

    and likewise for the bias, with Σ_s g[s]. Shapes and errors: `kernels.update_generators_`. Returns `[S, H]`.
    """
    kernel = isqrt(basis.shape[2])
    g_SOIK = basis.new_zeros(len(codes), *bias.shape)
    for g_OIK, packed, (o, i) in zip(g_SOIK, grad, crops(cin, cout, basis, depthwise), strict=True):
        g_OIK[:o, :i] = read_weights(packed, i, o, kernel, depthwise).flatten(2)
    g_SR, basis_RH = g_SOIK.flatten(1), basis.view(bias.numel(), basis.shape[-1])
    d_codes = g_SR @ basis_RH
    basis_momentum.mul_(momentum).add_(basis, alpha=weight_decay).view_as(basis_RH).addmm_(g_SR.T, codes)
    bias_momentum.mul_(momentum).add_(bias, alpha=weight_decay).add_(g_SOIK.sum(0))
    basis.sub_(basis_momentum, alpha=lr)
    bias.sub_(bias_momentum, alpha=lr)
    return d_codes
