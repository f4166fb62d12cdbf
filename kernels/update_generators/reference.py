"""`update_generators_` in PyTorch: the definition every kernel is held to.

Legend: S subnetworks of one step, T steps, O channels out, I channels in, K = kernel² taps, R = O·I·K rows, H hidden
size of the weight generator.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels.code_gradients.reference import code_gradients_reference
from kernels.generate_delayed.reference import dense_gradients


def update_generators_reference(
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
    """T steps of momentum SGD from the factors of their gradients, in place. With d_j = Σ_s grads[j][s] ⊗ codes[j][s]:

        basis, m ← basis + weights[0] · basis + weights[1] · m + Σ_j weights[2+j] · d_j,
                           momentum[0] · basis + momentum[1] · m + Σ_j momentum[2+j] · d_j

    and likewise for the bias, without the codes; a bfloat16 m is rounded to nearest after the last step. Shapes and
    errors: `kernels.update_generators_`. Returns the
    `code_gradients` `[S, H]` of the last step, of the weights that `before` makes of what is there before all this and
    of the other factors; with an empty `before`, of none: `[0, H]`.
    """
    d_codes = basis.new_empty(0, basis.shape[-1])
    if before:
        d_codes = code_gradients_reference(
            basis,
            bias,
            basis_momentum,
            bias_momentum,
            codes[:-1],
            grads[:-1],
            cin[:-1],
            cout[:-1],
            depthwise,
            before,
            grads[-1],
            cin[-1],
            cout[-1],
        )
    g_TSOIK = [dense_gradients(g, basis, i, o, depthwise) for g, i, o in zip(grads, cin, cout, strict=True)]
    for own, m, codes_TSH in ((basis, basis_momentum, codes), (bias, bias_momentum, None)):
        old = m.to(own.dtype)
        change, new = weights[0] * own + weights[1] * old, momentum[0] * own + momentum[1] * old
        for j, g_SOIK in enumerate(g_TSOIK):
            d = g_SOIK.sum(0) if codes_TSH is None else g_SOIK.flatten(1).T @ codes_TSH[j]
            change.add_(d.view_as(own), alpha=weights[2 + j])
            new.add_(d.view_as(own), alpha=momentum[2 + j])
        own.add_(change)
        m.copy_(new)
    return d_codes
