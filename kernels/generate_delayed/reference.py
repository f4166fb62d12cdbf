"""`generate_delayed` in PyTorch: the definition every kernel is held to.

Legend: S subnetworks, T steps, O channels out, I channels in, K = kernel² taps, R = O·I·K rows, H hidden size of the
weight generator.
"""

from collections.abc import Sequence
from math import isqrt

from torch import Tensor

from kernels.generate_weights.reference import crops, generate_weights_reference
from kernels.layout import read_weights


def generate_delayed_reference(
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
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
) -> Tensor:
    """`generate_weights` of the basis and the bias that a delayed update would make.

    Shapes and errors: `kernels.generate_delayed`. Returns `[S, slot]`.
    """
    factors = (factor_codes, factor_grads, factor_cin, factor_cout)
    basis, bias = delayed(basis, bias, basis_momentum, bias_momentum, *factors, depthwise, coefficients)
    return generate_weights_reference(basis, bias, codes, cin, cout, depthwise)


def delayed(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    codes: Sequence[Tensor],
    grads: Sequence[Tensor],
    cin: Sequence[Tensor],
    cout: Sequence[Tensor],
    depthwise: bool,
    coefficients: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Basis and bias after a delayed update, c = coefficients. With d_j = Σ_s grads[j][s] ⊗ codes[j][s]:

        basis + c[0] · basis + c[1] · m + Σ_j c[2+j] · d_j                      a zero c[1]: m is not looked at

    and likewise for the bias, without the codes. `grads[j][s]` is zero outside its crop.
    """
    of_weights, of_momentum, *of_factors = coefficients
    new_basis, new_bias = basis + of_weights * basis, bias + of_weights * bias
    if of_momentum:
        new_basis += of_momentum * basis_momentum.to(basis.dtype)
        new_bias += of_momentum * bias_momentum
    for j, number in enumerate(of_factors):
        g_SOIK = dense_gradients(grads[j], basis, cin[j], cout[j], depthwise)
        new_basis += number * (g_SOIK.flatten(1).T @ codes[j]).view_as(basis)
        new_bias += number * g_SOIK.sum(0)
    return new_basis, new_bias


def dense_gradients(grad: Tensor, basis: Tensor, cin: Tensor, cout: Tensor, depthwise: bool) -> Tensor:
    """Packed gradients `[S, slot]` as `[S, O, I, K]`, zero outside their crops."""
    kernel = isqrt(basis.shape[2])
    g_SOIK = basis.new_zeros(len(grad), *basis.shape[:3])
    for g_OIK, packed, (o, i) in zip(g_SOIK, grad, crops(cin, cout, basis, depthwise), strict=True):
        g_OIK[:o, :i] = read_weights(packed, i, o, kernel, depthwise).flatten(2)
    return g_SOIK
