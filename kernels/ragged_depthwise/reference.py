"""`ragged_depthwise` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, N images, C channels.
"""

from torch import Tensor

from kernels.dense import convolve, dense_inputs, dense_weights, rows, stack_sums, widths_on_host
from kernels.layout import Image, gather_activations, output_image


def ragged_depthwise_reference(
    x: Tensor,
    weight: Tensor,
    channels: Tensor,
    source: Tensor,
    weight_source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """y[s] = act(conv2d(input[source[s]], weight[weight_source[s]], groups = channels[s]) · scale[s] + shift[s]).

    With input[l] = act_in(x[l] · input_scale[l] + input_shift[l]). Shapes and errors: `kernels.ragged_depthwise`.
    """
    widths = widths_on_host("channels", channels, max_channels)
    sums: list[Tensor] | None = [] if statistics else None
    outputs = convolve(
        dense_inputs(x, widths, source, image, input_scale, input_shift, input_activation),
        dense_weights(weight, widths, widths, weight_source, kernel, depthwise=True),
        stride,
        rows(scale, len(widths)),
        rows(shift, len(widths)),
        rows(None, len(widths)),
        activation,
        sums,
    )
    y = gather_activations(outputs, len(widths), output_image(image, kernel, stride), max_channels, x)
    return y, stack_sums(sums, max_channels, x)
