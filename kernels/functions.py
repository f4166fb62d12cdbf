"""The public functions: the arguments of every op are checked, and it runs in the chosen backend.

Errors, and the legend of the shapes: `kernels`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels import backends, checks
from kernels.layout import Image
from kernels.registration import NAMESPACE, overload


@dataclass(frozen=True)
class BlockConv:
    """One convolution of a `fused_block`, as `ragged_conv` or `ragged_depthwise` would take it.

    `width_S` are its output channels, at most `max_width`: if depthwise, those before it.
    """

    weight: Tensor
    weight_source_S: Tensor
    width_S: Tensor
    scale_SO: Tensor
    shift_SO: Tensor
    max_width: int
    depthwise: bool
    kernel: int
    stride: int
    activation: str


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
) -> Tensor:
    """Generate, crop and pack the weights of one convolution for S subnetworks.

        w[s,o,i,k] = Σ_h basis[o,i,k,h] · codes[s,h] + bias[o,i,k]    for o < cout[s], i < cin[s]

    `basis_OIKH`, `bias_OIK` and `codes_SH` are of one dtype. A depthwise basis is `[C, 1, K, H]`, its widths
    are `cout_S`, and `cin_S` is ignored. Without a code (H = 0) the bias is the weights of all subnetworks.

    Returns `[S, weight_slot(I, O, kernel, dtype, depthwise)]`, laid out as `kernels.layout` says. Pad channels
    are zero. Differentiable in basis, bias and codes.
    """
    return _call("generate_weights", basis_OIKH, bias_OIK, codes_SH, cin_S, cout_S, depthwise)


def ragged_conv(
    x: Tensor,
    weight: Tensor,
    cin_S: Tensor,
    cout_S: Tensor,
    source_S: Tensor,
    *,
    weight_source_S: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_cin: int,
    max_cout: int,
    scale_SO: Tensor | None = None,
    shift_SO: Tensor | None = None,
    activation: str = "none",
    shortcut: Tensor | None = None,
    shortcut_source_S: Tensor | None = None,
    input_scale_LC: Tensor | None = None,
    input_shift_LC: Tensor | None = None,
    input_activation: str = "none",
    statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve S subnetworks, padded by kernel // 2, with scale, shift, shortcut and activation.

        y[s] = act(conv2d(input[source[s]], weight[weight_source[s]]) · scale[s] + shift[s]
                   + shortcut[shortcut_source[s]])
        input[l] = act_in(x[l] · input_scale[l] + input_shift[l])

    `x` is `[slots, N·H·W·round_up(max_cin, 8)]`, `weight` `[slots, weight_slot]` as `generate_weights` returns
    it, `image` is (N, H, W) of x, an activation one of "none", "relu", "relu6". `scale_SO`, `shift_SO` (1 and 0
    if None), `input_scale_LC` and `input_shift_LC` (both or neither) have the dtype of x or float32. The
    padding is zero in `input`: it is neither shifted nor activated. `shortcut` is an activation buffer whose
    slots have the size of the output's.

    Returns y `[S, N·Ho·Wo·round_up(max_cout, 8)]` and, if `statistics`, the float64 sums `[S, 2, max_cout]`:
    sum and sum of squares over N·Ho·Wo of the convolution before scale, shift, shortcut and activation, zero
    from cout[s] on; otherwise an empty tensor. Without scale, shift, shortcut and activation it is
    differentiable in `x`, `weight`, `input_scale_LC` and `input_shift_LC`, through y and through the sums; with
    one of them a gradient raises `RuntimeError`.
    """
    return _call(
        "ragged_conv",
        x,
        weight,
        cin_S,
        cout_S,
        source_S,
        weight_source_S,
        list(image),
        kernel,
        stride,
        max_cin,
        max_cout,
        scale_SO,
        shift_SO,
        activation,
        shortcut,
        shortcut_source_S,
        input_scale_LC,
        input_shift_LC,
        input_activation,
        statistics,
    )


