"""`scale_and_shift` in PyTorch: the definition that the kernel is held to.

Legend: S subnetworks, C channels.
"""

import torch
from torch import Tensor


def scale_and_shift_reference(sums: Tensor, count: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """scale = (var + ε)^-½ and shift = -mean · scale. Shapes and errors: `kernels.scale_and_shift`."""
    mean, scale = _mean_and_scale(sums, count, epsilon)
    return scale.float(), (-(mean * scale)).float()


def scale_and_shift_backward_reference(
    grad_scale: Tensor, grad_shift: Tensor, sums: Tensor, count: int, epsilon: float
) -> Tensor:
    """The gradient of the sums, given those of scale and shift, ``[S, C]``."""
    mean, scale = _mean_and_scale(sums, count, epsilon)
    d_scale, d_shift = grad_scale.double(), grad_shift.double()
    d_square = (d_scale - mean * d_shift) * scale**3 * -0.5
    d_mean = -scale * d_shift - 2 * mean * d_square
    return torch.stack([d_mean, d_square], dim=1).div_(count)


def _mean_and_scale(sums: Tensor, count: int, epsilon: float) -> tuple[Tensor, Tensor]:
    mean, square = (sums / count).unbind(1)
    return mean, (square - mean * mean).clamp_(min=0).add_(epsilon).rsqrt_()
