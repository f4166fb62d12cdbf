"""`generate_delayed` in Triton: the kernel of `generate_weights`, on what the steps still to come make of its rows.

Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels.generate_weights.triton import launch
from kernels.gpu.generators import steps_of


def generate_delayed_triton(
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
    """Launch the kernel. Arguments and results: `kernels.generate_delayed`."""
    momentum: list[Tensor | None] = [basis_momentum, bias_momentum] if coefficients[1] else [None, None]
    steps = steps_of(factor_codes, factor_grads, factor_cin, factor_cout)
    return launch(basis, bias, momentum, steps, tuple(coefficients), codes, cin, cout, depthwise)