def generated_conv(
    x: Tensor,
    basis_OIKH: Tensor,
    bias_OIK: Tensor,
    codes_SH: Tensor,
    cin_S: Tensor,
    cout_S: Tensor,
    source_S: Tensor,
    *,
    image: Image,
    stride: int,
    max_cin: int,
    max_cout: int,
    input_scale_LC: Tensor | None = None,
    input_shift_LC: Tensor | None = None,
    input_activation: str = "none",
    statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve S subnetworks by weights that are generated for this and used by nobody else.

        y[s]       = conv2d(input[source[s]], w[s])
        w[s,o,i,k] = Σ_h basis[o,i,k,h] · codes[s,h] + bias[o,i,k]    for o < cout[s], i < cin[s]
        input[l]   = act_in(x[l] · input_scale[l] + input_shift[l])

    That is `ragged_conv` of what `generate_weights` returns, rounded to the dtype of the basis, which is that of x.
    `x` is `[slots, N·H·W·round_up(max_cin, 8)]`, `max_cin` and `max_cout` are at most I and O; the other arguments
    are those of the two. The README says when this pays: seldom.

    Returns y `[S, N·Ho·Wo·round_up(max_cout, 8)]` and, if `statistics`, the float64 sums `[S, 2, max_cout]`.
    Differentiable in x, basis, bias, codes, input_scale and input_shift, through y and through the sums: the gradient
    generates the weights again and makes dense gradients of basis and bias.
    """
    return _call(
        "generated_conv",
        x,
        basis_OIKH,
        bias_OIK,
        codes_SH,
        cin_S,
        cout_S,
        source_S,
        list(image),
        stride,
        max_cin,
        max_cout,
        input_scale_LC,
        input_shift_LC,
        input_activation,
        statistics,
    )


def ragged_depthwise(
    x: Tensor,
    weight: Tensor,
    channels_S: Tensor,
    source_S: Tensor,
    *,
    weight_source_S: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
    scale_SC: Tensor | None = None,
    shift_SC: Tensor | None = None,
    activation: str = "none",
    input_scale_LC: Tensor | None = None,
    input_shift_LC: Tensor | None = None,
    input_activation: str = "none",
    statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel of S subnetworks by its own kernel, with scale, shift and activation.

        y[s] = act(conv2d(input[source[s]], weight[weight_source[s]], groups=channels[s]) · scale[s] + shift[s])
        input[l] = act_in(x[l] · input_scale[l] + input_shift[l])

    Padded by kernel // 2 with zeros of `input`. `x` is `[slots, N·H·W·round_up(max_channels, 8)]`, `weight`
    `[slots, weight_slot]` as `generate_weights(depthwise=True)` returns it; the other arguments are those of
    `ragged_conv`.

    Returns y `[S, N·Ho·Wo·round_up(max_channels, 8)]` and the sums of `ragged_conv`. Differentiable in x, weight,
    input_scale and input_shift, through y and through the sums, if there is no scale, shift and activation.
    """
    return _call(
        "ragged_depthwise",
        x,
        weight,
        channels_S,
        source_S,
        weight_source_S,
        list(image),
        kernel,
        stride,
        max_channels,
        scale_SC,
        shift_SC,
        activation,
        input_scale_LC,
        input_shift_LC,
        input_activation,
        statistics,
    )


def fused_block(
    x: Tensor,
    channels_S: Tensor,
    source_S: Tensor,
    convs: Sequence[BlockConv],
    *,
    image: Image,
    max_channels: int,
    shortcut: Tensor | None = None,
    shortcut_source_S: Tensor | None = None,
) -> Tensor:
    """Run one to three convolutions in a chain without storing what lies between them.

        z_j[s] = act_j(conv_j(z_{j-1}[s], weight_j[weight_source_j[s]]) · scale_j[s] + shift_j[s])

    with z_{-1}[s] = x[source[s]]; shortcut[shortcut_source[s]] is added before the last activation. The result
    is that of `ragged_conv` and `ragged_depthwise` one after another, but for the rounding between them. `x` is
    `[slots, N·H·W·round_up(max_channels, 8)]`, `channels_S` its widths, `image` is (N, H, W) of x. Scales and
    shifts have the dtype of x or float32. `shortcut` is an activation buffer whose slots have the size of the
    output's.

    Returns the last z, `[S, N·Ho·Wo·round_up(max_width, 8)]`. Not differentiable.
    """
    return _call(
        "fused_block",
        x,
        channels_S,
        source_S,
        [conv.weight for conv in convs],
        [conv.weight_source_S for conv in convs],
        [conv.width_S for conv in convs],
        [conv.scale_SO for conv in convs],
        [conv.shift_SO for conv in convs],
        list(image),
        max_channels,
        [conv.max_width for conv in convs],
        [conv.depthwise for conv in convs],
        [conv.kernel for conv in convs],
        [conv.stride for conv in convs],
        [conv.activation for conv in convs],
        shortcut,
        shortcut_source_S,
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


def scale_and_shift(sums_S2C: Tensor, count: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """What normalises channels of which these are the sums and the sums of squares over `count` pixels.

        scale = (var + epsilon)^-½        shift = -mean · scale

    `sums_S2C` is float64, as convolutions return it. On a CPU this is C++, if that is there, and elsewhere PyTorch:
    there are no backends to choose from, and the bits are the same.

    Returns scale and shift `[S, C]`, float32. Differentiable in the sums.
    """
    checks.scale_and_shift(sums_S2C, count, epsilon)
    return _scale_and_shift(sums_S2C, count, epsilon)


_scale_and_shift = overload(NAMESPACE, "scale_and_shift")


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

    Returns for each image whether its largest logit is the label's (bool `[S, N]`; a row with a NaN logit is
    never correct) and its cross-entropy in nats (float64 `[S, N]`). Not differentiable.
    """
    return _call("score_logits", x, weight_TC, bias_T, labels_N, channels_S, source_S, list(image))
