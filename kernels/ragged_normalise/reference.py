"""`ragged_normalise` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, N images, C channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.dense import compute_dtype, finish, slots_on_host, widths_on_host
from kernels.layout import Image, gather_activations, view_activations


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
    dtype = compute_dtype(x.dtype)
    sources = slots_on_host("source", source, x.shape[0])
    widths = widths_on_host("channels", channels, max_channels)
    inputs, scales, shifts = x.unbind(0), scale.to(dtype).unbind(0), shift.to(dtype).unbind(0)
    shortcuts = None
    if shortcut is not None and shortcut_source is not None:
        slots = shortcut.unbind(0)
        shortcuts = [slots[i] for i in slots_on_host("shortcut_source", shortcut_source, len(slots))]

    def outputs() -> Iterator[Tensor]:
        for s, c in enumerate(widths):
            dense = view_activations(inputs[sources[s]], image, c).to(dtype)
            out = torch.addcmul(shifts[s][:c, None, None], dense, scales[s][:c, None, None])
            added = None if shortcuts is None else view_activations(shortcuts[s], image, c)
            yield finish(out, None, added, activation)

    return gather_activations(outputs(), len(widths), image, max_channels, x)
