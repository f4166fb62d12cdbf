"""What every op demands of its arguments, for the fake kernels and the public functions alike.

Each function takes the arguments of the op of its name, in the order of the op's schema, and raises
`RuntimeError` (through `torch._check`) naming the argument, what it is and what it must be. Values inside
device tensors (channel counts, slot numbers) are not looked at here: a kernel that can see them checks them.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, H hidden size, C channels, T classes.
"""

from collections.abc import Callable, Sequence
from math import isfinite, isqrt

import torch
from torch import Tensor

from kernels.dense import ACTIVATIONS, compute_dtype
from kernels.layout import Image, activation_slot, chained_image, output_image, weight_slot

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_FUSED = 3


def _check(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """`torch._check`, which takes microseconds, for what does not hold or is not yet known."""
    if condition is not True:
        torch._check(condition, message)


def _expect(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    like: Tensor,
    legend: str = "",
) -> None:
    """Check shape, dtype, device and contiguity of one argument."""
    # Sizes of a plain tensor are numbers. A training step makes thousands of these checks.
    if (
        type(tensor) is Tensor
        and tensor.shape == tuple(shape)
        and tensor.dtype in dtypes
        and tensor.is_contiguous()
        and tensor.device == like.device
    ):
        return

    def got() -> str:
        kinds = " or ".join(map(str, dtypes))
        return f"{name} must be {kinds} {list(shape)} {legend}contiguous on {like.device}, got "

    _check(tensor.dtype in dtypes, lambda: f"{got()}{tensor.dtype}")
    same_rank = tensor.dim() == len(shape)
    _check(same_rank, lambda: f"{got()}{list(tensor.shape)}")
    for size, wanted in zip(tensor.shape, shape, strict=True):
        _check(size == wanted, lambda: f"{got()}{list(tensor.shape)}")
    _check(tensor.device == like.device, lambda: f"{got()}{tensor.device}")
    _check(tensor.is_contiguous(), lambda: f"{got()}strides {list(tensor.stride())}")


def _indices(like: Tensor, count: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        _expect(name, tensor, (count,), (torch.int32,), like, "= [S] ")


def _per_channel(like: Tensor, shape: Sequence[int], legend: str, **tensors: Tensor | None) -> None:
    dtypes = tuple(dict.fromkeys((like.dtype, compute_dtype(like.dtype))))
    for name, tensor in tensors.items():
        if tensor is not None:
            _expect(name, tensor, shape, dtypes, like, f"= [{legend}] ")


def _activations(x: Tensor, image: Image, max_channels: int) -> None:
    _check(len(image) == 3, lambda: f"image must be (N, H, W), got {tuple(image)}")
    for size in (*image, max_channels):
        _check(size >= 1, lambda: f"image {tuple(image)} and channels {max_channels} must be at least 1")
    _buffer("x", x, activation_slot(image, max_channels), x)


def _buffer(name: str, tensor: Tensor, slot: int, like: Tensor) -> None:
    dtypes = FLOATS if tensor is like else (like.dtype,)
    _check(tensor.dim() == 2, lambda: f"{name} must be [slots, {slot}], got {list(tensor.shape)}")
    _expect(name, tensor, (tensor.shape[0], slot), dtypes, like, "= [slots, slot] ")


def _window(kernel: int, stride: int, activation: str = "none") -> None:
    _check(kernel >= 1 and stride >= 1, lambda: f"kernel and stride must be at least 1, got {kernel}, {stride}")
    _activation("activation", activation)


def _activation(name: str, activation: str) -> None:
    _check(activation in ACTIVATIONS, lambda: f"{name} must be one of {ACTIVATIONS}, got {activation!r}")


def _prologue(x: Tensor, max_channels: int, scale: Tensor | None, shift: Tensor | None, activation: str) -> None:
    _activation("input_activation", activation)
    _check(
        (scale is None) == (shift is None),
        lambda: "input_scale and input_shift must be given together or not at all",
    )
    _check(
        scale is not None or activation == "none",
        lambda: f"input_activation must be 'none' without input_scale and input_shift, got {activation!r}",
    )
    shape = (x.shape[0], max_channels)
    _per_channel(x, shape, "slots of x, max channels", input_scale=scale, input_shift=shift)


def _shortcut(x: Tensor, slot: int, count: int, shortcut: Tensor | None, shortcut_source: Tensor | None) -> None:
    _check(
        (shortcut is None) == (shortcut_source is None),
        lambda: "shortcut and shortcut_source must be given together or not at all",
    )
    if shortcut is not None and shortcut_source is not None:
        _buffer("shortcut", shortcut, slot, x)
        _indices(x, count, shortcut_source=shortcut_source)


def _count(tensor: Tensor, name: str) -> int:
    _check(
        tensor.dim() == 1 and tensor.shape[0] >= 1,
        lambda: f"{name} must be [S] with S at least 1, got {list(tensor.shape)}",
    )
    return tensor.shape[0]


def generate_weights(basis: Tensor, bias: Tensor, codes: Tensor, cin: Tensor, cout: Tensor, depthwise: bool) -> None:
    _check(
        basis.dim() == 4 and codes.dim() == 2,
        lambda: f"basis must be [O, I, K, H] and codes [S, H], got {list(basis.shape)} and {list(codes.shape)}",
    )
    o, i, taps, hidden = basis.shape
    _expect("basis", basis, basis.shape, FLOATS, basis, "= [O, I, K, H] ")
    _check(
        min(o, i, taps) >= 1 and isqrt(taps) ** 2 == taps,
        lambda: f"basis {list(basis.shape)} = [O, I, K, H] must not be empty, but for H, and K must be a square",
    )
    _check(not depthwise or i == 1, lambda: f"a depthwise basis must be [C, 1, K, H], got {list(basis.shape)}")
    s = _count(cout, "cout")
    _expect("bias", bias, (o, i, taps), (basis.dtype,), basis, "= [O, I, K] ")
    _expect("codes", codes, (s, hidden), (basis.dtype,), basis, "= [S, H] ")
    _indices(basis, s, cin=cin, cout=cout)


def generate_weights_backward(
    grad: Tensor, basis: Tensor, codes: Tensor, cin: Tensor, cout: Tensor, depthwise: bool
) -> None:
    o, i, taps, _ = basis.shape
    _buffer("grad", grad, weight_slot(i, o, isqrt(taps), basis.dtype, depthwise, basis.device), basis)
    generate_weights(basis, basis.new_empty(o, i, taps), codes, cin, cout, depthwise)


def ragged_conv(
    x: Tensor,
    weight: Tensor,
    cin: Tensor,
    cout: Tensor,
    source: Tensor,
    weight_source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_cin: int,
    max_cout: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    shortcut: Tensor | None,
    shortcut_source: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    statistics: bool,
) -> None:
    _window(kernel, stride, activation)
    _activations(x, image, max_cin)
    s = _count(cout, "cout")
    _indices(x, s, cin=cin, cout=cout, source=source, weight_source=weight_source)
    _buffer("weight", weight, weight_slot(max_cin, max_cout, kernel, x.dtype, device=x.device), x)
    _per_channel(x, (s, max_cout), "S, max channels", scale=scale, shift=shift)
    _shortcut(x, activation_slot(output_image(image, kernel, stride), max_cout), s, shortcut, shortcut_source)
    _prologue(x, max_cin, input_scale, input_shift, input_activation)


def ragged_conv_backward(
    grad_y: Tensor | None,
    grad_sums: Tensor | None,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    cin: Tensor,
    cout: Tensor,
    source: Tensor,
    weight_source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_cin: int,
    max_cout: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    needs_x: bool,
) -> None:
    forward = (x, weight, cin, cout, source, weight_source, image, kernel, stride, max_cin, max_cout)
    ragged_conv(*forward, None, None, "none", None, None, input_scale, input_shift, input_activation, True)
    _output_gradients(grad_y, grad_sums, y, x, output_image(image, kernel, stride), cout.shape[0], max_cout)


def _output_gradients(
    grad_y: Tensor | None,
    grad_sums: Tensor | None,
    y: Tensor,
    x: Tensor,
    out_image: Image,
    count: int,
    max_channels: int,
) -> None:
    """The output of a bare convolution, and the gradients of it and of its sums, if there are any."""
    for name, tensor in (("y", y), ("grad_y", grad_y)):
        if tensor is not None:
            _expect(name, tensor, (count, activation_slot(out_image, max_channels)), (x.dtype,), x, "= [S, slot] ")
    if grad_sums is not None:
        _expect("grad_sums", grad_sums, (count, 2, max_channels), (torch.float64,), x, "= [S, 2, max channels] ")


def generated_conv(
    x: Tensor,
    basis: Tensor,
    bias: Tensor,
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
    source: Tensor,
    image: Image,
    stride: int,
    max_cin: int,
    max_cout: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    statistics: bool,
) -> None:
    generate_weights(basis, bias, codes, cin, cout, False)
    o, i, taps, _ = basis.shape
    _window(isqrt(taps), stride)
    _check(
        1 <= max_cin <= i and 1 <= max_cout <= o,
        lambda: f"max_cin and max_cout must be 1..{i} and 1..{o}, got {max_cin} and {max_cout}",
    )
    _activations(x, image, max_cin)
    _expect("basis", basis, basis.shape, (x.dtype,), x, "= [O, I, K, H] ")
    _indices(x, cout.shape[0], source=source)
    _prologue(x, max_cin, input_scale, input_shift, input_activation)


def ragged_depthwise(
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
) -> None:
    _window(kernel, stride, activation)
    _activations(x, image, max_channels)
    s = _count(channels, "channels")
    _indices(x, s, channels=channels, source=source, weight_source=weight_source)
    _buffer("weight", weight, weight_slot(1, max_channels, kernel, x.dtype, depthwise=True), x)
    _per_channel(x, (s, max_channels), "S, max channels", scale=scale, shift=shift)
    _prologue(x, max_channels, input_scale, input_shift, input_activation)


def ragged_depthwise_backward(
    grad_y: Tensor | None,
    grad_sums: Tensor | None,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    channels: Tensor,
    source: Tensor,
    weight_source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
    needs_x: bool,
) -> None:
    forward = (x, weight, channels, source, weight_source, image, kernel, stride, max_channels)
    ragged_depthwise(*forward, None, None, "none", input_scale, input_shift, input_activation, True)
    _output_gradients(grad_y, grad_sums, y, x, output_image(image, kernel, stride), channels.shape[0], max_channels)


def fused_block(
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
) -> None:
    lists = (weights, weight_sources, widths, scales, shifts, max_widths, depthwise, kernels, strides, activations)
    lengths = [len(values) for values in lists]
    _check(
        1 <= lengths[0] <= MAX_FUSED and len(set(lengths)) == 1,
        lambda: f"a fused block is 1 to {MAX_FUSED} convolutions, each with all its arguments; got lists of {lengths}",
    )
    _activations(x, image, max_channels)
    s = _count(channels, "channels")
    _indices(x, s, channels=channels, source=source)
    max_cin = max_channels
    for j, (weight, kernel, max_width) in enumerate(zip(weights, kernels, max_widths, strict=True)):
        _window(kernel, strides[j], activations[j])
        _check(max_width >= 1, lambda: f"max_widths must be at least 1, got {list(max_widths)}")
        _indices(x, s, **{f"weight_sources[{j}]": weight_sources[j], f"widths[{j}]": widths[j]})
        slot = weight_slot(max_cin, max_width, kernel, x.dtype, depthwise[j], x.device)
        _buffer(f"weights[{j}]", weight, slot, x)
        _per_channel(x, (s, max_width), "S, max channels", **{f"scales[{j}]": scales[j], f"shifts[{j}]": shifts[j]})
        max_cin = max_width
    out_image = chained_image(image, kernels, strides)
    _shortcut(x, activation_slot(out_image, max_cin), s, shortcut, shortcut_source)


def ragged_normalise(
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
) -> None:
    _window(1, 1, activation)
    _activations(x, image, max_channels)
    s = _count(channels, "channels")
    _indices(x, s, channels=channels, source=source)
    _per_channel(x, (s, max_channels), "S, max channels", scale=scale, shift=shift)
    _shortcut(x, activation_slot(image, max_channels), s, shortcut, shortcut_source)


def ragged_normalise_backward(
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
) -> None:
    forward = (x, scale, shift, channels, source, image, max_channels, activation)
    ragged_normalise(*forward, shortcut, shortcut_source)
    for name, tensor in (("grad", grad), ("y", y)):
        _expect(name, tensor, (channels.shape[0], x.shape[1]), (x.dtype,), x, "= [S, slot] ")


def ragged_max_pool(
    x: Tensor, channels: Tensor, source: Tensor, image: Image, kernel: int, stride: int, max_channels: int
) -> None:
    _window(kernel, stride)
    _activations(x, image, max_channels)
    _indices(x, _count(channels, "channels"), channels=channels, source=source)


def ragged_max_pool_backward(
    grad: Tensor,
    x: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
) -> None:
    ragged_max_pool(x, channels, source, image, kernel, stride, max_channels)
    slot = activation_slot(output_image(image, kernel, stride), max_channels)
    _expect("grad", grad, (channels.shape[0], slot), (x.dtype,), x, "= [S, slot] ")


def score_logits(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, channels: Tensor, source: Tensor, image: Image
) -> None:
    _check(
        weight.dim() == 2 and weight.shape[0] >= 1,
        lambda: f"weight must be [classes, max channels], got {list(weight.shape)}",
    )
    _activations(x, image, weight.shape[1])
    _per_channel(x, weight.shape, "classes, max channels", weight=weight)
    _per_channel(x, weight.shape[:1], "classes", bias=bias)
    _expect("labels", labels, (image[0],), (torch.int64,), x, "= [N] ")
    _indices(x, _count(channels, "channels"), channels=channels, source=source)


def _trainable(basis: Tensor) -> None:
    dtypes = (torch.float32, torch.float64)
    _check(basis.dtype in dtypes, lambda: f"basis must be {dtypes[0]} or {dtypes[1]}, got {basis.dtype}")


def _momentum(basis: Tensor, basis_momentum: Tensor, bias_momentum: Tensor) -> None:
    # A bfloat16 momentum is an option of float32 alone.
    dtypes = (basis.dtype, torch.bfloat16) if basis.dtype == torch.float32 else (basis.dtype,)
    _expect("basis_momentum", basis_momentum, basis.shape, dtypes, basis, "= [O, I, K, H] ")
    _expect("bias_momentum", bias_momentum, basis.shape[:3], (basis.dtype,), basis, "= [O, I, K] ")


def _factors(
    basis: Tensor, bias: Tensor, names: tuple[str, ...], factors: Sequence[Sequence[Tensor]], depthwise: bool
) -> None:
    """The codes, gradients, cin and cout of every step."""
    lengths = [len(values) for values in factors]
    _check(len(set(lengths)) == 1, lambda: f"every factor has {', '.join(names)}; got lists of {lengths}")
    for j, (codes, grad, cin, cout) in enumerate(zip(*factors, strict=True)):
        generate_weights(basis, bias, codes, cin, cout, depthwise)
        _packed(f"{names[1]}[{j}]", basis, grad, len(codes), depthwise)


def _packed(name: str, basis: Tensor, grad: Tensor, count: int, depthwise: bool) -> None:
    o, i, taps, _ = basis.shape
    # A slot may be as small as its largest crop.
    slot = min(grad.shape[-1], weight_slot(i, o, isqrt(taps), basis.dtype, depthwise))
    _expect(name, grad, (count, slot), (basis.dtype,), basis, "= [S, slot] ")


def _coefficients(name: str, values: Sequence[float], factors: int) -> None:
    _check(
        len(values) == 2 + factors and all(map(isfinite, values)),
        lambda: f"{name} must be 2 + {factors} finite numbers, got {list(values)}",
    )


def generate_delayed(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    factor_codes: Sequence[Tensor],
    factor_grads: Sequence[Tensor],
    factor_cin: Sequence[Tensor],
    factor_cout: Sequence[Tensor],
    depthwise: bool,
    coefficients: Sequence[float],
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
) -> None:
    _trainable(basis)
    generate_weights(basis, bias, codes, cin, cout, depthwise)
    _momentum(basis, basis_momentum, bias_momentum)
    names = ("factor_codes", "factor_grads", "factor_cin", "factor_cout")
    _factors(basis, bias, names, (factor_codes, factor_grads, factor_cin, factor_cout), depthwise)
    _coefficients("coefficients", coefficients, len(factor_codes))


def code_gradients(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    factor_codes: Sequence[Tensor],
    factor_grads: Sequence[Tensor],
    factor_cin: Sequence[Tensor],
    factor_cout: Sequence[Tensor],
    depthwise: bool,
    coefficients: Sequence[float],
    grad: Tensor,
    cin: Tensor,
    cout: Tensor,
) -> None:
    codes = basis.new_empty(_count(cout, "cout"), basis.shape[-1])
    state = (basis, bias, basis_momentum, bias_momentum, factor_codes, factor_grads, factor_cin, factor_cout)
    generate_delayed(*state, depthwise, coefficients, codes, cin, cout)
    _packed("grad", basis, grad, len(codes), depthwise)


def update_generators_(
    basis: Tensor,
    bias: Tensor,
    basis_momentum: Tensor,
    bias_momentum: Tensor,
    codes: Sequence[Tensor],
    grads: Sequence[Tensor],
    cin: Sequence[Tensor],
    cout: Sequence[Tensor],
    depthwise: bool,
    before: Sequence[float],
    weights: Sequence[float],
    momentum: Sequence[float],
) -> None:
    _trainable(basis)
    _check(len(codes) >= 1, lambda: "there must be at least one factor")
    _factors(basis, bias, ("codes", "grads", "cin", "cout"), (codes, grads, cin, cout), depthwise)
    _momentum(basis, basis_momentum, bias_momentum)
    if before:
        _coefficients("before", before, len(grads) - 1)
    _coefficients("weights", weights, len(grads))
    _coefficients("momentum", momentum, len(grads))
