"""`fused_block` in PyTorch, one subnetwork after another: the definition every kernel is held to.

Legend: S subnetworks, N images, C channels, O channels out.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels.dense import convolve, dense_inputs, dense_shortcuts, dense_weights, rows, widths_on_host
from kernels.layout import Image, chained_image, gather_activations


def fused_block_reference(
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
    """z_j[s] = act_j(conv_j(z_{j-1}[s]) · scale_j[s] + shift_j[s]), z_{-1}[s] = x[source[s]]; the last one is y.

    The shortcut is added before the last activation. Shapes and errors: `kernels.fused_block`.
    """
    cin, count, last = widths_on_host("channels", channels, max_channels), len(channels), len(weights) - 1
    out_image = chained_image(image, kernels, strides)
    inner = dense_inputs(x, cin, source, image)
    for j in range(len(weights)):
        cout = widths_on_host(f"widths[{j}]", widths[j], max_widths[j])
        if depthwise[j]:
            _expect_same_widths(j, cin, cout)
        inner = convolve(
            inner,
            dense_weights(weights[j], cin, cout, weight_sources[j], kernels[j], depthwise[j]),
            strides[j],
            rows(scales[j], count),
            rows(shifts[j], count),
            dense_shortcuts(shortcut, shortcut_source, cout, out_image) if j == last else rows(None, count),
            activations[j],
        )
        cin = cout
    return gather_activations(inner, count, out_image, max_widths[-1], x)


def _expect_same_widths(j: int, cin: list[int], cout: list[int]) -> None:
    for s, (before, after) in enumerate(zip(cin, cout, strict=True)):
        if before != after:
            raise RuntimeError(f"widths[{j}][{s}] is {after}; a depthwise convolution keeps its {before} channels")
