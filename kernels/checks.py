"""What every op demands of its arguments, for the fake kernels and the public functions alike.

Each function takes the arguments of the op of its name, in the order of the op's schema, and raises
`RuntimeError` (through `torch._check`) naming the argument, what it is and what it must be. Values inside
device tensors (channel counts, slot numbers) are not looked at here: a kernel that can see them checks them.

Legend: S subnetworks, O channels out, I channels in, K = kernel² taps, H hidden size, C channels, T classes.
"""

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

from kernels.dense import ACTIVATIONS, compute_dtype
from kernels.layout import Image, activation_slot, output_image, weight_slot

FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def _expect(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    like: Tensor,
    legend: str = "",
) -> None:
    """Check shape, dtype, device and contiguity of one argument."""

    def got() -> str:
        kinds = " or ".join(map(str, dtypes))
        return f"{name} must be {kinds} {list(shape)} {legend}contiguous on {like.device}, got "

    torch._check(tensor.dtype in dtypes, lambda: f"{got()}{tensor.dtype}")
    same_rank = tensor.dim() == len(shape)
    torch._check(same_rank, lambda: f"{got()}{list(tensor.shape)}")
    for size, wanted in zip(tensor.shape, shape, strict=True):
        torch._check(size == wanted, lambda: f"{got()}{list(tensor.shape)}")
    torch._check(tensor.device == like.device, lambda: f"{got()}{tensor.device}")
    torch._check(tensor.is_contiguous(), lambda: f"{got()}strides {list(tensor.stride())}")


