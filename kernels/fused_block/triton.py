"""`fused_block` on a GPU: its convolutions in Triton, one launch each.

What lies between them is stored in the dtype of x and rounded to it. Nothing is read back to the host. Proven by
Triton's interpreter and by compilation ahead of time; not run on a GPU.

Legend: S subnetworks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.layout import Image, output_image
from kernels.ragged_conv.triton import ragged_conv_triton
from kernels.ragged_depthwise.triton import depthwise_with_shortcut


def fused_block_triton(
    x: Tensor,
    channels: Tensor,
    source: Tensor,
    weights: Sequence[Tensor],
    weight_sources: Sequence[Tensor],
    widths: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    image: Image,
    max_channels: int,
    max_widths: Sequence[int],
    depthwise: Sequence[bool],
    kernels: Sequence[int],
    strides: Sequence[int],
    activations: Sequence[str],
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
) -> Tensor:
    """Launch one kernel after another. Arguments and result: `kernels.fused_block`, as its op takes them."""
    own, last = torch.arange(len(channels), dtype=torch.int32, device=x.device), len(weights) - 1
    for j, (weight, weight_source, cout, kernel, stride) in enumerate(
        zip(weights, weight_sources, widths, kernels, strides, strict=True)
    ):
        added = (shortcut, shortcut_source) if j == last else (None, None)
        rest = (scales[j], shifts[j], activations[j], *added, None, None, "none", False)
        if depthwise[j]:
            x, _ = depthwise_with_shortcut(
                x, weight, channels, source, weight_source, image, kernel, stride, max_channels, *rest
            )
        else:
            x, _ = ragged_conv_triton(
                x, weight, channels, cout, source, weight_source, image, kernel, stride, max_channels, max_widths[j],
                *rest,
            )  # fmt: skip
        image, channels, source, max_channels = output_image(image, kernel, stride), cout, own, max_widths[j]
    return x
