"""What the checks of several ops demand.

Legend: S subnetworks, C channels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from kernels.dense import ACTIVATIONS, compute_dtype
from kernels.layout import Image, activation_slot

PLAIN = (Tensor, Parameter)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """`torch._check`, which takes microseconds, for what does not hold or is not yet known."""
    if condition is not True:
        torch._check(condition, message)


def expect(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    like: Tensor,
    legend: str = "",
) -> None:
    """Check shape, dtype, device and contiguity of one argument."""
    # Sizes of plain tensors are numbers. A training step makes thousands of these checks.
    if (
        type(tensor) in PLAIN
        and tensor.shape == tuple(shape)
        and tensor.dtype in dtypes
        and tensor.is_contiguous()
        and tensor.device == like.device
    ):
        return

    def got() -> str:
        kinds = " or ".join(map(str, dtypes))
        return f"{name} must be {kinds} {list(shape)} {legend}contiguous on {like.device}, got "

    check(tensor.dtype in dtypes, lambda: f"{got()}{tensor.dtype}")
    same_rank = tensor.dim() == len(shape)
    check(same_rank, lambda: f"{got()}{list(tensor.shape)}")
    for size, wanted in zip(tensor.shape, shape, strict=True):
        check(size == wanted, lambda: f"{got()}{list(tensor.shape)}")
    check(tensor.device == like.device, lambda: f"{got()}{tensor.device}")
    check(tensor.is_contiguous(), lambda: f"{got()}strides {list(tensor.stride())}")


def expect_indices(like: Tensor, count: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        expect(name, tensor, (count,), (torch.int32,), like, "= [S] ")


def expect_per_channel(like: Tensor, shape: Sequence[int], legend: str, **tensors: Tensor | None) -> None:
    dtypes = tuple(dict.fromkeys((like.dtype, compute_dtype(like.dtype))))
    for name, tensor in tensors.items():
        if tensor is not None:
            expect(name, tensor, shape, dtypes, like, f"= [{legend}] ")


def expect_activations(x: Tensor, image: Image, max_channels: int) -> None:
    check(len(image) == 3, lambda: f"image must be (N, H, W), got {tuple(image)}")
    for size in (*image, max_channels):
        check(size >= 1, lambda: f"image {tuple(image)} and channels {max_channels} must be at least 1")
    expect_buffer("x", x, activation_slot(image, max_channels), x)


def expect_buffer(name: str, tensor: Tensor, slot: int, like: Tensor) -> None:
    dtypes = FLOATS if tensor is like else (like.dtype,)
    check(tensor.dim() == 2, lambda: f"{name} must be [slots, {slot}], got {list(tensor.shape)}")
    expect(name, tensor, (tensor.shape[0], slot), dtypes, like, "= [slots, slot] ")


def expect_window(kernel: int, stride: int, activation: str = "none") -> None:
    check(kernel >= 1 and stride >= 1, lambda: f"kernel and stride must be at least 1, got {kernel}, {stride}")
    expect_activation("activation", activation)


def expect_activation(name: str, activation: str) -> None:
    check(activation in ACTIVATIONS, lambda: f"{name} must be one of {ACTIVATIONS}, got {activation!r}")


def expect_prologue(x: Tensor, max_channels: int, scale: Tensor | None, shift: Tensor | None, activation: str) -> None:
    expect_activation("input_activation", activation)
    check(
        (scale is None) == (shift is None),
        lambda: "input_scale and input_shift must be given together or not at all",
    )
    check(
        scale is not None or activation == "none",
        lambda: f"input_activation must be 'none' without input_scale and input_shift, got {activation!r}",
    )
    shape = (x.shape[0], max_channels)
    expect_per_channel(x, shape, "slots of x, max channels", input_scale=scale, input_shift=shift)


def expect_shortcut(x: Tensor, slot: int, count: int, shortcut: Tensor | None, shortcut_source: Tensor | None) -> None:
    check(
        (shortcut is None) == (shortcut_source is None),
        lambda: "shortcut and shortcut_source must be given together or not at all",
    )
    if shortcut is not None and shortcut_source is not None:
        expect_buffer("shortcut", shortcut, slot, x)
        expect_indices(x, count, shortcut_source=shortcut_source)


def count_of(tensor: Tensor, name: str, least: int = 1) -> int:
    check(
        tensor.dim() == 1 and tensor.shape[0] >= least,
        lambda: f"{name} must be [S] with S at least {least}, got {list(tensor.shape)}",
    )
    return tensor.shape[0]