def _indices(like: Tensor, count: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        _expect(name, tensor, (count,), (torch.int32,), like, "= [S] ")


def _per_channel(like: Tensor, shape: Sequence[int], **tensors: Tensor | None) -> None:
    dtypes = tuple(dict.fromkeys((like.dtype, compute_dtype(like.dtype))))
    for name, tensor in tensors.items():
        if tensor is not None:
            _expect(name, tensor, shape, dtypes, like, "= [S, max channels] ")


def _activations(x: Tensor, image: Image, max_channels: int) -> None:
    torch._check(len(image) == 3, lambda: f"image must be (N, H, W), got {tuple(image)}")
    for size in (*image, max_channels):
        torch._check(size >= 1, lambda: f"image {tuple(image)} and channels {max_channels} must be at least 1")
    _buffer("x", x, activation_slot(image, max_channels), x)


def _buffer(name: str, tensor: Tensor, slot: int, like: Tensor) -> None:
    dtypes = FLOATS if tensor is like else (like.dtype,)
    torch._check(tensor.dim() == 2, lambda: f"{name} must be [slots, {slot}], got {list(tensor.shape)}")
    _expect(name, tensor, (tensor.shape[0], slot), dtypes, like, "= [slots, slot] ")


def _window(kernel: int, stride: int, activation: str = "none") -> None:
    torch._check(kernel >= 1 and stride >= 1, lambda: f"kernel and stride must be at least 1, got {kernel}, {stride}")
    torch._check(activation in ACTIVATIONS, lambda: f"activation must be one of {ACTIVATIONS}, got {activation!r}")


def _shortcut(x: Tensor, slot: int, count: int, shortcut: Tensor | None, shortcut_source: Tensor | None) -> None:
    torch._check(
        (shortcut is None) == (shortcut_source is None),
        lambda: "shortcut and shortcut_source must be given together or not at all",
    )
    if shortcut is not None and shortcut_source is not None:
        _buffer("shortcut", shortcut, slot, x)
        _indices(x, count, shortcut_source=shortcut_source)


def _count(tensor: Tensor, name: str) -> int:
    torch._check(
        tensor.dim() == 1 and tensor.shape[0] >= 1,
        lambda: f"{name} must be [S] with S at least 1, got {list(tensor.shape)}",
    )
    return tensor.shape[0]


def generate_weights(
    basis: Tensor,
    bias: Tensor,
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
    depthwise: bool,
    scale: Tensor | None,
) -> None:
    torch._check(
        basis.dim() == 4 and codes.dim() == 2,
        lambda: f"basis must be [O, I, K, H] and codes [S, H], got {list(basis.shape)} and {list(codes.shape)}",
    )
    o, i, taps, hidden = basis.shape
    _expect("basis", basis, basis.shape, FLOATS, basis, "= [O, I, K, H] ")
    torch._check(
        min(o, i, taps, hidden) >= 1 and isqrt(taps) ** 2 == taps,
        lambda: f"basis {list(basis.shape)} = [O, I, K, H] must not be empty and K must be a square",
    )
    torch._check(not depthwise or i == 1, lambda: f"a depthwise basis must be [C, 1, K, H], got {list(basis.shape)}")
    s = _count(cout, "cout")
    _expect("bias", bias, (o, i, taps), (basis.dtype,), basis, "= [O, I, K] ")
    _expect("codes", codes, (s, hidden), (basis.dtype,), basis, "= [S, H] ")
    _indices(basis, s, cin=cin, cout=cout)
    if scale is not None:
        _expect("scale", scale, (s, o), (basis.dtype,), basis, "= [S, O] ")
        torch._check(
            not (scale.requires_grad and torch.is_grad_enabled()),
            lambda: "scale, a folded BatchNorm, is not differentiable: detach it, or score under torch.no_grad()",
        )


def generate_weights_backward(
    grad: Tensor,
    basis: Tensor,
    codes: Tensor,
    cin: Tensor,
    cout: Tensor,
    depthwise: bool,
    scale: Tensor | None,
) -> None:
    o, i, taps, _ = basis.shape
    _buffer("grad", grad, weight_slot(i, o, isqrt(taps), depthwise), basis)
    generate_weights(basis, basis.new_empty(o, i, taps), codes, cin, cout, depthwise, scale)


def ragged_conv(
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
) -> None:
    _window(kernel, stride, activation)
    _activations(x, image, max_cin)
    s = _count(cout, "cout")
    _indices(x, s, cin=cin, cout=cout, source=source)
    _expect(
        "weight",
        weight,
        (s, weight_slot(max_cin, max_cout, kernel)),
        (x.dtype,),
        x,
        "= [S, O·K·round_up(I)] ",
    )
    _per_channel(x, (s, max_cout), bias=bias)
    _shortcut(x, activation_slot(output_image(image, kernel, stride), max_cout), s, shortcut, shortcut_source)


def ragged_depthwise(
    x: Tensor,
    weight: Tensor,
    channels: Tensor,
    source: Tensor,
    image: Image,
    kernel: int,
    stride: int,
    max_channels: int,
    bias: Tensor | None,
    activation: str,
    statistics: bool,
) -> None:
    _window(kernel, stride, activation)
    _activations(x, image, max_channels)
    s = _count(channels, "channels")
    _indices(x, s, channels=channels, source=source)
    slot = weight_slot(1, max_channels, kernel, depthwise=True)
    _expect("weight", weight, (s, slot), (x.dtype,), x, "= [S, K·round_up(C)] ")
    _per_channel(x, (s, max_channels), bias=bias)


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
    _per_channel(x, (s, max_channels), scale=scale, shift=shift)
    _shortcut(x, activation_slot(image, max_channels), s, shortcut, shortcut_source)


def ragged_max_pool(
    x: Tensor, channels: Tensor, source: Tensor, image: Image, kernel: int, stride: int, max_channels: int
) -> None:
    _window(kernel, stride)
    _activations(x, image, max_channels)
    _indices(x, _count(channels, "channels"), channels=channels, source=source)


def score_logits(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, channels: Tensor, source: Tensor, image: Image
) -> None:
    torch._check(
        weight.dim() == 2 and weight.shape[0] >= 1,
        lambda: f"weight must be [classes, max channels], got {list(weight.shape)}",
    )
    _activations(x, image, weight.shape[1])
    _per_channel(x, weight.shape, weight=weight)
    _per_channel(x, weight.shape[:1], bias=bias)
    _expect("labels", labels, (image[0],), (torch.int64,), x, "= [N] ")
    _indices(x, _count(channels, "channels"), channels=channels, source=source)
