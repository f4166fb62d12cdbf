"""Ragged-batch kernels: many differently pruned subnetworks in one call.

`S` subnetworks with different channel counts share one buffer (`kernels.layout`). Channel counts and slot
numbers are int32 tensors on the device of the data. Every op takes float32, bfloat16 (computed in float32,
rounded once) and, in the reference, float64.

Where an op has a `source_S`, subnetwork s reads slot `source[s]` of the input: several subnetworks may share
one.

Every op raises `RuntimeError` for a wrong shape, dtype, device or stride and, where the kernel can see them,
for channel counts and slot numbers out of range; `backends.BackendError` if a forced backend cannot run it.

Legend: S subnetworks, N images, C or I channels in, O channels out, H W size (in `codes_SH` and `basis_OIKH`,
H is the hidden size of the weight generator), K = kernel² taps, T classes.
"""

from typing import Any

from torch import Tensor

from kernels import backends, checks
from kernels.layout import (
    Image,
    activation_slot,
    output_size,
    pack_activations,
    pack_weights,
    round_up,
    unpack_activations,
    unpack_weights,
    weight_slot,
)

__all__ = [
    "activation_slot",
    "backends",
    "generate_weights",
    "output_size",
    "pack_activations",
    "pack_weights",
    "ragged_conv",
    "ragged_depthwise",
    "ragged_max_pool",
    "ragged_normalise",
    "round_up",
    "score_logits",
    "unpack_activations",
    "unpack_weights",
    "weight_slot",
]


def _call(op: str, *args: Any) -> Any:
    getattr(checks, op)(*args)
    return backends.implementation(op, args[0])(*args)


def generate_weights(
    basis_OIKH: Tensor,
    bias_OIK: Tensor,
    codes_SH: Tensor,
    cin_S: Tensor,
    cout_S: Tensor,
    *,
    depthwise: bool = False,
    scale_SO: Tensor | None = None,
) -> Tensor:
    """Generate, crop and pack the weights of one convolution for S subnetworks.

        w[s,o,i,k] = (Σ_h basis[o,i,k,h] · codes[s,h] + bias[o,i,k]) · scale[s,o]    for o < cout[s], i <
        cin[s]

    `basis_OIKH`, `bias_OIK`, `codes_SH` and `scale_SO` are of one dtype. A depthwise basis is `[C, 1, K, H]`,
    its widths are `cout_S`, and `cin_S` is ignored.

    Returns `[S, O·K·round_up(I, 8)]`, of which subnetwork s uses the front `[cout_s, K, round_up(cin_s, 8)]`,
    or `[S, K·round_up(C, 8)]` with front `[K, round_up(c_s, 8)]` if depthwise. Pad channels are zero.

    Differentiable in basis, bias and codes. `scale_SO`, the folded BatchNorm, is not: `RuntimeError` if it
    requires grad.
    """
    return _call("generate_weights", basis_OIKH, bias_OIK, codes_SH, cin_S, cout_S, depthwise, scale_SO)


