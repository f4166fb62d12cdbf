"""`generate_delayed` in Triton: the kernel of `generate_weights`, on what has become of its rows.

Proven by Triton's interpreter and by compilation ahead of time; not run on a GPU.
"""

from torch import Tensor

from kernels.generate_weights.triton import launch


def generate_delayed_triton(
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
    """Launch the kernel. Arguments and results: `kernels.generate_delayed`."""
    return launch(basis, bias, (basis_momentum, bias_momentum, written, drift), codes, cin, cout, depthwise)
