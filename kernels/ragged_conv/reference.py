"""`ragged_conv` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, N images, C channels, O channels out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dense import channel_sums, compute_dtype, finish, slots_on_host, widths_on_host
from kernels.layout import Image, gather_activations, output_image, view_activations, view_weights


def ragged_conv_reference(
    x: Tensor,
    weight: Tensor,
    cin: Tensor,
    cout: Tensor,
    source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_cin: int,
    max_cout: int,
    bias: Tensor | None,
    activation: str,
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """y[s] = act(conv2d(x[source[s]], weight[s]) + bias[s] + shortcut[shortcut_source[s]]).

    Shapes and errors: `kernels.ragged_conv`.
    """
    dtype, out_image = compute_dtype(x.dtype), output_image(image, kernel, stride)
    sources = slots_on_host("source", source, x.shape[0])
    cins, couts = widths_on_host("cin", cin, max_cin), widths_on_host("cout", cout, max_cout)
    inputs, weights = x.unbind(0), weight.unbind(0)
    shortcuts = None
    if shortcut is not None and shortcut_source is not None:
        slots = shortcut.unbind(0)
        shortcuts = [slots[i] for i in slots_on_host("shortcut_source", shortcut_source, len(slots))]
    sums = []

    def outputs() -> Iterator[Tensor]:
        for s, (i, o) in enumerate(zip(cins, couts, strict=True)):
            out = functional.conv2d(
                view_activations(inputs[sources[s]], image, i).to(dtype),
                view_weights(weights[s], i, o, kernel).to(dtype),
                stride=stride,
                padding=kernel // 2,
            )
            if statistics:
                sums.append(channel_sums(out, max_cout))
            added = None if shortcuts is None else view_activations(shortcuts[s], out_image, o)
            yield finish(out, None if bias is None else bias[s], added, activation)

    y = gather_activations(outputs(), len(cins), out_image, max_cout, x)
    return y, torch.stack(sums) if statistics else x.new_empty(0, dtype=torch.float64)