def ragged_conv(
    x: Tensor,
    weight: Tensor,
    cin_S: Tensor,
    cout_S: Tensor,
    source_S: Tensor,
    *,
    image: Image,
    kernel: int,
    stride: int,
    max_cin: int,
    max_cout: int,
    bias_SO: Tensor | None = None,
    activation: str = "none",
    shortcut: Tensor | None = None,
    shortcut_source_S: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve S subnetworks, padded by kernel // 2, with bias, shortcut and activation.

        y[s] = act(conv2d(x[source[s]], weight[s]) + bias[s] + shortcut[shortcut_source[s]])

    `x` is `[slots, N·H·W·round_up(max_cin, 8)]`, `weight` as `generate_weights` returns it, `image` is (N, H,
    W) of x, `activation` one of "none", "relu", "relu6". `bias_SO` has the dtype of x or float32. `shortcut`
    is an activation buffer whose slots have the size of the output's.

    Returns y `[S, N·Ho·Wo·round_up(max_cout, 8)]` and, if `statistics`, the float64 sums `[S, 2, max_cout]`:
    sum and sum of squares over N·Ho·Wo of the convolution before bias, shortcut and activation, zero from
    cout[s] on; otherwise an empty tensor. Differentiable in x, weight, bias and shortcut, through y and
    through the sums.
    """
    return _call(
        "ragged_conv",
        x,
        weight,
        cin_S,
        cout_S,
        source_S,
        list(image),
        kernel,
        stride,
        max_cin,
        max_cout,
        bias_SO,
        activation,
        shortcut,
        shortcut_source_S,
        statistics,
    )


def ragged_depthwise(
    x: Tensor,
    weight: Tensor,
    channels_S: Tensor,
    source_S: Tensor,
    *,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
    bias_SC: Tensor | None = None,
    activation: str = "none",
    statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel of S subnetworks by its own kernel, with bias and activation.

        y[s] = act(conv2d(x[source[s]], weight[s], groups=channels[s]) + bias[s])

    Padded by kernel // 2. `x` is `[slots, N·H·W·round_up(max_channels, 8)]`, `weight` as
    `generate_weights(depthwise=True)` returns it, `image` is (N, H, W) of x, `activation` one of "none",
    "relu", "relu6". `bias_SC` has the dtype of x or float32.

    Returns y `[S, N·Ho·Wo·round_up(max_channels, 8)]` and the sums of `ragged_conv`. Differentiable in x,
    weight and bias, through y and through the sums.
    """
    return _call(
        "ragged_depthwise",
        x,
        weight,
        channels_S,
        source_S,
        list(image),
        kernel,
        stride,
        max_channels,
        bias_SC,
        activation,
        statistics,
    )


def ragged_normalise(
    x: Tensor,
    scale_SC: Tensor,
    shift_SC: Tensor,
    channels_S: Tensor,
    source_S: Tensor,
    *,
    image: Image,
    max_channels: int,
    activation: str = "none",
    shortcut: Tensor | None = None,
    shortcut_source_S: Tensor | None = None,
) -> Tensor:
    """Normalise S subnetworks per channel, with shortcut and activation: BatchNorm with given statistics.

        y[s] = act(x[source[s]] · scale[s] + shift[s] + shortcut[shortcut_source[s]])

    `x` is `[slots, N·H·W·round_up(max_channels, 8)]`, `image` is (N, H, W), `activation` one of "none",
    "relu", "relu6". `scale_SC` and `shift_SC` have the dtype of x or float32. `shortcut` is an activation
    buffer with slots like those of x.

    Returns y `[S, N·H·W·round_up(max_channels, 8)]`. Differentiable in x, scale, shift and shortcut.
    """
    return _call(
        "ragged_normalise",
        x,
        scale_SC,
        shift_SC,
        channels_S,
        source_S,
        list(image),
        max_channels,
        activation,
        shortcut,
        shortcut_source_S,
    )


def ragged_max_pool(
    x: Tensor,
    channels_S: Tensor,
    source_S: Tensor,
    *,
    image: Image,
    max_channels: int,
    kernel: int = 3,
    stride: int = 2,
) -> Tensor:
    """Take the maximum over every kernel × kernel window, padded by kernel // 2 with -inf.

        y[s] = max_pool2d(x[source[s]], kernel, stride)

    `x` is `[slots, N·H·W·round_up(max_channels, 8)]`, `image` is (N, H, W) of x.

    Returns y `[S, N·Ho·Wo·round_up(max_channels, 8)]`. Differentiable in x.
    """
    return _call("ragged_max_pool", x, channels_S, source_S, list(image), kernel, stride, max_channels)


def score_logits(
    x: Tensor,
    weight_TC: Tensor,
    bias_T: Tensor,
    labels_N: Tensor,
    channels_S: Tensor,
    source_S: Tensor,
    *,
    image: Image,
) -> tuple[Tensor, Tensor]:
    """Average over the pixels, classify with the cropped linear head, and score against the labels.

        logits[s] = mean_HW(x[source[s]]) @ weight[:, :channels[s]]ᵀ + bias

    `x` is `[slots, N·H·W·round_up(C, 8)]`, `image` is (N, H, W). `weight_TC` and `bias_T` have the dtype of x
    or float32. `labels_N` is int64.

    Returns the number of images whose largest logit is the label's (int64 `[S]`; a row with a NaN logit is
    never correct) and the sum of the images' cross-entropies in nats (float64 `[S]`). Not differentiable.
    """
    return _call("score_logits", x, weight_TC, bias_T, labels_N, channels_S, source_S, list(image))
