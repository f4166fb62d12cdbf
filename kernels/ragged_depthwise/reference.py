"""`ragged_depthwise` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, N images, C channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dense import channel_sums, compute_dtype, finish, slots_on_host, widths_on_host
from kernels.layout import Image, gather_activations, output_image, view_activations, view_weights


def ragged_depthwise_reference(
    x: Tensor,
    weight: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
    bias: Tensor | None,
    activation: str,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """y[s] = act(conv2d(x[source[s]], weight[s], groups=channels[s]) + bias[s]), padding kernel // 2.

    Shapes and errors: `kernels.ragged_depthwise`.
    """
    dtype, out_image = compute_dtype(x.dtype), output_image(image, kernel, stride)
    sources = slots_on_host("source", source, x.shape[0])
    widths = widths_on_host("channels", channels, max_channels)
    inputs, weights = x.unbind(0), weight.unbind(0)
    sums = []

    def outputs() -> Iterator[Tensor]:
        for s, c in enumerate(widths):
            out = functional.conv2d(
                view_activations(inputs[sources[s]], image, c).to(dtype),
                view_weights(weights[s], 1, c, kernel, depthwise=True).to(dtype),
                stride=stride,
                padding=kernel // 2,
                groups=c,
            )
            if statistics:
                sums.append(channel_sums(out, max_channels))
            yield finish(out, None if bias is None else bias[s], None, activation)

    y = gather_activations(outputs(), len(widths), out_image, max_channels, x)
    return y, torch.stack(sums) if statistics else x.new_empty(0, dtype=torch.float64)
