"""What the references have in common: one dense subnetwork after another, computed by PyTorch.

The tensors of S subnetworks are iterators, so that no more than one subnetwork is held dense at a time, through
however many convolutions it goes.

Legend: S subnetworks, N images, C or I channels in, O channels out, H W size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kernels.layout import Image, read_weights, view_activations

ACTIVATIONS = ("none", "relu", "relu6")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision a reference computes in: float64 for float64, float32 for anything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widths_on_host(name: str, values_S: Tensor, limit: int) -> list[int]:
    """The S channel counts of `values_S` as Python integers; `RuntimeError` unless all lie in 1..limit."""
    return _in_range(name, values_S, 1, limit)


def slots_on_host(name: str, source_S: Tensor, slots: int) -> list[int]:
    """The S slot numbers of `source_S` as Python integers; `RuntimeError` unless all lie in 0..slots-1."""
    return _in_range(name, source_S, 0, slots - 1)


def _in_range(name: str, values_S: Tensor, low: int, high: int) -> list[int]:
    values: list[int] = values_S.tolist()
    for s, value in enumerate(values):
        if not low <= value <= high:
            raise RuntimeError(f"{name}[{s}] is {value}; legal values are {low}..{high}")
    return values


def rows(tensor: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """The rows of `tensor`, or None for each of `count` if there is none.

    Taken apart at once: under autograd, indexing row by row would make a gradient of full size for every row.
    """
    return [None] * count if tensor is None else tensor.unbind(0)


def dense_inputs(
    x: Tensor,
    channels: Sequence[int],
    source: Tensor,
    image: Image,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
) -> Iterator[Tensor]:
    """The input `[N, C_s, H, W]` of each subnetwork in the computing precision.

    With `scale` and `shift` `[slots, max channels]`, rows by slot of x, it is act(x · scale + shift).
    """
    slots, dtype = x.unbind(0), compute_dtype(x.dtype)
    scales, shifts = rows(scale, len(slots)), rows(shift, len(slots))
    for c, slot in zip(channels, slots_on_host("source", source, len(slots)), strict=True):
        dense = view_activations(slots[slot], image, c).to(dtype)
        yield dense if scale is None else finish(dense.clone(), scales[slot], shifts[slot], None, activation)


def dense_weights(
    weight: Tensor,
    cin: Sequence[int],
    cout: Sequence[int],
    weight_source: Tensor,
    kernel: int,
    depthwise: bool = False,
) -> Iterator[Tensor]:
    """The weights of each subnetwork in the computing precision: `[O_s, I_s, kh, kw]`, or `[C_s, 1, kh, kw]`."""
    slots, dtype = weight.unbind(0), compute_dtype(weight.dtype)
    for i, o, slot in zip(cin, cout, slots_on_host("weight_source", weight_source, len(slots)), strict=True):
        yield read_weights(slots[slot], i, o, kernel, depthwise).to(dtype)


def dense_shortcuts(
    shortcut: Tensor | None, shortcut_source: Tensor | None, channels: Sequence[int], image: Image
) -> Iterator[Tensor | None]:
    """The shortcut `[N, C_s, H, W]` of each subnetwork, or None for each if there is none."""
    if shortcut is None or shortcut_source is None:
        yield from [None] * len(channels)
        return
    slots = shortcut.unbind(0)
    for c, slot in zip(channels, slots_on_host("shortcut_source", shortcut_source, len(slots)), strict=True):
        yield view_activations(slots[slot], image, c)


def convolve(
    inputs: Iterable[Tensor],
    weights: Iterable[Tensor],
    stride: int,
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    shortcuts: Iterable[Tensor | None],
    activation: str,
    sums: list[Tensor] | None = None,
) -> Iterator[Tensor]:
    """act(conv2d(input, weight) · scale[s] + shift[s] + shortcut) of each subnetwork, padded by kernel // 2.

    A weight of one input channel is depthwise. `channel_sums` of the bare convolutions are appended to `sums`.
    """
    for s, (x, weight, shortcut) in enumerate(zip(inputs, weights, shortcuts, strict=True)):
        groups = x.shape[1] // weight.shape[1]
        out = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        if sums is not None:
            sums.append(channel_sums(out))
        yield finish(out, scales[s], shifts[s], shortcut, activation)


def stack_sums(sums: Sequence[Tensor] | None, max_channels: int, like: Tensor) -> Tensor:
    """The sums `[2, C_s]` of each subnetwork as `[S, 2, max channels]`, zero beyond C_s; empty without sums."""
    if sums is None:
        return like.new_empty(0, dtype=torch.float64)
    return torch.stack([functional.pad(total, (0, max_channels - total.shape[1])) for total in sums])


def channel_sums(dense_NCHW: Tensor) -> Tensor:
    """Per-channel sum and sum of squares over N·H·W, `[2, C]` float64.

    Accumulated in float64 over blocks of rows that stay in cache, each summed as a product with ones: several
    times faster than `Tensor.sum` down the rows.
    """
    channels = dense_NCHW.shape[1]
    total = dense_NCHW.new_zeros(2, channels, dtype=torch.float64)
    for block in dense_NCHW.permute(0, 2, 3, 1).reshape(-1, channels).split(1024):
        wide = block.to(torch.float64, copy=True)
        ones = wide.new_ones(1, len(wide))
        total = total + torch.cat([ones @ wide, ones @ wide.square()])
    return total


def finish(
    out: Tensor, scale_C: Tensor | None, shift_C: Tensor | None, shortcut: Tensor | None, activation: str
) -> Tensor:
    """act(out · scale + shift + shortcut), in place on `out` `[N, C, H, W]`.

    `scale_C` and `shift_C` may have more than C entries; None stands for 1 and 0.
    """
    channels = out.shape[1]
    if scale_C is not None:
        out = out.mul_(scale_C[:channels, None, None])
    if shift_C is not None:
        out = out.add_(shift_C[:channels, None, None])
    if shortcut is not None:
        out = out.add_(shortcut)
    if activation == "relu":
        out = out.relu_()
    elif activation == "relu6":
        out = functional.relu6(out, inplace=True)
    return out


def vector_jacobian_products(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """The gradients of `inputs`, given those of the tensors `function(*inputs)`, by autograd.

    None is not differentiated: among `grads` it stands for zero, among `inputs` the result is an empty tensor.
    """
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        outputs = function(*leaves)
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    tensors = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad([p[0] for p in pairs], tensors, [p[1] for p in pairs], materialize_grads=True))
    return [tensors[0].new_empty(0) if leaf is None else next(found) for leaf in leaves]
