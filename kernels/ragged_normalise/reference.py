"""`ragged_normalise` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, N images, C channels.
"""

from torch import Tensor

from kernels.dense import dense_inputs, dense_shortcuts, finish, widths_on_host
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
