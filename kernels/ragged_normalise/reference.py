"""`ragged_normalise` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, N images, C channels.
"""

from torch import Tensor

from kernels.dense import dense_inputs, dense_shortcuts, finish, vector_jacobian_products, widths_on_host
from kernels.layout import Image, gather_activations


def ragged_normalise_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    max_channels: int,
    activation: str,
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
) -> Tensor:
    """y[s] = act(x[source[s]] · scale[s] + shift[s] + shortcut[shortcut_source[s]]), per channel.

    Shapes and errors: `kernels.ragged_normalise`.
    """
    widths = widths_on_host("channels", channels, max_channels)
    inputs = dense_inputs(x, widths, source, image)
    shortcuts = dense_shortcuts(shortcut, shortcut_source, widths, image)
    outputs = (
        finish(dense.clone(), scale_C, shift_C, added, activation)
        for dense, scale_C, shift_C, added in zip(inputs, scale.unbind(0), shift.unbind(0), shortcuts, strict=True)
    )
    return gather_activations(outputs, len(widths), image, max_channels, x)


def ragged_normalise_backward_reference(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    max_channels: int,
    activation: str,
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, scale, shift and shortcut, given that of the output `y`, both `[S, slot]`.

    The activation lets the gradient through where y is between its bounds and not on them: that of what precedes
    it is found by autograd. Each result has the shape and dtype of what it is the gradient of, zero where that is
    not read; without a shortcut the last is empty.
    """
    stopped = {"none": (), "relu": (y <= 0,), "relu6": (y <= 0, y >= 6)}[activation]

    def before_activation(*leaves: Tensor) -> tuple[Tensor]:
        x, scale, shift, shortcut = leaves
        place = (channels, source, image, max_channels, "none", shortcut, shortcut_source)
        return (ragged_normalise_reference(x, scale, shift, *place),)

    for places in stopped:
        grad = grad.masked_fill(places, 0)
    inputs = (x, scale, shift, shortcut)
    d_x, d_scale, d_shift, d_shortcut = vector_jacobian_products(before_activation, inputs, (grad,))
    return d_x, d_scale, d_shift, d_shortcut
