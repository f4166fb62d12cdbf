"""`ragged_max_pool` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, N images, C channels.
"""

from torch import Tensor
from torch.nn import functional

from kernels.dense import slots_on_host, vector_jacobian_products, widths_on_host
from kernels.layout import Image, gather_activations, output_image, view_activations


def ragged_max_pool_reference(
    x: Tensor, channels: Tensor, source: Tensor, image: Image, kernel: int, stride: int, max_channels: int
) -> Tensor:
    """y[s] = max_pool2d(x[source[s]], kernel, stride), padded by kernel // 2 with -inf.

    Shapes and errors: `kernels.ragged_max_pool`.
    """
    sources = slots_on_host("source", source, x.shape[0])
    widths = widths_on_host("channels", channels, max_channels)
    inputs = x.unbind(0)
    outputs = (
        functional.max_pool2d(view_activations(inputs[slot], image, c), kernel, stride, padding=kernel // 2)
        for slot, c in zip(sources, widths, strict=True)
    )
    return gather_activations(outputs, len(widths), output_image(image, kernel, stride), max_channels, x)


def ragged_max_pool_backward_reference(
    grad: Tensor,
    x: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
) -> Tensor:
    """The gradient of x, given that of the output, `[S, slot]`: zero where x is not read.

    It goes to the first of the largest pixels of a window, in row-major order.
    """

    def forward(leaf: Tensor) -> tuple[Tensor]:
        return (ragged_max_pool_reference(leaf, channels, source, image, kernel, stride, max_channels),)

    return vector_jacobian_products(forward, (x,), (grad,))[0]
