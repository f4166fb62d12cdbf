"""`generate_delayed` in PyTorch: the definition every kernel is held to.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, H hidden size of the weight generator.
"""

from torch import Tensor

from kernels.generate_weights.reference import generate_weights_reference


def generate_delayed_reference(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    written: Tensor,
    drift: Tensor,
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
    depthwise: bool,
) -> Tensor:
    """`generate_weights` of the basis and the bias as they are after all steps.

    Shapes and errors: `kernels.generate_delayed`. Returns `[S, slot]`.
    """
    (basis, _), (bias, _) = (
        drifted(own, momentum, written, drift) for own, momentum in ((basis, basis_momentum), (bias, bias_momentum))
    )
    return generate_weights_reference(basis, bias, codes, cin, cout, depthwise)


def drifted(own: Tensor, momentum: Tensor, written: Tensor, drift: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `[O, I, …]` and momentum after the steps since they were written: drift `[j, 4]` for those of step j."""
    a, b, p, q = drift[written.long()].view(*written.shape, *[1] * (own.dim() - 2), 4).unbind(-1)
    m = momentum.to(own.dtype)
    # Where nothing comes of the momentum it is not looked at.
    return own + (a * own + (b * m).where(b != 0, 0)), p * own + q * m
